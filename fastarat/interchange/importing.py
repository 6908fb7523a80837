"""Released checkpoints in: whatever their names, wrappers and prefixes, into a run folder."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastarat.errors import UserError, nearest
from fastarat.files import check_kind, load_tensors, write_text
from fastarat.interchange.numbers import numpy_numbers
from fastarat.nets.batchnorm import split_batchnorm
from fastarat.nets.models import build_model
from fastarat.runs import Run
from fastarat.texts import printable
from fastarat.values import EPSILON, checked_budget

# In order of preference: some files hold the weights under one of these beside an optimiser under another.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
# "1.": the network of nn.Sequential(normalise, network). "module.": DataParallel. "_orig_mod.": torch.compile.
_PREFIX = re.compile(r"(module|model|net|network|_orig_mod|1)\.")
_NORMALIZATION = re.compile(r"(?:(?:normalize|normalizer|normalization|norm|0)\.)?(mean|mu|std|sigma)")
_STATE = re.compile(r"(?:(?P<module>.+?)(?:\.(?P<branch>clean|adv|base|base_adv))?\.)?(?P<leaf>[^.]+)")
_PAIRS = ({"clean", "adv"}, {"base", "base_adv"})
_BRANCHES = {"clean": "clean", "adv": "adv", "base": "clean", "base_adv": "adv"}
_SHORTCUT = r"(?:shortcut|downsample|skip)"
# Module names met in released files, by family: (pattern, ours).
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
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


class _Part(NamedTuple):
    """One tensor of a file: its name there, the module it belongs to ("": the network), its BN branch, its own name."""

    key: str
    module: str
    branch: str | None
    leaf: str
    value: Tensor

    @property
    def ours(self) -> str:
        """Its name in our networks, where the adversarial set of a split BatchNorm has the ordinary names."""
        return ".".join(filter(None, (self.module, "clean" if self.branch == "clean" else "", self.leaf)))


def import_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    dataset: str | None = None,
    epsilon: float = EPSILON,
    norm: Literal["linf", "l2"] = "linf",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefer: str = "auto",
) -> Path:
    """Turn a released checkpoint into a run folder that `fastarat eval` and `fastarat export` accept.

    Reads AR-AT's files (both namings of the two BatchNorm sets), TRADES', MART's, LBGAT's, GAIRAT's, robust
    overfitting's, AWP's and others of these networks. Every entry of the file is used or listed in OUT/card.txt.

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
    refuse_existing(out)
    epsilon, _, norm = checked_budget(epsilon, norm=norm)
    notes: list[str] = []
    tensors, stored = _strip(_ordinary(_unwrap(_read(path), path, prefer, notes), path), notes)
    name, parts = _recognise(tensors, model, path, notes)
    parts, split = _branches(parts, path, notes)
    weights = _weights(parts, path, notes)
    size = _size(weights, num_classes, name, path)
    normalisation = _normalisation(mean, std, stored, size["in_channels"], path)
    network = build_model(name, **size, image_size=None, mean=normalisation.get("mean"), std=normalisation.get("std"))
    network = split_batchnorm(network) if split else network
    weights = _account(network, weights, parts, name, path, notes)
    meta = {
        "model": name, **size, "image_size": 32, "normalized": bool(normalisation),
        "branches": ["clean", "adv"] if split else [], "defense": "imported", "dataset": dataset, "classes": [],
        "epsilon": epsilon, "norm": norm, "epoch": 0,
        "source": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "notes": notes},
    }  # fmt: skip
    run = Run.create(out)
    run.save_weights("last", weights, meta)
    write_text(run.card_file, _card(meta, network, normalisation))
    if dataset is not None:
        # How it was trained is not in the file: only what evaluation needs is written.
        own: dict[str, Any] = {"dataset": dataset, "model": name, "normalize": bool(normalisation)}
        own["attack"] = {"epsilon": epsilon, "norm": norm}
        write_text(run.config_file, yaml.safe_dump(own, sort_keys=False))
    return out


