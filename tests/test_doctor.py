"""The doctor with packages that are missing, broken or not what their name says."""

import importlib.metadata
import re
import sys

import pytest
import torch

from fastarat import doctor
from fastarat.doctor import Check, diagnose, render

NAMES = ["PyTorch", "GPU", "Triton kernels", "CUDA graphs", "BN folding", "bf16 (--amp)", "CPU", "FFCV", "NVIDIA Apex",
         "AutoAttack", "timm", "TensorBoard"]  # fmt: skip


@pytest.fixture(autouse=True)
def _forget_fakes(monkeypatch, tmp_path):
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


def fake(monkeypatch, tmp_path, name, files, version=None):
    """Put a package of that name, made of `files`, in front of every installed one."""
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    for path, text in files.items():
        file = tmp_path / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if version:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def hide(monkeypatch, *names):
    """Make these packages look as if they had never been installed."""
    version = importlib.metadata.version

    def hidden_version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.metadata, "version", hidden_version)


def check(name, device="cpu"):
    return Check(name, *doctor.PARTS[name](torch.device(device)))


def test_a_healthy_machine_is_described_and_every_gap_is_mendable():
    checks = diagnose("cpu")
    assert [c.name for c in checks] == NAMES
    assert {c.status for c in checks} <= {"used", "not used", "missing"}
    assert all(c.detail for c in checks)
    assert all(c.mend for c in checks if c.status != "used")
    assert not any("check itself failed" in c.detail for c in checks)
    text = render(checks)
    assert torch.__version__ in text
    assert re.search(r"^\d+ used, \d+ not used, \d+ missing\.", text.splitlines()[-1])


def test_a_gpu_that_is_not_there_does_not_crash_the_doctor():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    checks = {c.name: c for c in diagnose("cuda")}
    for name in ("GPU", "CUDA graphs", "BN folding", "bf16 (--amp)"):
        assert checks[name].status == "not used", name
    assert not any("check itself failed" in c.detail for c in checks.values())


def test_the_doctor_names_the_convolutions_that_are_not_fused(monkeypatch):
    import fastarat.kernels

    monkeypatch.setattr(doctor, "bf16_support", lambda device: (True, ""))
    monkeypatch.setattr(fastarat.kernels, "why_not_fold", lambda device, dtype: None)
    for kinds, words in (
        ({"3x3": None, "stem": "no engine"}, "apart from some (stem: no engine)"),
        ({"3x3": None}, ""),
    ):
        monkeypatch.setattr(fastarat.kernels, "conv_kinds", lambda device, dtype, kinds=kinds: kinds)
        found = check("BN folding", "cuda")
        assert found.status == "used"
        assert found.detail.endswith(words or "once per step")
        assert bool(found.mend) == bool(words)


@pytest.mark.parametrize(
    ("name", "mend"), [("FFCV", "libopencv-dev libturbojpeg0-dev pkg-config"), ("timm", "fastarat[timm]")]
)
def test_missing_and_broken_packages(monkeypatch, tmp_path, name, mend):
    package = name.lower()
    with monkeypatch.context() as m:
        hide(m, package)
        absent = check(name)
    assert absent.status == "missing"
    assert "not installed" in absent.detail
    assert mend in absent.mend

    code = "raise RuntimeError('operator torchvision::nms\\n does not exist')"
    fake(monkeypatch, tmp_path, package, {"__init__.py": code}, version="9.9")
    broken = check(name)
    assert broken.status == "not used"
    assert "fails to import: RuntimeError: operator torchvision::nms does not exist" in broken.detail
    assert mend in broken.mend


def test_an_installed_package_shows_its_version(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, "timm", {"__init__.py": ""}, version="7.8.9")
    assert check("timm") == Check("timm", "used", "7.8.9: --model timm:NAME", "")


def apex(built: bool) -> dict[str, str]:
    applier = f"class multi_tensor_applier: available = {built}"
    return {"optimizers/__init__.py": "class FusedSGD: pass", "multi_tensor_apply.py": applier}


