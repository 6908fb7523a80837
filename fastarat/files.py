"""Files written whole or not at all, and files read without running any code of theirs or using damaged bytes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastarat.errors import UserError

FORMAT = 1
"""Of the .pt checkpoints: another number is refused."""
_LARGEST_JSON = 1 << 28  # bytes
_SEALED, _UNSEALED = "fastarat.sealed", "fastarat"
"""Metadata entries of weight files: SHA-256 and JSON, and as older versions wrote it, JSON alone."""


def write_atomic(path: Path, write: Callable[[Path], object], *, size: int | None = None) -> None:
    """Call `write(temporary path)`, flush it to disk and rename: a reader sees the old file or the new, never half.

    size: bytes that it takes, where they are known: a full disk is then told what is missing.
    Raises: UserError naming the file, the reason and the mend.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes may write one file
    try:
        write(partial)
        with open(partial, "rb+") as file:
            # Without it some file systems rename first and write later: a power cut leaves an empty file of the right
            # name.
            os.fsync(file.fileno())
        os.replace(partial, path)
        with suppress(OSError):  # the name, too, is to survive a power cut; not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        _cannot_write(path, error, size)
    except RuntimeError as error:
        # torch's writer and other libraries' in C++ know no errno.
        if not re.search(r"PytorchStreamWriter|iostream|file write failed|No space left", str(error)):
            raise
        _cannot_write(path, error, size)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception, size: int | None) -> NoReturn:
    why = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    mend = "Free space or choose another --out."
    if getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM):
        mend = "Choose another --out, or make the folder writable."
    elif size is not None:
        free = ""
        with suppress(OSError):
            free = f", {_in_bytes(shutil.disk_usage(path.parent).free)} free"
        why += f" ({_in_bytes(size)} needed{free})"
    raise UserError(f"cannot write {path}: {why}. {mend}") from error


def _in_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all. Raises: UserError where it cannot be written."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(content)

    write_atomic(path, write, size=len(content))


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Raises: UserError where it cannot be written."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def append_text(path: Path, text: str) -> None:
    """Add to a file in UTF-8, on disk when this returns. Raises: UserError; what was there before is left as it was."""
    content = text.encode("utf-8")
    try:
        # Without a buffer, which would try again to write what it holds when it is closed.
        with open(path, "ab", buffering=0) as file:
            before, rest = file.tell(), memoryview(content)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(path, before)
                raise
    except OSError as error:
        _cannot_write(path, error, len(content))


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


def _finite(text: str) -> float:
    if abs(number := float(text)) == float("inf"):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as it is specified: no NaN, no number beyond a float's range. Raises: ValueError for anything else."""
    try:
        content = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(content, parse_float=_finite, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file. what: what it should be, for the error: "an evaluation". Raises: UserError."""
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"it is larger than {_in_bytes(_LARGEST_JSON)}")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not {what} that can be read ({error}): it is damaged, or another file") from error


def seal(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what JSON makes of `record`, its own entry "sha256" left out.

    It tells damage and edits by mistake; it is no proof against forgery, as anybody can compute it.
    """
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "sha256"}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of what a state dict holds: names, dtypes, shapes and bytes of its tensors."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(name.encode("utf-8", errors="surrogatepass"))
        if isinstance(value, Tensor):
            # Equal bytes under another dtype or shape are other weights.
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(path: Path, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a .safetensors file: a state dict, and as metadata what it takes to build its network (`load_weights`)."""
    # A copy per tensor: two names may share storage, which the format refuses.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(weights.items())}
    text = json.dumps(meta)
    # One entry: the format keeps several in no order, and equal runs are to leave equal files.
    write_bytes(path, save(weights, {_SEALED: f"{_sealed(weights, text)[1]} {text}"}))


def _sealed(weights: dict[str, Tensor], text: str) -> tuple[str, str]:
    """Return the weights' own hash, and one of them and their metadata."""
    own = tensors_hash(dict(sorted(weights.items())))
    return own, hashlib.sha256(f"{own}\n{text}".encode()).hexdigest()


def save_tensors(path: Path, state: Any) -> None:
    """Write what torch.save makes of `state`, whole or not at all. Raises: UserError."""
    # Through memory: torch's own writer loses the reason why a disk refuses, and is undone only by its destructor.
    content = io.BytesIO()
    torch.save(state, content)
    write_bytes(path, content.getbuffer())


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


def check_sums(path: Path) -> None:
    """Raise UserError for a file of torch.save whose content is not what its own checksums (CRC-32) say."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":  # before 2020 it wrote no archives, and no checksums
            return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing, TorchScript a little: more is a bomb, and none is unpacked to find out.
            packed = next((i.filename for i in archive.infolist() if i.file_size > 1e6 + 100 * i.compress_size), None)
            damaged = None if packed is not None else archive.testzip()
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise UserError(f"{path} cannot be read ({error}): it is corrupt or not a PyTorch checkpoint") from error
    if packed is not None:
        raise UserError(
            f"{path} cannot be read: {packed[:80]!r} in it unpacks to 100 times its size: no torch.save wrote it"
        )
    if damaged is not None:
        raise UserError(f"{path} cannot be read: {damaged[:80]!r} in it is corrupt (its checksum does not hold)")


def load_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """Read what torch.save wrote, running no code of the file. Raises: UserError for all that it cannot read."""
    try:
        check_kind(path)
        check_sums(path)
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
    if not _is_checkpoint(state):
        raise UserError(
            f"{path} is not a fastarat checkpoint of format {FORMAT}; others' are read by "
            f"`fastarat import {path} --out RUN`"
        )
    return state


def _is_checkpoint(state: Any) -> bool:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        return False
    step = state.get("step")
    if not (isinstance(step, dict) and _is_state(step.get("model"))):
        return False
    return isinstance(state.get("epoch"), int) and isinstance(state.get("meta"), dict)


def _is_state(weights: Any) -> bool:
    return isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    )


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and metadata from a fastarat .safetensors or .pt file.

    Returns: state dict on the CPU, metadata (model, num_classes, in_channels, image_size, branches, defense, epsilon,
        and sha256: `tensors_hash` of the weights in order of their names).
    Raises: UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        state = load_checkpoint(path)
        weights = state["step"]["model"]
        return weights, {**state["meta"], "epoch": state["epoch"], "sha256": _sealed(weights, "")[0]}
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    check_kind(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or what torch says of the sizes in a damaged header
        raise UserError(
            f"checkpoint {path} cannot be read ({str(error)[:200]}): it is corrupt or not a safetensors file"
        ) from error
    # Metadata of the format is text by text, so ours is one entry of JSON.
    if not metadata.keys() & {_SEALED, _UNSEALED}:
        raise UserError(f"{path} holds no fastarat metadata: it was not written by `fastarat train`")
    if _SEALED in metadata:
        seal, _, text = metadata[_SEALED].partition(" ")
    else:
        seal, text = None, metadata[_UNSEALED]
    own, expected = _sealed(weights, text)
    if seal is not None and seal != expected:
        raise UserError(f"checkpoint {path} cannot be read: it is corrupt (its checksum does not hold)")
    try:
        meta = parse_json(text)
        if not isinstance(meta, dict):
            raise ValueError(f"they are a {type(meta).__name__}")
    except ValueError as error:
        raise UserError(f"checkpoint {path} cannot be read: its metadata are corrupt ({error})") from error
    return weights, {**meta, "sha256": own}


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
