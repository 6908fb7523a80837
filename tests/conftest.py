"""Without a GPU, Triton kernels run in Triton's interpreter; the variable is read when a kernel is defined."""

import os
import sys
from pathlib import Path

# Two workers of one thread each beat two threads: the tests' tensors are small, and spinning threads starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# benchmarks/ is run from a checkout, never installed. Last, because the checkout's fastarat/ lies beside its kernels: what
# is laid out as an installation has them wins where it is on the path, as in benchmarks/gpu_check.sh.
sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "tools"))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    """What is remembered of verified files is this test session's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: compiled on the GPU when there is one, interpreted on the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def cifar_dir(tmp_path, monkeypatch) -> Path:
    from archives import place_cifar

    return place_cifar(tmp_path / "data", monkeypatch).parent


@pytest.fixture
def folder(tmp_path) -> Path:
    from archives import FOLDER, draw_folder

    return draw_folder(tmp_path / "pets", FOLDER)


@pytest.fixture(scope="session")
def ffcv():
    """FFCV's parts; without FFCV the test is skipped, or fails where FASTARAT_REQUIRE_FFCV=1."""
    from fastarat.data import beton
    from fastarat.errors import UserError

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        parts = beton.ffcv_parts()
        assert torch.get_num_threads() == 3  # importing FFCV alone sets it to 1
        return parts
    except UserError as error:
        if os.environ.get("FASTARAT_REQUIRE_FFCV") == "1":
            raise
        pytest.skip(f"needs FFCV: {error}")
    finally:
        torch.set_num_threads(threads)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Under FASTARAT_STRICT a skip is a failure, unless it is for hardware or a package this machine cannot have."""
    report = (yield).get_result()
    if os.environ.get("FASTARAT_STRICT") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    allowed = "needs a CUDA GPU" in reason and not torch.cuda.is_available()
    allowed |= "this machine has a GPU" in reason and torch.cuda.is_available()
    allowed |= "needs FFCV" in reason and os.environ.get("FASTARAT_REQUIRE_FFCV") != "1"
    allowed |= "needs the neighbour" in reason and os.environ.get("FASTARAT_REQUIRE_NEIGHBOURS") != "1"
    allowed |= "needs a CPU build of torch" in reason and torch.version.cuda is not None
    allowed |= "needs Chromium" in reason and not os.environ.get("CI")
    if not allowed:
        report.outcome = "failed"
        report.longrepr = f"skipped though it should have run: {reason}"
