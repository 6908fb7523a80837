"""A CUDA device that is not there: tensors say that they lie on it, every operation is seen and nothing is computed.

`load` gives C++ a device and cuDNN, and must come before torch is imported, so that this file imports torch late and
`python -m benchmarks.fake_cuda` is where the process that counts begins. `pretended` gives Python the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".cpp")
VERSIONS = ("2.13",)
"""Releases of torch whose interfaces for devices SOURCE answers."""


def why_not() -> str | None:
    """Say why no device can be pretended here, or None when one can. Does not import torch."""
    version, cuda = _torch()
    if cuda is not None:
        return f"needs a CPU build of torch: torch {version} was built for CUDA {cuda} and brings a device of its own"
    if not version.startswith(VERSIONS):
        return f"knows the devices of torch {', '.join(VERSIONS)}, and this is torch {version}"
    if _compiler() is None:
        return "needs a C++ compiler: install g++, or name one in CXX"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, whose launches are counted: pip install 'triton>=3.6'"
    return None


def load() -> None:
    """Build SOURCE, once per torch, and load it.

    Raises: RuntimeError where `why_not` has a reason, torch is loaded already, or kernels would be interpreted.
    """
    if (reason := why_not()) is not None:
        raise RuntimeError(f"no CUDA device can be pretended: {reason}")
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, and has asked for its CUDA device: call load() first")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets the kernels, whose launches are to be seen: unset it")
    ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    return Path(spec.origin).parent


def _torch() -> tuple[str, str | None]:
    """Version of torch, and of the CUDA it was built for."""
    text = (_torch_folder() / "version.py").read_text()
    version = re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= '(.+)'", text, re.MULTILINE)
    return version[1] if version else "of no known version", cuda[1] if cuda else None


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _built() -> Path:
    """Return the library, built if this torch and this source have none yet."""
    torch = _torch_folder()
    key = hashlib.sha256(SOURCE.read_bytes() + str(torch).encode()).hexdigest()[:16]
    name = f"fake_cuda-{_torch()[0]}-{key}.so"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastarat"
    try:
        caches.mkdir(parents=True, exist_ok=True)
    except OSError:
        caches = Path(tempfile.mkdtemp(prefix="fastarat-"))
    if (caches / name).exists():
        return caches / name
    include, lib = torch / "include", torch / "lib"
    # Renamed into place: of two processes that build at once neither loads half a library.
    with tempfile.NamedTemporaryFile(dir=caches, suffix=".so", delete=False) as made:
        command = [str(_compiler()), "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", made.name]
        command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        command += ["-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(made.name)
        raise RuntimeError(f"{SOURCE.name} does not compile ({' '.join(command)}):\n{done.stderr[-2000:]}")
    os.replace(made.name, caches / name)
    return caches / name


@contextlib.contextmanager
def pretended(**also: Any) -> Iterator[None]:
    """Let Python see one Hopper GPU, "cuda:0", on which every tensor made inside the block is fake.

    A value that is read raises torch's own errors. also: further answers, by the dotted name of what they replace.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Mode(FakeTensorMode):
        """Told, because it asks is_available: otherwise it puts a real tensor on the device first."""

        @property
        def avoid_device_init(self) -> bool:
            return True

        def __deepcopy__(self, memo: dict[int, Any]) -> Mode:
            return self  # a copied module's tensors stay of this mode

    class Generator(torch.Generator):
        """Random numbers of the device: none is drawn."""

        wanted: torch.device

        def __new__(cls, device: Any = "cpu") -> Generator:
            made = super().__new__(cls)
            made.wanted = torch.device(device)
            return made

        @property
        def device(self) -> torch.device:
            return self.wanted

    answers = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132),
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda index: 0,
        "torch.cuda._maybe_exchange_device": lambda index: 0,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.Generator": Generator,
        "torch.nn.Module._apply": _apply,
        **also,
    }
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a deep copy looks at it
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(Mode())
        from fastarat.kernels import own_arrivals

        # Counters that outlive the block would be fake ones.
        stack.enter_context(own_arrivals())
        yield


def _apply(module: Any, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
    """`Module.to` and its like, by putting new parameters in the old ones' place: fake tensors cannot be swapped."""
    import torch

    for child in module.children() if recurse else ():
        _apply(child, fn)
    for name, p in module._parameters.items():
        if p is not None:
            with torch.no_grad():
                made = fn(p)
            if made is not p:
                module._parameters[name] = torch.nn.Parameter(made, p.requires_grad)
    buffers = dict(module.named_buffers(recurse=False))
    for name, b in buffers.items():
        setattr(module, name, fn(b))
    return module


def environment() -> dict[str, str]:
    """Return this process's environment, made fit for one that loads the device."""
    # Interpreted kernels have no launches that could be caught.
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def started(argv: Sequence[str]) -> int:
    """Run `main` with these arguments in a process of its own; returns its exit code."""
    command = [sys.executable, "-m", __name__, *argv]
    return subprocess.run(command, env=environment(), check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Load the device, then run `benchmarks.structure` with these arguments. Returns: its exit code, 2 without one."""
    try:
        load()
    except RuntimeError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    from benchmarks import structure

    return structure.main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
