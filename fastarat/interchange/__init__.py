"""Weights in and out: released checkpoints into a run folder, a branch of a run out as an ordinary network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastarat.checks import checked_budget
from fastarat.config import Config
from fastarat.data import load_dataset
from fastarat.errors import UserError, nearest, unknown
from fastarat.evaluation import collect
from fastarat.files import check_kind, load_into, load_tensors, write_atomic
from fastarat.nets.batchnorm import branch as use_branch
from fastarat.nets.batchnorm import set_backend, single_branch, split_batchnorm
from fastarat.nets.models import build_model
from fastarat.runs import Run, check_branch
from fastarat.runs import load_network as load_run
from fastarat.training import pixels

FORMATS = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx", "robustbench": ".pt"}
# The largest |difference| over the largest |logit|. Two implementations of the same convolution differ by about 1e-6.
TOLERANCE = 1e-5

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_PREFIX = re.compile(r"(module|model|net|network|_orig_mod|1)\.")
_NORMALIZATION = re.compile(r"(?:(?:normalize|normalizer|normalization|norm|0)\.)?(mean|mu|std|sigma)")
_STATE = re.compile(r"(?P<module>.+?)(?:\.(?P<branch>clean|adv|base|base_adv))?\.(?P<leaf>[^.]+)")
_PAIRS = ({"clean", "adv"}, {"base", "base_adv"})
_SHORTCUT = r"(?:shortcut|downsample|skip)"
# Module names met in released files, by family: (pattern, ours).
_RENAMES = {
    "resnet": (
        (rf"(layer\d+\.\d+)\.{_SHORTCUT}(?:\.0|\.conv|_conv)?", r"\1.shortcut.0"),
        (rf"(layer\d+\.\d+)\.{_SHORTCUT}(?:\.1|\.bn|_bn)", r"\1.shortcut.1"),
        (r"fc|linear|classifier|head", "linear"),
    ),
    "wide": (
        (rf"(block\d+\.layer\.\d+)\.(?:convShortcut|{_SHORTCUT})(?:\.0|\.conv|_conv)?", r"\1.convShortcut"),
        (r"bn|norm|final_bn|bn_final", "bn1"),
        (r"fc|linear|classifier|head", "fc"),
    ),
}
_RENAMES["preact"] = (*_RENAMES["resnet"], (r"bn1|norm|final_bn|bn_final", "bn"))
# Networks whose names and shapes are those of another: only the person can tell which one a file holds.
_TWINS = {"resnet18": ("resnet18-lbgat",)}
_READABLE = "fastarat reads ResNet-18, PreActResNet-18 (with a final BatchNorm) and WRN-DEPTH-WIDTH of the TRADES kind"


# Import


class _Part(NamedTuple):
    """One tensor of a file: its name there, the module it belongs to, its BN branch, its own name."""

    key: str
    module: str
    branch: str | None
    leaf: str
    value: Tensor


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    dataset: str | None = None,
    epsilon: float = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefer: str = "auto",
) -> Path:
    """Turn a released checkpoint into a run folder that `fastarat eval` and `fastarat export` accept.

    Reads AR-AT's files (both namings of the two BatchNorm sets) and those of TRADES, MART, LBGAT, GAIRAT, robust
    overfitting, AWP and others of the same networks. Every entry of the file is used or listed in OUT/card.txt.

    Args:
        path: .pt, .pth, ... (tensors and plain values only: no code of the file runs) or .safetensors.
        out: folder to make.
        model, num_classes: default: read from the names and shapes; given ones must agree with them. LBGAT's natural
            network differs from resnet18 in a stride alone: name resnet18-lbgat for it.
        dataset: what the network was trained on; `fastarat eval` then needs no --dataset.
        epsilon, norm: budget recorded with it, pixel units; the default of later evaluations.
        mean, std: per-channel normalisation that the authors' code applies before the network. State dicts seldom
            hold it, and without it a network trained on normalised images scores badly.
        prefer: for files that hold several state dicts, the name of the one to take.
    Returns: `out`, holding last.safetensors, card.txt, and config.yaml if `dataset` is given.
    Raises: UserError when `out` exists, the file is corrupt or needs pickled classes, the architecture is another,
        or a tensor is missing, unknown or of another shape.
    """
    path, out = Path(path), Path(out)
    _refuse_existing(out)
    epsilon, _, norm = checked_budget(epsilon, norm=norm)
    if (mean is None) != (std is None):
        raise UserError("normalisation needs both mean and std, or neither")
    notes: list[str] = []
    tensors = _unwrap(_read(path), path, prefer, notes)
    tensors, stored = _strip(tensors, notes)
    given = mean is not None
    if stored:
        if given:
            raise UserError(f"{path} holds its own normalisation ({stored}): leave mean and std out")
        mean, std = stored["mean"], stored["std"]

    timm = model is not None and model.startswith("timm:")
    if timm:
        name, parts = model, [_Part(k, *_STATE.fullmatch(k).group("module", "branch", "leaf"), v)
                              for k, v in tensors.items() if _STATE.fullmatch(k)]  # fmt: skip
    else:
        name, parts = _recognise(tensors, path, notes)
        if model in _TWINS.get(name, ()):
            name = model
        elif model not in (None, name):
            raise UserError(f"{path} holds a {name}, not a {model}: leave --model out, or name {name}")
    parts, split = _branches(parts, path, notes)
    if split and "swa" in path.stem.lower():
        notes.append(
            "an averaged (SWA) file: its clean BatchNorm was reset and never re-estimated, so use branch adv only"
        )
    weights = _weights(parts, split, path, notes)
    classifier = {"linear.weight", "fc.weight"} & weights.keys()
    found = len(weights[classifier.pop()]) if classifier else num_classes
    if found is None:
        raise UserError(f"{path}: the number of classes cannot be read from {name}'s names; give --num-classes")
    if num_classes not in (None, found):
        raise UserError(f"{path} has {found} classes, not {num_classes}: leave --num-classes out")
    # A timm network's stem has many names; in a state dict it comes first.
    stem = weights.get("conv1.weight", next((v for v in weights.values() if v.dim() == 4), None))
    channels = 3 if stem is None or stem.dim() != 4 else stem.shape[1]
    if mean is not None and (not len(mean) == len(std) == channels or min(std) <= 0):
        raise UserError(f"mean={list(mean)}, std={list(std)}: expected {channels} numbers each, std above 0")
    # A deviation of [0, 1] is at most a half; files that scale by another unit have up to 1.
    if mean is not None and given and not all(0 <= m <= 1 and s <= 1 for m, s in zip(mean, std, strict=True)):
        raise UserError(
            f"mean={list(mean)}, std={list(std)}: images lie in [0, 1], and so do these; of pixels from 0 to 255 write "
            "fractions, such as 125/255"
        )
    network = build_model(name, num_classes=found, in_channels=channels, mean=mean, std=std)
    if split:
        split_batchnorm(network)
    if mean is not None:
        prefix = "0." if timm else "normalize."
        weights = {f"1.{k}" if timm else k: v for k, v in weights.items()}
        weights |= {k: v for k, v in network.state_dict().items() if k in (f"{prefix}mean", f"{prefix}std")}
    _account(network, weights, parts, name, path, notes)

    digest = _sha256(path)
    meta = {
        "model": name,
        "num_classes": found,
        "in_channels": channels,
        "image_size": 32,
        "normalized": mean is not None,
        "branches": ["clean", "adv"] if split else [],
        "defense": "imported",
        "dataset": dataset,
        "classes": [],
        "epsilon": epsilon,
        "norm": norm,
        "epoch": 0,
        "source": {"file": path.name, "sha256": digest, "notes": notes},
    }
    folder = Run.create(out)
    folder.save_weights("last", weights, meta)
    card = [
        ("imported", f"{path.name}, sha256 {digest}"),
        ("network", f"{name}, {found} classes, {channels} channels, "
         f"{sum(p.numel() for p in network.parameters()):,} parameters"),
        ("BatchNorm", "two sets, clean and adv" if split else "one set"),
        ("normalisation", "none: images in [0, 1]" if mean is None else f"mean {_few(mean)}, std {_few(std)}, inside"),
        *(("note", text) for text in notes),
    ]  # fmt: skip
    write_atomic(out / "card.txt", lambda p: p.write_text("".join(f"{k:<14} {v}\n" for k, v in card)))
    if dataset is not None:
        # How it was trained is not in the file: only what evaluation needs is written.
        known = {"dataset": dataset, "model": name, "normalize": mean is not None}
        known["attack"] = {"epsilon": epsilon, "norm": norm}
        write_atomic(out / "config.yaml", lambda p: p.write_text(yaml.safe_dump(known, sort_keys=False)))
    return out


def _read(path: Path) -> Any:
    """Load a file without running any code of it."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}" + (": it is a folder" if path.is_dir() else ""))
    try:
        if path.suffix == ".safetensors":
            check_kind(path)
            return load_file(path)
        with torch.serialization.safe_globals(_numpy_numbers()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_tensors(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: it is corrupt or no safetensors file ({error})") from error


def _numpy_numbers() -> list:
    """Names that plain NumPy numbers (an accuracy beside the weights) need; none of them runs code of the file."""
    multiarray = importlib.import_module("numpy._core.multiarray")
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return [multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, *kinds]


def _unwrap(content: Any, path: Path, prefer: str, notes: list[str]) -> dict[str, Tensor]:
    """Find the state dict in what a file holds."""
    where: list[str] = []
    while True:
        if not isinstance(content, Mapping):
            raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
        if any(isinstance(v, Tensor) and "." in str(k) for k, v in content.items()):
            break
        inner = [str(k) for k, v in content.items() if isinstance(v, Mapping) and _holds_tensors(v)]
        if not inner:
            raise UserError(f"{path} holds no state dict (it holds: {_listed(content)})")
        chosen = [k for k in _WRAPPERS if k in inner] or (inner if len(inner) == 1 else [])
        if prefer != "auto" and prefer in inner:
            chosen, prefer = [prefer], "auto"
        elif prefer != "auto":
            raise UserError(
                f"{path} has no state dict {prefer!r}{nearest(prefer, inner) or '.'} It has: {', '.join(inner)}."
            )
        if not chosen:
            raise UserError(f"{path} holds several state dicts: name one with --prefer ({', '.join(inner)})")
        where.append(chosen[0])
        if others := [k for k in content if k != chosen[0]]:
            notes.append(f"taken: {'.'.join(where)}; left: {', '.join(map(str, others))}")
        content = content[chosen[0]]
    if prefer != "auto":
        raise UserError(f"{path} holds one state dict, without names: leave --prefer {prefer} out")
    if others := [k for k, v in content.items() if not isinstance(v, Tensor)]:
        notes.append(f"not tensors, left: {', '.join(map(str, others))}")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _holds_tensors(value: Mapping, depth: int = 2) -> bool:
    return any(
        isinstance(v, Tensor) or (depth and isinstance(v, Mapping) and _holds_tensors(v, depth - 1))
        for k, v in value.items()
        if isinstance(k, str)
    )


def _strip(tensors: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Take off the prefixes of wrapping modules, and take out a stored normalisation and unused copies."""
    stored: dict[str, list[float]] = {}
    removed = ""
    while True:
        for key in [k for k in tensors if _NORMALIZATION.fullmatch(k)]:
            kind = "mean" if _NORMALIZATION.fullmatch(key)[1] in ("mean", "mu") else "std"
            stored[kind] = tensors.pop(key).float().flatten().tolist()
        heads = {m[0] if (m := _PREFIX.match(k)) else None for k in tensors}
        if len(heads) != 1 or None in heads:
            break
        prefix = heads.pop()
        removed += prefix
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    if removed:
        notes.append(f"prefix {removed} taken off every name")
    if stored and stored.keys() != {"mean", "std"}:
        raise UserError(f"the file holds a normalisation with {_listed(stored)} alone: expected a mean and a std")
    unused = [k for k in tensors if k.startswith("sub_block1.")]
    if unused:
        count = sum(tensors[k].numel() for k in unused if k.endswith((".weight", ".bias")))
        notes.append(
            f"dropped: sub_block1.* ({len(unused)} entries, {count:,} parameters), a copy that no forward uses"
        )
    return {k: v for k, v in tensors.items() if not k.startswith("sub_block1.")}, stored


def _recognise(tensors: dict[str, Tensor], path: Path, notes: list[str]) -> tuple[str, list[_Part]]:
    """Return the network's name and the file's tensors under our module names."""
    parts = []
    for key, value in tensors.items():
        match = _STATE.fullmatch(key)
        if match is None:
            raise UserError(f"{path}: unknown entry {key!r}; {_READABLE}")
        parts.append(_Part(key, *match.group("module", "branch", "leaf"), value))
    shapes = {f"{p.module}.{p.leaf}": tuple(p.value.shape) for p in parts}
    if any(k.startswith("block1.layer.") for k in shapes):
        family = "wide"
    elif "layer1.0.conv1.weight" in shapes:
        block = "layer2.0" if "layer2.0.conv1.weight" in shapes else "layer1.0"
        # In a pre-activation block the first BatchNorm is as wide as the block's input, else as its output.
        normalised = shapes.get(f"{block}.bn1.weight", (0,))[0]
        ends = shapes[f"{block}.conv1.weight"]
        family = "preact" if normalised == ends[1] != ends[0] else "resnet"
    else:
        raise UserError(f"{path} is of an unknown architecture (it holds {_listed(tensors)}): {_READABLE}")
    renamed = []
    for part in parts:
        module = part.module
        for pattern, ours in _RENAMES[family]:
            if match := re.fullmatch(pattern, module):
                module = match.expand(ours)
                break
        renamed.append(part._replace(module=module))
    shapes = {f"{p.module}.{p.leaf}": tuple(p.value.shape) for p in renamed}
    return {"wide": _wide, "preact": _preact, "resnet": _resnet}[family](shapes, path, notes), renamed


def _stages(shapes: dict[str, tuple], pattern: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return blocks and width of each stage, from names such as layer2.0.conv1.weight."""
    found: dict[int, dict[int, int]] = {}
    for key, shape in shapes.items():
        if match := re.fullmatch(pattern + r"\.conv1\.weight", key):
            found.setdefault(int(match[1]), {})[int(match[2])] = shape[0]
    return tuple(len(found[i]) for i in sorted(found)), tuple(next(iter(found[i].values())) for i in sorted(found))


def _wide(shapes: dict[str, tuple], path: Path, notes: list[str]) -> str:
    blocks, widths = _stages(shapes, r"block(\d+)\.layer\.(\d+)")
    widen = widths[0] // 16 if widths else 0
    if len(set(blocks)) != 1 or not widen or widths != (16 * widen, 32 * widen, 64 * widen):
        raise UserError(
            f"{path}: a wide ResNet of stages {blocks} and widths {widths} cannot be represented; {_READABLE}"
        )
    return f"wrn-{6 * blocks[0] + 4}-{widen}"


def _resnet(shapes: dict[str, tuple], path: Path, notes: list[str]) -> str:
    blocks, widths = _stages(shapes, r"layer(\d+)\.(\d+)")
    if any(re.fullmatch(r"layer\d+\.\d+\.conv3\.weight", k) for k in shapes):
        raise UserError(
            f"{path}: a bottleneck ResNet {blocks} (ResNet-50 and above) cannot be represented; {_READABLE}"
        )
    stem = shapes.get("conv1.weight", (0, 0, 3, 3))
    if stem[2:] != (3, 3):
        raise UserError(
            f"{path}: its stem is a {stem[2]}x{stem[3]} convolution (ImageNet form), which cannot be represented; "
            "ours is the 3x3 one of small images"
        )
    known = {
        ((2, 2, 2, 2), (64, 128, 256, 512)): "resnet18",
        ((1, 1, 1), (16, 32, 64)): "resnet-small",
    }
    if (blocks, widths) not in known:
        raise UserError(f"{path}: a ResNet of stages {blocks} and widths {widths} cannot be represented; {_READABLE}")
    return known[blocks, widths]


def _preact(shapes: dict[str, tuple], path: Path, notes: list[str]) -> str:
    if _resnet(shapes, path, notes) != "resnet18":
        raise UserError(f"{path}: a pre-activation ResNet of this size cannot be represented; {_READABLE}")
    if "bn.weight" not in shapes:
        raise UserError(
            f"{path}: a PreActResNet-18 without BatchNorm before the classifier cannot be represented: ours has one, "
            "followed by a ReLU, and no setting of it is the identity"
        )
    notes.append(
        "the strided shortcuts are taken from ReLU(bn1(x)), as in the robust-overfitting and AWP codes; files of the "
        "variant that starts from x have the same names: compare the clean accuracy with the published one"
    )
    return "preactresnet18"


def _branches(parts: list[_Part], path: Path, notes: list[str]) -> tuple[list[_Part], bool]:
    """Bring both namings of split BatchNorm to `clean` and `adv`; say whether the network is split."""
    names = {p.branch for p in parts if p.branch}
    whole = {p.module for p in parts if p.branch is None}
    if names in _PAIRS:
        ours = {"clean": "clean", "base": "clean", "adv": "adv", "base_adv": "adv"}
        if names == {"base", "base_adv"}:
            notes.append("BatchNorm set base read as clean, base_adv as adv")
        return [p._replace(branch=ours.get(p.branch)) for p in parts], True
    if names == {"clean"} and all(p.module in whole for p in parts if p.branch):
        return parts, True  # our own naming: the adversarial set has the ordinary names
    if len(names) > 1:
        raise UserError(
            f"{path} has BatchNorm sets {', '.join(sorted(names))}: expected clean and adv, or base and base_adv"
        )
    if names:
        notes.append(f"one BatchNorm set ({names.pop()}): imported as an ordinary network")
    return [p._replace(branch=None) for p in parts], False


def _weights(parts: list[_Part], split: bool, path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors by our names, as float32 (int64 for counters)."""
    weights: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    kinds = set()
    for part in parts:
        key = f"{_owner(part)}.{part.leaf}"
        if key in weights:
            raise UserError(f"{path}: {sources[key]!r} and {part.key!r} both mean {key!r}")
        value = part.value
        if value.is_floating_point():
            if not value.isfinite().all():
                raise UserError(
                    f"{path}: {part.key!r} holds values that are not finite: the training diverged, or it is corrupt"
                )
            kinds |= {str(value.dtype)} - {"torch.float32"}
            value = value.float()
        weights[key], sources[key] = value, part.key
    if kinds:
        notes.append(f"{', '.join(sorted(kinds))} tensors converted to float32")
    return weights


def _owner(part: _Part) -> str:
    return f"{part.module}.clean" if part.branch == "clean" else part.module


def _account(
    network: nn.Module, weights: dict[str, Tensor], parts: list[_Part], name: str, path: Path, notes: list[str]
) -> None:
    """Load the tensors into the network; every one has a place and every place a tensor, or it is an error."""
    own = network.state_dict()
    sources = {f"{_owner(p)}.{p.leaf}": p.key for p in parts}
    extra = [sources.get(k, k) for k in weights if k not in own]
    if extra:
        raise UserError(f"{path}: {len(extra)} entries have no place in {name}: {_listed(extra)}")
    missing = [k for k in own if k not in weights]
    # Files older than PyTorch 0.4.1 have no counters; nothing reads them while the momentum is a number.
    counters = [k for k in missing if k.endswith(".num_batches_tracked")]
    if counters and len(counters) == len(missing):
        notes.append(f"{len(counters)} num_batches_tracked counters are not in the file: set to 0")
        weights |= {k: own[k] for k in counters}
    elif missing:
        raise UserError(f"{path}: {len(missing)} entries of {name} are missing: {_listed(missing)}")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{path}: {sources.get(key, key)!r} is {list(value.shape)}; {name} expects {list(own[key].shape)}"
            )
    load_into(network, weights, path)


# Export


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: Literal["safetensors", "torch", "onnx", "robustbench"] = "safetensors",
    branch: str = "adv",
    which: str = "last",
    num_images: int = 1000,
    data_dir: str | Path | None = None,
) -> Path:
    """Write one BatchNorm branch of a trained network as an ordinary network, read it back, and compare the logits.

    A file whose logits differ from the training model's by more than 1e-5 of the largest is not left behind.

    Args:
        run: run folder or checkpoint.
        out: file to write.
        format: "safetensors", "torch": a state dict with ordinary names (conv1.weight, layer1.0.bn1.weight ...). A
            network that normalises also has normalize.mean and normalize.std, [C, 1, 1], so that a strict load into
            a network without normalisation fails. "onnx": a graph with normalisation inside and a free batch size.
            "robustbench": a state dict for RobustBench's ResNet, PreActResNet or WideResNet class, normalisation as
            mu and sigma [1, C, 1, 1] as there, and beside it OUT.md, the entry to fill.
        branch: "adv", the one published numbers use, or "clean"; networks with one BatchNorm set have only "adv".
        which: "last", "best" or "swa" weights of a run folder.
        num_images: "robustbench" compares on this many test images of the run's data set, the others on random ones.
        data_dir: where that data set lives (default: the run's).
    Returns: `out`.
    Raises: UserError when `out` exists, for an unknown format or branch, a network the format cannot hold, a missing
        optional package, or logits that differ.
    """
    out = Path(out)
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    entry = out.with_suffix(".md")
    _refuse_existing(out)
    if format == "robustbench":
        _refuse_existing(entry)
    if num_images < 1:
        raise UserError(f"num_images={num_images}: expected 1 or more")
    model, meta, config = load_run(run, which)
    check_branch(run, meta, branch, which)
    if meta["model"].startswith("timm:") and meta["normalized"] and format != "onnx":
        raise UserError(f"{meta['model']} with normalisation has no ordinary names for it: use --format onnx")
    plain = single_branch(model, branch) if meta["branches"] else model
    weights = {k: v.detach().contiguous().clone() for k, v in plain.state_dict().items()}
    meta = {**meta, "branches": [], "exported_branch": branch}

    if format == "robustbench":
        architecture = _architecture(meta)
        images = _test_images(run, meta, config, num_images, data_dir)
    else:
        shape = (8, meta["in_channels"], meta["image_size"], meta["image_size"])
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with use_branch(model, branch):
        expected = _logits(model, images)

    def write(path: Path) -> None:
        if format == "safetensors":
            save_file(weights, path, metadata={"fastarat": json.dumps(meta)})
        elif format == "onnx":
            _write_onnx(plain, images[:2], path, meta)
        else:
            torch.save(_for_robustbench(weights) if format == "robustbench" else weights, path)

    def read(path: Path) -> Tensor:
        if format == "onnx":
            return _onnx_logits(path, images)
        if format == "safetensors":
            return _logits(_rebuilt(load_file(path), meta), images)
        held = torch.load(path, map_location="cpu", weights_only=True)
        return _logits(_rebuilt(_from_robustbench(held) if format == "robustbench" else held, meta), images)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}. Choose another --out.") from error
    difference = _write_checked(out, write, read, expected)
    if format == "robustbench":
        text = _entry(Path(run), out, meta, architecture, branch, which, len(images), *difference)
        write_atomic(entry, lambda p: p.write_text(text))
    return out


def _write_checked(
    out: Path, write: Callable[[Path], None], read: Callable[[Path], Tensor], expected: Tensor
) -> tuple[float, float]:
    """Write, read back and compare before the file gets its name; return the largest difference and its share."""
    measured: list[float] = []

    def both(partial: Path) -> None:
        try:
            write(partial)
            difference = (read(partial) - expected).abs().max().item()
            measured.extend((difference, difference / expected.abs().max().clamp(min=1e-30).item()))
            if not measured[1] <= TOLERANCE:
                raise UserError(
                    f"the exported network's logits differ from the run's by {measured[1]:.1e} of the largest "
                    f"(allowed: {TOLERANCE:g}); {out} was not written"
                )
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    write_atomic(out, both)
    return measured[0], measured[1]


def _rebuilt(weights: dict[str, Tensor], meta: dict[str, Any]) -> nn.Module:
    unit = [1.0] * meta["in_channels"]
    model = build_model(
        meta["model"], num_classes=meta["num_classes"], in_channels=meta["in_channels"], image_size=meta["image_size"],
        mean=unit if meta["normalized"] else None, std=unit if meta["normalized"] else None,
    )  # fmt: skip
    model.load_state_dict(weights)
    return model.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part.to(memory_format=torch.channels_last)) for part in images.split(100)])


def _write_onnx(model: nn.Module, images: Tensor, path: Path, meta: dict[str, Any]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--format onnx needs {package}: pip install 'fastarat[onnx]' ({error})") from error
    set_backend(model, "plain")
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)  # it warns about operators of packages that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )  # fmt: skip
    finally:
        exporter.setLevel(level)
    program.model.metadata_props["fastarat"] = json.dumps(meta)
    program.save(str(path), external_data=False)


def _onnx_logits(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    # Parts of another size than the traced one, so that a fixed batch size would fail here.
    return torch.cat([torch.from_numpy(session.run(None, {"images": p.numpy()})[0]) for p in images.split(5)])


# RobustBench


def _architecture(meta: dict[str, Any]) -> str:
    """Return RobustBench's class for this network, as code. Raises: UserError where it has none that fits."""
    name, classes = meta["model"], meta["num_classes"]
    where = "robustbench.model_zoo.architectures"
    size = (meta["in_channels"], meta["image_size"])
    if name == "resnet18":
        text = f"{where}.resnet.ResNet(BasicBlock, [2, 2, 2, 2], num_classes={classes})"
    elif name == "preactresnet18":
        text = f"{where}.resnet.PreActResNet(PreActBlockV2, [2, 2, 2, 2], num_classes={classes}, bn_before_fc=True)"
    elif wide := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        text = f"{where}.wide_resnet.WideResNet(depth={wide[1]}, widen_factor={wide[2]}, num_classes={classes})"
    else:
        raise UserError(f"RobustBench has no class for {name}: it fits resnet18, preactresnet18 and wrn-D-W here")
    if size != (3, 32):
        raise UserError(
            f"RobustBench's {name} takes 3-channel images of 32x32 (its last pooling is of fixed size); this network "
            f"takes {size[0]} channel(s) of {size[1]}x{size[1]}"
        )
    return text


def _for_robustbench(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        if key.startswith("normalize."):
            key, value = {"normalize.mean": "mu", "normalize.std": "sigma"}[key], value[None]
        renamed[key] = value
    return renamed


def _from_robustbench(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    back = {"mu": "normalize.mean", "sigma": "normalize.std"}
    return {back.get(k, k): v[0] if k in back else v for k, v in weights.items()}


def _test_images(
    run: str | Path, meta: dict[str, Any], config: Config | None, count: int, data_dir: str | Path | None
) -> Tensor:
    if config is None:
        raise UserError(f"{run} names no data set, and this format is checked on test images: export from a run folder")
    config = dataclasses.replace(config, data_dir=str(data_dir) if data_dir else config.data_dir)
    dataset = load_dataset(config.dataset, data_dir=config.data_dir, image_size=config.image_size)
    expected = (meta["in_channels"], meta["image_size"], meta["image_size"])
    if dataset.shape != expected:
        raise UserError(f"{dataset.name} has images {list(dataset.shape)}, the network takes {list(expected)}")
    return collect(dataset.test, limit=min(count, len(dataset.test)))[0]


def _entry(
    run: Path,
    out: Path,
    meta: dict[str, Any],
    architecture: str,
    branch: str,
    which: str,
    count: int,
    difference: float,
    share: float,
) -> str:
    """Return the entry as markdown; what only the authors know, or nobody measured, says FILL IN."""
    clean, robust = _measured(run, which, branch, meta)
    fill = "FILL IN"
    extra = f"{fill} (an imported file does not say)" if meta["defense"] == "imported" else "no"
    normalisation = (
        "inside the network: the class above plus buffers `mu` and `sigma` [1, 3, 1, 1] (in the file), "
        "x = (x - mu) / sigma before its forward"
        if meta["normalized"]
        else "none; images in [0, 1]"
    )
    rows = [
        ("Paper title", fill),
        ("Authors", fill),
        ("Venue, year, URL", fill),
        ("Data set", meta["dataset"]),
        ("Architecture", f"{meta['model']}, `{architecture}`"),
        ("Normalisation", normalisation),
        ("Threat model", {"linf": "Linf", "l2": "L2"}[meta["norm"]]),
        ("Epsilon", pixels(meta["epsilon"])),
        ("Clean accuracy", clean),
        ("AutoAttack accuracy", robust),
        ("Additional training data", extra),
        ("Training", f"{meta['defense']}, {which} weights, BatchNorm branch {branch}"),
        ("Checkpoint", f"`{out.name}`, sha256 `{_sha256(out)}`; link: {fill}"),
        ("Check", f"logits on {count:,} test images, eval mode, float32: largest difference from the training "
         f"model {difference:.2e} ({share:.1e} of the largest logit)"),
        ("License", fill),
    ]  # fmt: skip
    return "# RobustBench entry\n\n" + "".join(f"- **{key}**: {value}\n" for key, value in rows)


def _measured(run: Path, which: str, branch: str, meta: dict[str, Any]) -> tuple[str, str]:
    """Return clean and AutoAttack accuracy of these weights from the run's eval.json, or what is to be run."""
    file = run / ("eval.json" if which == "last" else f"eval-{which}.json")
    weights = run / f"{which}.safetensors"
    command = f"`fastarat eval {run.name} --weights {which} --branch {branch} --attack clean,autoattack`"
    todo = f"FILL IN after {command}"
    if not run.is_dir() or not file.is_file():
        return todo, todo
    if file.stat().st_mtime < weights.stat().st_mtime:
        return (f"{todo} ({file.name} is older than the weights)",) * 2
    try:
        record = json.loads(file.read_text())
        settings, accuracy = record["settings"], record["accuracy"]
        same = settings["branch"] == branch and settings["norm"] == meta["norm"]
        same = same and abs(settings["epsilon"] - meta["epsilon"]) < 1e-9
        count = record["num_images"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {file} ({error}): delete it, or evaluate again") from error
    if not same:
        return (f"{todo} ({file.name} is of another branch or budget)",) * 2
    whole = "the whole test set" if settings.get("limit") is None else "NOT the whole test set"
    return tuple(
        f"{accuracy[key]:.2%} on {count:,} images ({whole})" if key in accuracy else todo
        for key in ("clean_acc", "robust_acc_aa")
    )


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out (nothing is overwritten)")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(names: Any) -> str:
    names = [str(n) for n in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _few(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:.4f}" for v in values) + ")"
