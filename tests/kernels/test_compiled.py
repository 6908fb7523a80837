"""Every kernel compiles for an H200 without one: the interpreter accepts what the compiler may refuse.

Run as a script, this file calls the real launchers, on ResNet-18's shapes at batch 128, with a driver that only names the
target, so each kernel is specialised exactly as a GPU run would specialise it, and prints what ptxas says of each.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

MULTIPROCESSORS, REGISTERS = 132, 65536
COOPERATIVE = ("_cooperative_forward_kernel", "_cooperative_backward_kernel")
REDUCING = ("_stats_kernel", "_backward_sums_kernel", "_join_sums_kernel")


def told_by(ptxas: str) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, from what the assembler said of a kernel."""
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    used = re.search(r"Used (\d+) registers", ptxas)
    assert found is not None, ptxas
    assert used is not None, ptxas
    return {"registers": int(used[1]), "spilt": int(found[1]) + int(found[2])}


def compile_all() -> None:
    import triton
    from fastarat.kernels import (
        conv_triton,
        pgd_update_triton,
        split_bn_cooperative as together,
        split_bn_join_triton,
        split_bn_triton,
        stem_triton,
    )
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Hopper:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    def compile_instead_of_launch(kernel, grid):
        def call(*args, **kwargs):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            ptx = compiled.asm["ptx"]
            assert compiled.asm["cubin"]
            if said.getvalue():  # else it is compiled already
                assembled[ptx] = told_by(said.getvalue())
            found = {"kernel": kernel.__name__, "case": case, "warps": kwargs["num_warps"], **assembled[ptx]}
            programs = grid[0] * (grid[1] if len(grid) > 1 else 1)
            wide = "ld.global.v4.b32" in ptx
            print(json.dumps(found | {"programs": programs, "wide": wide}))

        return call

    assembled: dict[str, dict[str, int]] = {}
    triton.knobs.nvidia.dump_ptxas_log = True
    driver.set_active(Hopper())
    together.multiprocessors = lambda device: MULTIPROCESSORS
    CHUNKS = together.FORWARD_CHUNK, together.BACKWARD_CHUNK
    triton.JITFunction.__getitem__ = compile_instead_of_launch
    # Sizes of 1 become constants in the kernel, a case of its own.
    shapes = {f"{c} channels": (128, c, s, s, torch.bfloat16) for c, s in ((64, 32), (128, 16), (512, 4))}
    shapes |= {"float32": (128, 64, 32, 32, torch.float32), "one": (1, 1, 1, 1, torch.float16)}
    for name, (batch, channels, height, width, dtype) in shapes.items():
        x = torch.empty(batch, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
        affine = (torch.zeros(1, channels),) * 4
        case = name
        split_bn_triton.statistics(x, 1)
        split_bn_triton.apply(x, *affine, x, True, 1e-5, True)
        bits = split_bn_triton.bits_like(x)
        for where, more, kept, training in (
            ("block", x, bits, True),
            ("inner", None, None, True),
            ("first", x, None, True),
            ("evaluation", x, bits, False),
        ):
            case = f"{name}, {where}"
            needs = True, training, kept is not None
            split_bn_triton.backward(x, more, x, kept, *affine, training, True, *needs, 1e-5)
        half = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
        case = f"{name}, picked"
        split_bn_triton.backward(x, half, x, bits, *affine, True, True, True, False, True, 1e-5)
        case = f"{name}, joined"
        split_bn_join_triton.join(x, x, affine, 1e-5, 1e-5, True)
        for more in (None, x, half):
            split_bn_join_triton.join_backward(x, more, x, x, bits, affine, affine, 1e-5, 1e-5)
        for groups in (1, 2) if channels in (64, 128) and dtype == torch.bfloat16 else (1,):
            both = torch.cat([x] * groups)
            forward, backward = (together.plan(both, groups, n) for n in CHUNKS)
            several = (torch.zeros(groups, channels),) * 4
            case = f"{name}, together, {groups} groups"
            if forward is not None:
                together.forward(both, *several[:2], both, True, 1e-5, True, forward)
            if backward is not None:
                bits = split_bn_triton.bits_like(both)
                together.backward(both, None, both, bits, *several[:3], False, 1e-5, backward)
                together.backward(both, both, both, bits, *several[:3], True, 1e-5, backward)
    case = "images"
    images, scalar = torch.zeros(4, 3, 8, 8), torch.tensor(0.1)
    pgd_update_triton.update(images, images.bfloat16(), images, 0.1, 0.1, None, None)
    pgd_update_triton.update(images, images, images, 0.0, 0.0, scalar, scalar)
    for dtype, out in ((torch.bfloat16, 64), (torch.float16, 160)):
        stem_triton.input_grad(torch.zeros(2, out, 8, 8, dtype=dtype), torch.zeros(out, 3, 3, 3, dtype=dtype))
    for dtype in (torch.bfloat16, torch.float32):
        y = torch.zeros(2, 64, 8, 8, dtype=dtype)
        for more in (y, y[:, :, ::2, ::2].contiguous()):
            conv_triton.masked_sum(y, more, y)
    for shape in ((64, 3, 3, 3), (128, 64, 3, 3), (128, 64, 1, 1)):
        weight, norm = torch.zeros(shape).contiguous(memory_format=torch.channels_last), (torch.zeros(shape[0]),) * 4
        wide, bias = torch.empty_like(weight), norm[0]
        for dtype in (torch.bfloat16, torch.float32):
            case = f"{'x'.join(map(str, shape))} to {dtype}"
            out = wide.to(dtype), bias.to(dtype)
            conv_triton.fold(weight, norm, 1e-5, norm, 1e-5, *out, wide, bias)
            conv_triton.fold(weight, norm, 1e-5, (), 0.0, *out, None, None)
            conv_triton.fold(weight, norm, 1e-5, (), 0.0, out[0], None, wide, None)
    case = "outputs innermost"
    weight = torch.zeros(64, 3, 3, 128).permute(3, 0, 1, 2)
    conv_triton.fold(weight, norm, 1e-5, (), 0.0, weight, bias, None, None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    import triton  # noqa: F401 - missing Triton must fail here, not skip

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_compile_for_hopper_without_a_spill(compiled):
    assert {found["kernel"] for found in compiled} == {
        "_stats_kernel",
        "_apply_kernel",
        "_backward_sums_kernel",
        "_backward_apply_kernel",
        "_pgd_update_kernel",
        "_stem_input_grad_kernel",
        "_masked_sum_kernel",
        "_fold_kernel",
        "_join_apply_kernel",
        "_join_sums_kernel",
        "_join_backward_kernel",
        *COOPERATIVE,
    }
    assert [found for found in compiled if found["spilt"] and found["kernel"] not in COOPERATIVE] == []
    # Whole 16-byte loads wherever rows are whole vectors.
    assert [found for found in compiled if "channels" in found["case"] and not found["wide"]] == []


def test_a_reduction_is_one_wave(compiled):
    """All its programs are resident at once: a second wave of a few would take as long as the first."""
    reducing = [found for found in compiled if found["kernel"] in REDUCING and "channels" in found["case"]]
    assert len(reducing) == 3 * 10
    for found in reducing:
        # Registers are given out by eight to a thread, in a multiple of 256 to a warp.
        threads, registers = 32 * found["warps"], -(-found["registers"] // 8) * 8
        resident = REGISTERS // (registers * threads)
        assert found["programs"] <= MULTIPROCESSORS * resident, found


def test_a_cooperative_launch_fits_the_device(compiled):
    """One program for each multiprocessor, all resident; what its registers cannot hold stays in the cache beside it."""
    found = [one for one in compiled if one["kernel"] in COOPERATIVE and "channels" in one["case"]]
    assert {one["case"] for one in found} >= {f"{c} channels, together, 1 groups" for c in (64, 128, 512)}
    for one in found:
        assert one["programs"] <= MULTIPROCESSORS, one
        assert one["registers"] * 32 * one["warps"] <= REGISTERS, one
        # Stores and loads counted both; the cache holds 256 KiB for 512 threads.
        assert one["spilt"] <= 1024, one


if __name__ == "__main__":
    compile_all()