@pytest.mark.parametrize(
    ("name", "files", "device", "status", "said", "mend"),
    [
        ("FFCV", {"__init__.py": "import no_such_library"}, "cpu", "not used", "No module named 'no_such_library'", "ffcv"),
        ("NVIDIA Apex", {"__init__.py": "import pyramid_not_here"}, "cuda", "not used", "another project", "pip uninstall apex"),
        ("NVIDIA Apex", apex(built=True), "cuda", "used", "FusedSGD", ""),
        ("NVIDIA Apex", apex(built=True), "cpu", "not used", "runs on CUDA only", ""),
        ("NVIDIA Apex", apex(built=False), "cuda", "not used", "without its CUDA extensions", ""),
        ("NVIDIA Apex", {"optimizers/__init__.py": ""}, "cuda", "not used", "has no FusedSGD", ""),
        ("NVIDIA Apex", {"optimizers/__init__.py": "import amp_C"}, "cuda", "not used", "No module named 'amp_C'", ""),
    ],
)  # fmt: skip
def test_a_package_in_every_state(monkeypatch, tmp_path, name, files, device, status, said, mend):
    fake(monkeypatch, tmp_path, name.split()[-1].lower(), {"__init__.py": "", **files}, version="0.1")
    found = check(name, device)
    assert found.status == status
    assert said in found.detail
    assert mend in found.mend
    assert bool(found.mend) == (status != "used")


def test_missing_apex(monkeypatch):
    hide(monkeypatch, "apex")
    assert check("NVIDIA Apex", "cuda").status == "missing"
    assert "NVIDIA/apex" in check("NVIDIA Apex", "cuda").mend
    assert "NVIDIA/apex" not in check("NVIDIA Apex", "cpu").mend


def test_autoattack_under_either_name(monkeypatch, tmp_path):
    assert check("AutoAttack").status == "used"
    with monkeypatch.context() as m:
        hide(m, "pyautoattack", "autoattack")
        absent = check("AutoAttack")
        assert (absent.status, absent.mend) == ("missing", "pip install pyautoattack")
    with monkeypatch.context() as m:
        hide(m, "pyautoattack")
        fake(m, tmp_path, "autoattack", {"__init__.py": "__version__ = '0.1'"})
        assert check("AutoAttack").detail.startswith("0.1 (autoattack)")


def test_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    broken = check("TensorBoard")
    assert broken.status in ("not used", "missing")
    assert "metrics.jsonl" in broken.detail
    assert broken.mend == "pip install tensorboard"


def test_a_check_that_fails_is_reported_and_the_rest_goes_on(monkeypatch):
    def ill(device):
        raise RuntimeError("driver\nin pieces")

    monkeypatch.setitem(doctor.PARTS, "Triton kernels", ill)
    checks = {c.name: c for c in diagnose("cpu")}
    assert list(checks) == NAMES
    assert checks["Triton kernels"].detail == "the check itself failed: RuntimeError: driver in pieces"


def test_bf16_without_hardware_keeps_amp_off_and_says_what_it_would_cost(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    found = check("bf16 (--amp)")
    assert found.status == "not used"
    assert "--amp stays in float32" in found.detail
    assert re.search(r"a bf16 convolution takes [\d.]+ times", found.detail)


@pytest.mark.parametrize(
    ("threads", "cores", "mend"),
    [(16, 2, "set OMP_NUM_THREADS=2"), (1, 16, "unset OMP_NUM_THREADS"), (8, 16, ""), (1, 2, "")],
)
def test_threads_against_cores(monkeypatch, threads, cores, mend):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: range(cores), raising=False)
    found = check("CPU")
    assert found.detail.startswith(f"{threads} threads on {cores} cores")
    assert (mend in found.mend) if mend else found.mend == ""


def test_render_aligns_and_puts_mends_below():
    text = render([Check("A", "used", "fine"), Check("Longer", "missing", "gone", "bring it")])
    assert text.splitlines() == [
        "A       used      fine",
        "Longer  missing   gone",
        "                  -> bring it",
        "1 used, 0 not used, 1 missing. Training works without whatever is not used.",
    ]