def refuse_existing(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out (nothing is overwritten)")


def _read(path: Path) -> Any:
    """Load a file without running any code of it."""
    if not path.is_file():
        raise UserError(f"no checkpoint {path}" + (": it is a folder" if path.is_dir() else ""))
    try:
        if path.suffix == ".safetensors":
            check_kind(path)
            return load_file(path)
        # Inside the block only: an allowance that stayed would weaken every later torch.load of the process.
        with torch.serialization.safe_globals(numpy_numbers()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_tensors(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: it is corrupt or no safetensors file ({str(error)[:200]})") from error


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
        if len(where) > 8:  # a mapping may hold itself
            raise UserError(f"{path} holds no state dict: mappings lie in each other over 8 deep")
        if others := [k for k in content if k != chosen[0]]:
            notes.append(f"taken: {'.'.join(where)}; left: {', '.join(map(str, others))}")
        content = content[chosen[0]]
    if prefer != "auto":
        raise UserError(f"{path} holds one state dict, without names: leave --prefer {prefer} out")
    if others := [k for k, v in content.items() if not isinstance(v, Tensor)]:
        notes.append(f"not tensors, left: {', '.join(map(str, others))}")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _ordinary(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return `tensors`. Raises: UserError for one that is no plain array, or claims more than the file holds."""
    for key, value in tensors.items():
        kind = "" if value.layout == torch.strided else "sparse"
        kind = "quantised" if value.is_quantized else "without values" if value.is_meta else kind
        kind = "complex" if value.is_complex() else "nested" if value.is_nested else kind
        if not kind and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            kind = "a view that repeats its values"
        if not kind and value.dim() != 4 and re.search(r"(?:^|\.)conv\d*\.weight$", key):
            kind = f"{list(value.shape)}, no convolution's,"
        if not kind and key.endswith(".weight") and not value.dim():
            kind = "a single number"
        if kind:
            raise UserError(f"{path}: {key!r} is {kind}: expected an ordinary tensor, as model.state_dict() has them")
    return tensors


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if not depth or not isinstance(value, Mapping):
        return isinstance(value, Tensor)
    return any(_holds_tensors(v, depth - 1) for k, v in value.items() if isinstance(k, str))


def _strip(tensors: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Take off the prefixes of wrapping modules, and take out a stored normalisation and unused copies."""
    stored: dict[str, list[float]] = {}
    removed = ""
    while True:
        for key in list(tensors):
            if match := _NORMALIZATION.fullmatch(key):
                kind = "mean" if match[1] in ("mean", "mu") else "std"
                stored[kind] = tensors.pop(key).float().flatten().tolist()
        heads = {m[0] if (m := _PREFIX.match(k)) else "" for k in tensors}
        if len(heads) != 1 or "" in heads:
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


def _recognise(tensors: dict[str, Tensor], model: str | None, path: Path, notes: list[str]) -> tuple[str, list[_Part]]:
    """Return the network's name and the file's tensors under our module names."""
    asked = model or ""
    timm = asked.startswith("timm:")
    parts = []
    for key, value in tensors.items():
        match = _STATE.fullmatch(key)
        if match is None or (match["module"] is None and not timm):
            raise UserError(f"{path}: unknown entry {key!r}; {_READABLE}")
        parts.append(_Part(key, match["module"] or "", match["branch"], match["leaf"], value))
    if timm:
        return asked, parts
    family = _family(parts, path)
    renamed = []
    for part in parts:
        fits = ((re.fullmatch(pattern, part.module), ours) for pattern, ours in _RENAMES[family])
        renamed.append(part._replace(module=next((m.expand(ours) for m, ours in fits if m), part.module)))
    name = _architecture(family, _shapes(renamed), path, notes)
    if asked in _TWINS.get(name, ()):
        return asked, renamed
    if asked not in ("", name):
        raise UserError(f"{path} holds a {name}, not a {model}: leave --model out, or name {name}")
    return name, renamed


def _shapes(parts: Iterable[_Part]) -> dict[str, tuple[int, ...]]:
    return {f"{p.module}.{p.leaf}": tuple(p.value.shape) for p in parts}


def _family(parts: list[_Part], path: Path) -> str:
    shapes = _shapes(parts)
    if any(key.startswith("block1.layer.") for key in shapes):
        return "wide"
    if "layer1.0.conv1.weight" in shapes:
        block = "layer2.0" if "layer2.0.conv1.weight" in shapes else "layer1.0"
        # In a pre-activation block the first BatchNorm is as wide as the block's input, else as its output.
        normalised, ends = shapes.get(f"{block}.bn1.weight", (0,))[0], shapes[f"{block}.conv1.weight"]
        return "preact" if normalised == ends[1] != ends[0] else "resnet"
    raise UserError(f"{path} is of an unknown architecture (it holds {_listed(p.key for p in parts)}): {_READABLE}")


def _architecture(family: str, shapes: dict[str, tuple[int, ...]], path: Path, notes: list[str]) -> str:
    """Name the network by the blocks and the width of each stage, from names such as layer2.0.conv1.weight."""
    stages: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        if match := re.fullmatch(r"(?:layer(\d+)|block(\d+)\.layer)\.\d+\.conv1\.weight", key):
            stages.setdefault(int(match[1] or match[2]), []).append(shape[0])
    blocks, widths = (tuple(of(stages[i]) for i in sorted(stages)) for of in (len, lambda stage: stage[0]))
    count, widen = (blocks[0], max(1, widths[0] // 16)) if stages else (0, 0)
    known = {
        ("wide", (count,) * 3, (16 * widen, 32 * widen, 64 * widen)): f"wrn-{6 * count + 4}-{widen}",
        ("resnet", (1, 1, 1), (16, 32, 64)): "resnet-small",
        ("resnet", (2, 2, 2, 2), (64, 128, 256, 512)): "resnet18",
        ("preact", (2, 2, 2, 2), (64, 128, 256, 512)): "preactresnet18",
    }
    name = known.get((family, blocks, widths))
    stem = shapes.get("conv1.weight", (0, 0, 3, 3))[2:]
    if any(re.fullmatch(r"layer\d+\.\d+\.conv3\.weight", key) for key in shapes):
        what = f"a bottleneck ResNet {blocks} (ResNet-50 and above)"
    elif len(stem) == 2 and stem != (3, 3):
        what = f"a {stem[0]}x{stem[1]} stem (ImageNet form; ours is the 3x3 one of small images)"
    elif name is None:
        kind = {"wide": "wide ResNet", "resnet": "ResNet", "preact": "pre-activation ResNet"}[family]
        what = f"a {kind} of stages {blocks} and widths {widths}"
    elif family == "preact" and "bn.weight" not in shapes:
        what = (
            "a PreActResNet-18 without BatchNorm before the classifier (ours has one, followed by a ReLU, and no "
            "setting of it is the identity)"
        )
    else:
        if family == "preact":
            notes.append(
                "the strided shortcuts are taken from ReLU(bn1(x)), as in the robust-overfitting and AWP codes; files "
                "of the variant that starts from x have the same names: compare the clean accuracy with the published"
            )
        return name
    raise UserError(f"{path}: {what} cannot be represented; {_READABLE}")


def _branches(parts: list[_Part], path: Path, notes: list[str]) -> tuple[list[_Part], bool]:
    """Bring both namings of split BatchNorm to `clean` and `adv`; say whether the network is split."""
    names = {p.branch for p in parts if p.branch}
    whole = {p.module for p in parts if p.branch is None}
    if names == {"base", "base_adv"}:
        notes.append("BatchNorm set base read as clean, base_adv as adv")
    # {clean}: our own naming, where the adversarial set has the ordinary names.
    if names in _PAIRS or (names == {"clean"} and all(p.module in whole for p in parts if p.branch)):
        if "swa" in path.stem.lower():
            notes.append(
                "an averaged (SWA) file: its clean BatchNorm was reset and never re-estimated, so use branch adv only"
            )
        return [p._replace(branch=_BRANCHES.get(p.branch or "")) for p in parts], True
    if len(names) > 1:
        raise UserError(
            f"{path} has BatchNorm sets {', '.join(sorted(names))}: expected clean and adv, or base and base_adv"
        )
    if names:
        notes.append(f"one BatchNorm set ({names.pop()}): imported as an ordinary network")
    return [p._replace(branch=None) for p in parts], False


def _weights(parts: list[_Part], path: Path, notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors by our names, as float32 (int64 for counters)."""
    weights: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    kinds = set()
    for part in parts:
        key = part.ours
        if key in weights:
            raise UserError(f"{path}: {sources[key]!r} and {part.key!r} both mean {key!r}")
        value = part.value
        if value.is_floating_point():
            if not value.isfinite().all():
                raise UserError(
                    f"{path}: {part.key!r} holds values that are not finite: the training diverged, or it is corrupt"
                )
            # Files in half precision are common; our BatchNorm and evaluation are float32 throughout.
            kinds |= {str(value.dtype)} - {"torch.float32"}
            value = value.float()
        weights[key], sources[key] = value, part.key
    if kinds:
        notes.append(f"{', '.join(sorted(kinds))} tensors converted to float32")
    return weights


def _size(weights: dict[str, Tensor], num_classes: int | None, name: str, path: Path) -> dict[str, int]:
    classifier = next((weights[key] for key in ("linear.weight", "fc.weight") if key in weights), None)
    found = num_classes if classifier is None else len(classifier)
    if found is None:
        raise UserError(f"{path}: the number of classes cannot be read from {name}'s names; give --num-classes")
    if num_classes not in (None, found):
        raise UserError(f"{path} has {found} classes, not {num_classes}: leave --num-classes out")
    # A timm network's stem has many names; in a state dict it comes first.
    stem = weights.get("conv1.weight", next((v for v in weights.values() if v.dim() == 4), None))
    return {"num_classes": found, "in_channels": 3 if stem is None or stem.dim() != 4 else stem.shape[1]}


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, stored: dict[str, list[float]], channels: int, path: Path
) -> dict[str, Sequence[float]]:
    """Return mean and std to put inside the network, as given or as the file holds them, or nothing."""
    if mean is None or std is None:
        if mean is not std:
            raise UserError("normalisation needs both mean and std, or neither")
        found: dict[str, Sequence[float]] = dict(sorted(stored.items()))
    elif stored:
        raise UserError(f"{path} holds its own normalisation ({stored}): leave mean and std out")
    else:
        found = {"mean": mean, "std": std}
    if found and (not len(found["mean"]) == len(found["std"]) == channels or min(found["std"]) <= 0):
        text = ", ".join(f"{key}={list(value)}" for key, value in found.items())
        raise UserError(f"{text}: expected {channels} numbers each, std above 0")
    # A deviation of [0, 1] is at most a half; files that scale by another unit have up to 1.
    if mean is not None and std is not None and not all(0 <= m <= 1 and s <= 1 for m, s in zip(mean, std, strict=True)):
        raise UserError(
            f"mean={list(mean)}, std={list(std)}: images lie in [0, 1], and so do these; of pixels from 0 to 255 write "
            "fractions, such as 125/255"
        )
    return found


def _account(
    network: nn.Module, weights: dict[str, Tensor], parts: list[_Part], name: str, path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """Load the tensors into the network; every one has a place and every place a tensor, or it is an error."""
    own = network.state_dict()
    sources = {part.ours: part.key for part in parts}
    # What the network holds that no file's names do: the normalisation, and with it a timm network lies at "1.".
    inside = {k: v for k, v in own.items() if k in ("normalize.mean", "normalize.std", "0.mean", "0.std")}
    weights = {f"1.{k}" if "0.mean" in inside else k: v for k, v in weights.items()} | inside
    if extra := [sources.get(k, k) for k in weights if k not in own]:
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
    network.load_state_dict(weights)
    return weights


def _card(meta: dict[str, Any], network: nn.Module, normalisation: dict[str, Sequence[float]]) -> str:
    inside = [f"{key} ({', '.join(f'{v:.4f}' for v in values)})" for key, values in normalisation.items()]
    rows = [
        ("imported", f"{meta['source']['file']}, sha256 {meta['source']['sha256']}"),
        ("network", f"{meta['model']}, {meta['num_classes']} classes, {meta['in_channels']} channels, "
         f"{sum(p.numel() for p in network.parameters()):,} parameters"),
        ("BatchNorm", "two sets, clean and adv" if meta["branches"] else "one set"),
        ("normalisation", ", ".join([*inside, "inside"]) if inside else "none: images in [0, 1]"),
        *(("note", text) for text in meta["source"]["notes"]),
    ]  # fmt: skip
    return "".join(f"{key:<14} {printable(value)}\n" for key, value in rows)


def _listed(names: Iterable[Any]) -> str:
    names = [str(n) for n in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
