"""Devices and precision: what computes bf16, what a run falls back to, and switches that come back."""

import sys
from contextlib import suppress

import pytest
import small
import torch

import fastarat
from fastarat import training
from fastarat.bench import bench
from fastarat.cli import main
from fastarat.device import backend_flags, bf16_support, float32_flags, usable_precision


@pytest.mark.parametrize(
    ("capabilities", "supported", "said"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False, "neither AVX512_BF16 nor AMX"),
        ({"avx512_bf16": True, "amx_bf16": False}, True, "the CPU has AVX512_BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, True, "AVX512_BF16 and AMX"),
    ],
)
@pytest.mark.parametrize("source", ["torch", "cpuinfo"])
def test_bf16_on_a_cpu_needs_hardware(monkeypatch, tmp_path, capabilities, supported, said, source):
    if source == "torch":
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        info = tmp_path / "cpuinfo"
        info.write_text("model\t: x\nflags\t\t: fpu " + " ".join(k for k, v in capabilities.items() if v) + "\n")
        monkeypatch.setattr("fastarat.device.Path", lambda name: info)
    assert bf16_support("cpu") == (supported, bf16_support("cpu")[1])
    assert said in bf16_support("cpu")[1]


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_bf16_on_a_gpu_follows_its_capability(monkeypatch, capability):
    class Device:
        def __init__(self, device): ...
        def __enter__(self): ...
        def __exit__(self, *error): ...

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))
    supported, reason = bf16_support("cuda")
    assert supported == (capability >= (8, 0))
    assert f"{capability[0]}.{capability[1]}" in reason
    assert bf16_support("meta") == (False, "bf16 training on meta is untested")


def test_precision_stays_in_float32_where_bf16_is_slow(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("fastarat.device.bf16_support", lambda device: (False, "no AVX512_BF16"))
    assert usable_precision("bf16", cpu) == ("fp32", "float32, because bf16 would be slower here: no AVX512_BF16")
    monkeypatch.setattr("fastarat.device.bf16_support", lambda device: (True, ""))
    assert usable_precision("bf16", cpu)[0] == "bf16"
    assert usable_precision("fp16", cpu)[0] == "fp32"


def switches():
    b = torch.backends
    newer = [s.fp32_precision for s in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv)]
    return b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32, b.cudnn.benchmark, b.cudnn.benchmark_limit, newer


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_training_switches_hold_inside_their_block_alone(precision):
    before = switches()
    with backend_flags(torch.device("cpu"), precision):
        assert switches() == before
    with suppress(KeyboardInterrupt), backend_flags(torch.device("cuda"), precision):
        assert switches()[:4] == (precision != "fp32", precision != "fp32", True, 10)
        with backend_flags(torch.device("cuda"), precision, cudnn_plans=0):
            assert switches()[:4] == (precision != "fp32", precision != "fp32", True, 0)
        assert switches()[3] == 10
        with float32_flags(False):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert switches()[0] == (precision != "fp32")
        raise KeyboardInterrupt
    assert switches() == before


@pytest.mark.parametrize(("given", "wanted"), [([], 10), (["--cudnn-plans", "0"], 0)])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_training_and_bench_time_as_many_plans_as_asked(command, given, wanted, monkeypatch, tmp_path):
    module = training if command == "train" else sys.modules[bench.__module__]
    asked = []
    monkeypatch.setattr(module, "backend_flags", lambda *a: (asked.append(a[2]), backend_flags(*a))[1])
    sizes = ["--model", "resnet-small", "--batch-size", "8", "--attack.num-steps", "1", "--device", "cpu"]
    more = {
        "train": [
            "--epochs",
            "1",
            "--limit-train",
            "16",
            "--no-tensorboard",
            "--quiet",
            "--out",
            str(tmp_path / "run"),
        ],
        "bench": ["--image-size", "8", "--repeats", "1", "--steps", "1"],
    }
    assert main([command, *sizes, *more[command], *given]) == 0
    assert set(asked) == {wanted}  # bench sets it for each defense, and again to count its launches


def test_a_number_of_plans_is_zero_or_more():
    with pytest.raises(fastarat.UserError, match=r"cudnn_plans=-1"):
        small.step_of(cudnn_plans=-1)
