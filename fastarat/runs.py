"""The run folder: resolved config, metrics, checkpoints that survive a kill at any moment."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastarat.errors import UserError

FORMAT = 1


def write_atomic(path: Path, write) -> None:
    """Call `write(temporary path)`, flush it to disk and rename: a reader sees the old file or the new, never half."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another --out."
        ) from error


class RunFolder:
    """A folder holding config.yaml, card.txt, metrics.jsonl, last.pt, best.pt and their .safetensors.

    Raises: UserError when the folder exists already (nothing is overwritten) or cannot be written.
    """

    def __init__(self, path: str | Path, *, resume: bool) -> None:
        self.path = Path(path)
        if resume:
            if not (self.path / "config.yaml").is_file():
                raise UserError(f"nothing to resume in {self.path}: it holds no config.yaml")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"run folder {self.path} exists already: continue it with --resume {self.path}, or choose another --out"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}. Choose another --out.") from error

    def save(self, name: str, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write NAME.safetensors (weights) and NAME.pt (everything), each whole or not at all, weights first."""
        self.save_weights(name, state["step"]["model"], {**meta, "epoch": state["epoch"]})
        write_atomic(self.path / f"{name}.pt", lambda p: torch.save({"format": FORMAT, "meta": meta, **state}, p))

    def save_weights(self, name: str, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
        # A copy per tensor: two names may share storage, which the format refuses.
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
        metadata = {"fastarat": json.dumps(meta)}
        write_atomic(self.path / f"{name}.safetensors", lambda p: save_file(weights, p, metadata=metadata))

    def load(self, name: str = "last", map_location: Any = "cpu") -> dict[str, Any]:
        return load_checkpoint(self.path / f"{name}.pt", map_location)

    def append_metrics(self, row: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line being written when the process was killed
                continue
        return rows

    def truncate_metrics(self, epoch: int) -> None:
        """Drop what was logged after `epoch`: a resumed run logs it again."""
        rows = [row for row in self.metrics() if row["epoch"] <= epoch]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.path / "metrics.jsonl", lambda p: p.write_text(text))


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
            meta = (file.metadata() or {}).get("fastarat")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}): it is corrupt or not a safetensors file"
        ) from error
    if meta is None:
        raise UserError(f"{path} holds no fastarat metadata: it was not written by `fastarat train`")
    return weights, json.loads(meta)


def load_into(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly. Raises: UserError naming the first difference when the architectures differ."""
    own = model.state_dict()
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
