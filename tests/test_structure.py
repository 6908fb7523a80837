"""What a step asks of a GPU, counted without one: the committed table is the contract, and planted faults are found."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import fake_cuda, launches, structure

ROOT = Path(__file__).parent.parent
AGAIN = (
    "if that is meant, write the table anew: python -m benchmarks structure --out benchmarks/results/structure.json "
    "&& python -m benchmarks readme"
)
# Above these no table may be committed, whatever the reason.
MOST = {
    "ar-at/resnet18/128": {"kernels": 1850, "fills": 11, "casts": 52, "gb": 27.0},
    "ar-at/resnet18/128/cooperative": {"kernels": 1400, "fills": 11, "casts": 52, "gb": 22.6},
    "at/resnet18/128": {"kernels": 1500, "fills": 3, "casts": 37, "gb": 24.0},
    "trades/resnet18/128": {"kernels": 1100, "fills": 3, "casts": 39, "gb": 20.5},
}
# What is known to lie otherwise: the quantile of a weight's gradient does not ask in what order.
KNOWN = re.compile(r"fastarat/defenses/cure\.py quantile: aten::clone leaves .*")


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if (reason := fake_cuda.why_not()) is not None:
        pytest.skip(f"no CUDA device can be pretended: {reason}")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """Every case, counted in one process."""
    out = tmp_path_factory.mktemp("structure") / "found.json"
    assert fake_cuda.started(["--out", str(out)]) == 0
    return json.loads(out.read_text())["cases"]


@pytest.fixture(scope="module")
def planted() -> dict:
    command = [sys.executable, str(ROOT / "tests" / "planted.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=fake_cuda.environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def committed() -> dict:
    return json.loads(structure.RESULTS.read_text())


def test_the_table_has_every_case_and_says_how_it_was_counted():
    assert set(committed()["cases"]) == set(structure.CASES)
    assert committed()["how"] == launches.HOW
    assert {case.split("/")[0] for case in structure.CASES} == set(structure.DEFENSES)


@pytest.mark.parametrize("case", structure.CASES)
def test_a_step_is_what_the_table_says(case, found):
    """No host read either: counting a case ends at the first."""
    said = structure.differences(found[case], committed()["cases"][case])
    assert not said, "\n".join([f"{case}:", *said, AGAIN])


@pytest.mark.parametrize("case", structure.CASES)
def test_all_that_is_large_is_channels_last(case, found):
    assert [at for at in found[case]["layouts_at"] if not KNOWN.fullmatch(at)] == []


@pytest.mark.parametrize("case", MOST)
def test_no_table_above_the_ceilings(case):
    counts = committed()["cases"][case]
    assert {name: counts[name] for name, most in MOST[case].items() if counts[name] > most} == {}


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        ("reads", r"Fault: tests/planted\.py:\d+ loss: aten::_local_scalar_dense needs a value"),
        ("nonzero", r"Fault: tests/planted\.py:\d+ loss: aten::nonzero needs a value"),
        ("copies", r"Fault: tests/planted\.py:\d+ loss: aten::_to_copy works on cpu and cuda:0"),
        ("uploads", r"Fault: tests/planted\.py:\d+ loss: aten::_to_copy works on cpu and cuda:0"),
        ("waits", r"Fault: tests/planted\.py:\d+ loss: torch\.cuda\.synchronize waits"),
        ("unpriced", r"_apply_kernel is not in benchmarks\.launches\.TRITON"),
    ],
)
def test_what_a_captured_step_must_not_do_ends_the_count_and_is_named(plant, expected, planted):
    assert re.match(expected, planted[plant]["error"])


def test_a_planted_copy_out_of_channels_last_is_seen_and_named(planted):
    said = structure.differences(planted["layout"], planted["clean"])
    assert any(
        re.match(r"\d more layouts than in the table at tests/planted\.py laid_out: aten::clone", s) for s in said
    )
    assert planted["layout"]["layouts"] == planted["clean"]["layouts"] + 8  # one a block
    assert any(s.startswith("gb ") for s in said)


def test_a_planted_cast_is_seen_and_named(planted):
    said = structure.differences(planted["cast"], planted["clean"])
    assert "16 more casts than in the table at tests/planted.py widened" in said  # to float32 and back, in eight blocks
    assert planted["cast"]["casts"] == planted["clean"]["casts"] + 32  # and so their gradients


def test_equal_steps_count_alike(planted, found):
    assert planted["clean"] == found["standard/resnet18/128"]


def test_a_convolution_moves_and_multiplies_what_it_must(planted):
    (one,) = planted["convolution"]
    pixels = 128 * 32 * 32
    # In bf16: 64 channels and the weights read, 128 channels written; two operations for each product.
    assert one["read"] == 2 * (pixels * 64 + 128 * 64 * 9)
    assert one["written"] == 2 * pixels * 128
    assert one["flop"] == 2 * pixels * 128 * 64 * 9


def test_split_batchnorm_passes_over_the_images_as_often_as_it_must(planted):
    """x for its statistics, x and the residual to write y."""
    images = 2 * 128 * 64 * 32 * 32
    assert [round(sum(one[way] for one in planted["split_bn"]) / images, 1) for way in ("read", "written")] == [3, 1]


def test_multi_tensor_launches():
    """MultiTensorApply.cuh for CUDA 13: 2,240 chunks of 65,536 elements, or 448 tensors in two lists, fill a launch."""
    chunk = 65_536
    assert launches.mta_launches([], 2) == 0
    assert launches.mta_launches([0, 5, 0], 2) == 1
    assert launches.mta_launches([1] * 448, 2) == 1
    assert launches.mta_launches([1] * 449, 2) == 2
    assert launches.mta_launches([1] * 449, 1) == 1
    assert launches.mta_launches([2_240 * chunk], 3) == 1
    assert launches.mta_launches([2_240 * chunk + 1], 3) == 2
    # The first launch is full of chunks; the tensor cut in two counts in the second, too: 447 more fill that.
    assert launches.mta_launches([2_240 * chunk + 1, *[1] * 447], 2) == 2
    assert launches.mta_launches([2_240 * chunk + 1, *[1] * 448], 2) == 3


def test_a_kernels_line_in_the_table_must_fit_its_arguments(monkeypatch):
    def body(x_ptr, y_ptr, size): ...

    x, kernel = torch.zeros(6), SimpleNamespace(fn=body)
    body.__name__ = "_new_kernel"
    monkeypatch.setitem(launches.TRITON, "_new_kernel", launches.Kernel("x_ptr", "y_ptr"))
    assert launches.triton_launch(kernel, (x, x, 6), {"num_warps": 4}) == launches.Launch("_new_kernel", 24, 24)
    assert launches.triton_launch(kernel, (None, x[:3], 6), {}) == launches.Launch("_new_kernel", 0, 12)
    monkeypatch.setitem(launches.TRITON, "_new_kernel", launches.Kernel("x_ptr", ""))
    with pytest.raises(launches.Unpriced, match="does not say what is done to y_ptr"):
        launches.triton_launch(kernel, (x, x, 6), {})
    monkeypatch.setitem(launches.TRITON, "_new_kernel", launches.Kernel("x_ptr mask_ptr", "y_ptr"))
    with pytest.raises(launches.Unpriced, match="names mask_ptr, which it does not have"):
        launches.triton_launch(kernel, (x, x, 6), {})


def test_a_mistake_ends_in_one_line(capfd):
    assert fake_cuda.started(["trades/resnet18"]) == 2
    assert (
        capfd.readouterr().err
        == "benchmarks: case 'trades/resnet18': expected defense/model/batch, such as standard/resnet18/128\n"
    )
    assert fake_cuda.started(["at/resnet18/128/eavl"]) == 2
    assert "unknown word of a case 'eavl'" in capfd.readouterr().err


def test_the_check_holds_and_a_file_keeps_what_is_not_counted_now(capfd, tmp_path):
    case = "standard/resnet18/128"
    assert fake_cuda.started([case, "--check"]) == 0
    capfd.readouterr()
    out = tmp_path / "table.json"
    out.write_text(json.dumps(committed() | {"before": {"commit": "abc", "cases": {}}}))
    assert fake_cuda.started([case, "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == committed() | {"before": {"commit": "abc", "cases": {}}}
