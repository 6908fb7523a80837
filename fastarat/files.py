"""Files written whole or not at all, and weight files read without running any code of theirs."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastarat.errors import UserError

FORMAT = 1
"""Of the .pt checkpoints: another number is refused."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, flush it to disk and rename: a reader sees the old file or the new, never half."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write one file
    try:
        write(partial)
        with open(partial, "rb+") as file:
            # Without it some file systems rename first and write later: a power cut leaves an empty file of the right
            # name.
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another --out."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Raises: UserError where it cannot be written."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def make_writable(folder: Path, file: Path | None = None) -> None:
    """Make a folder and find out, before the work rather than after it, whether files (`file`) can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # of no name, so that two processes may ask at once
            pass
    except OSError as error:
        why = error.strerror or error
        told = (
            f"{file}: {why}; make room or choose another place"
            if file
            else f"to {folder}: {why}. Choose another --out."
        )
        raise UserError(f"cannot write {told}") from error


def save_weights(path: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a .safetensors file: a state dict, and as metadata what it takes to build its network (`load_weights`)."""
    # A copy per tensor: two names may share storage, which the format refuses.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    metadata = {"fastarat": json.dumps(meta)}
    write_atomic(path, lambda p: save_file(weights, p, metadata=metadata))


# What people take for a checkpoint: first bytes, and what a file that begins with them is.
_KINDS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive (unpack it)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull gets the file itself)"),
    (b"<", "a web page (the download did not give the file)"),
)


def check_kind(path: Path) -> None:
    """Raise UserError for a file whose first bytes say that it is something else than a checkpoint."""
    with open(path, "rb") as file:
        # Enough for a tar header, whose mark stands at byte 257.
        head = file.read(512)
    found = next((what for magic, what in _KINDS if head.lstrip().startswith(magic)), None)
    if not head:
        found = "an empty file"
    elif found is None and path.suffix != ".safetensors":
        # What torch.save writes is a zip archive, long ago a pickle or a tar archive.
        torchs = head.startswith((b"PK", b"\x80")) or head[257:262] == b"ustar"
        found = None if torchs else f"a file that begins with {head[:8]!r}"
    if found:
        raise UserError(f"{path} cannot be read: it is {found}, not a checkpoint, or corrupt")


def load_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """Read what torch.save wrote, running no code of the file. Raises: UserError for all that it cannot read."""
    try:
        check_kind(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"(?:GLOBAL|global|class|type) ([\w.]+\.\w+)", str(error)):
            raise UserError(
                f"{path} cannot be read: it holds a pickled {named[1]}, and unpickling classes would run code of the "
                "file, which fastarat never does; in the authors' own code, save the state dict alone "
                "(torch.save(model.state_dict(), FILE))"
            ) from error
        # PyTorch's own text advises to switch its protection off.
        raise UserError(f"{path} cannot be read: it is corrupt or not a PyTorch checkpoint; get it again") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} cannot be read: it is a TorchScript program, not a state dict; save model.state_dict() in the "
                "authors' code"
            ) from error
        first = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{path} cannot be read ({first}): it is corrupt or not a PyTorch checkpoint; get it again"
        ) from error


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a .pt checkpoint of fastarat (tensors and plain values only). Raises: UserError if missing or corrupt."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    try:
        state = load_tensors(Path(path), map_location)
    except UserError as error:
        raise UserError(f"{error}. Or use another: best.pt beside last.pt, or an earlier run") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "step" not in state:
        raise UserError(
            f"{path} is not a fastarat checkpoint of format {FORMAT}; others' are read by "
            f"`fastarat import {path} --out RUN`"
        )
    return state


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and metadata from a fastarat .safetensors or .pt file.

    Returns: state dict on the CPU, metadata (model, num_classes, in_channels, image_size, branches, defense, epsilon).
    Raises: UserError for a missing, corrupt or foreign file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        state = load_checkpoint(path)
        return state["step"]["model"], {**state["meta"], "epoch": state["epoch"]}
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    check_kind(path)
    try:
        with safe_open(path, "pt") as file:
            # Metadata of the format is text by text, so ours is one entry of JSON.
            meta = (file.metadata() or {}).get("fastarat")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}): it is corrupt or not a safetensors file"
        ) from error
    if meta is None:
        raise UserError(f"{path} holds no fastarat metadata: it was not written by `fastarat train`")
    return weights, json.loads(meta)


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises: UserError naming the first difference when the architectures differ."""
    own = model.state_dict()
    # Before load_state_dict, whose error lists every key of a wide network; the first one says enough.
    for key in own:
        if key not in weights:
            raise UserError(f"{path} is of another architecture: it has no {key!r}; check --model and --defense")
        if own[key].shape != weights[key].shape:
            raise UserError(
                f"{path} is of another architecture: {key!r} is {tuple(weights[key].shape)}, "
                f"expected {tuple(own[key].shape)}; check --model and the number of classes"
            )
    extra = next((key for key in weights if key not in own), None)
    if extra is not None:
        raise UserError(f"{path} is of another architecture: this model has no {extra!r}; check --model and --defense")
    model.load_state_dict(weights)
