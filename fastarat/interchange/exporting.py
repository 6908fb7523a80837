"""A BatchNorm branch of a trained network out, as an ordinary network; RobustBench's files and entries among them."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastarat.card import pixels
from fastarat.config import Config
from fastarat.errors import UserError, unknown
from fastarat.evaluation import collect
from fastarat.files import make_writable, save_weights, write_atomic, write_text
from fastarat.interchange.importing import refuse_existing
from fastarat.nets.batchnorm import branch as use_branch, set_backend, single_branch
from fastarat.runs import Run, check_branch, dataset_of, load_network, network_of
from fastarat.texts import markdown, markdown_code

FORMATS = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx", "robustbench": ".pt"}
# The largest |difference| over the largest |logit|. Two implementations of the same convolution differ by about 1e-6.
TOLERANCE = 1e-5
# RobustBench's names of our normalisation, which there has a batch dimension.
_RENAMED = {"normalize.mean": "mu", "normalize.std": "sigma"}


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
        which: "last", "best", "swa" or "ema" weights of a run folder.
        num_images: "robustbench" compares on this many test images of the run's data set, the others on random ones.
        data_dir: where that data set lives (default: the run's).
    Returns: `out`.
    Raises: UserError when `out` exists, for an unknown format or branch, a network the format cannot hold, a missing
        optional package, or logits that differ.
    """
    out, entry = Path(out), Path(out).with_suffix(".md")
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    refuse_existing(out)
    if format == "robustbench":
        refuse_existing(entry)
    model, meta, config = load_network(run, which)
    check_branch(run, meta, branch, which)
    if meta["model"].startswith("timm:") and meta["normalized"] and format != "onnx":
        raise UserError(f"{meta['model']} with normalisation has no ordinary names for it: use --format onnx")
    plain = single_branch(model, branch) if meta["branches"] else model
    meta = {**meta, "branches": [], "exported_branch": branch}
    images = _images(run, format, meta, config, num_images, data_dir)
    with use_branch(model, branch):
        expected = _logits(model, images)
    make_writable(out.parent)
    difference = _write_checked(out, format, plain, meta, images, expected)
    if format == "robustbench":
        write_text(entry, _entry(Run(run), which, out, meta, len(images), *difference))
    return out


def _images(
    run: str | Path, format: str, meta: dict[str, Any], config: Config | None, count: int, data_dir: str | Path | None
) -> Tensor:
    """Return the images on which the logits are compared, float32 [B, C, H, W] in [0, 1]."""
    if count < 1:
        raise UserError(f"num_images={count}: expected 1 or more")
    shape = (meta["in_channels"], meta["image_size"], meta["image_size"])
    if format != "robustbench":
        # Any images tell two networks apart; these need no data set, and a fixed seed makes a failure repeatable.
        return torch.rand((8, *shape), generator=torch.Generator().manual_seed(0))
    _architecture(meta)  # refuses before any work what RobustBench has no class for
    if config is None:
        raise UserError(f"{run} names no data set, and this format is checked on test images: export from a run folder")
    dataset = dataset_of(config, data_dir)
    if dataset.shape != shape:
        raise UserError(f"{dataset.name} has images {list(dataset.shape)}, the network takes {list(shape)}")
    return collect(dataset.test, limit=count)[0]


def _write_checked(
    out: Path, format: str, model: nn.Module, meta: dict[str, Any], images: Tensor, expected: Tensor
) -> tuple[float, float]:
    """Write, read back and compare before the file gets its name; return the largest difference and its share."""
    measured: list[float] = []

    def write(partial: Path) -> None:
        _write(partial, format, model, meta, images)
        difference = (_read_logits(partial, format, meta, images) - expected).abs().max().item()
        # The expected logits set the scale: a network's logits may be of size 0.1 or 100.
        measured.extend((difference, difference / expected.abs().max().clamp(min=1e-30).item()))
        if not measured[1] <= TOLERANCE:
            raise UserError(
                f"the exported network's logits differ from the run's by {measured[1]:.1e} of the largest "
                f"(allowed: {TOLERANCE:g}); {out} was not written"
            )

    write_atomic(out, write)
    return measured[0], measured[1]


def _write(path: Path, format: str, model: nn.Module, meta: dict[str, Any], images: Tensor) -> None:
    # Contiguous, because the model is channels-last and safetensors refuses such strides.
    weights = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    if format == "onnx":
        # Two images: torch.export takes a dimension of size 1 for a constant, whatever is said of it.
        _write_onnx(model, images[:2], path, meta)
    elif format == "safetensors":
        save_weights(path, weights, meta)
    elif format == "torch":
        torch.save(weights, path)
    else:
        torch.save({_RENAMED.get(k, k): v[None] if k in _RENAMED else v for k, v in weights.items()}, path)


def _read_logits(path: Path, format: str, meta: dict[str, Any], images: Tensor) -> Tensor:
    if format == "onnx":
        return _onnx_logits(path, images)
    weights = load_file(path) if format == "safetensors" else torch.load(path, weights_only=True)
    if format == "robustbench":
        names = {theirs: ours for ours, theirs in _RENAMED.items()}
        weights = {names.get(k, k): v[0] if k in names else v for k, v in weights.items()}
    return _logits(rebuilt(weights, meta), images)


def rebuilt(weights: dict[str, Tensor], meta: dict[str, Any]) -> nn.Module:
    model = network_of(meta)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part.to(memory_format=torch.channels_last)) for part in images.split(100)])


def _write_onnx(model: nn.Module, images: Tensor, path: Path, meta: dict[str, Any]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"--format onnx needs {package}: pip install 'fastarat[onnx]' ({error})") from error
    # The exporter has no translation of our own operators, Triton or not; the plain twin is PyTorch's alone.
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
    assert program is not None
    program.model.metadata_props["fastarat"] = json.dumps(meta)
    program.save(str(path), external_data=False)


def _onnx_logits(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    # Parts of another size than the traced one, so that a fixed batch size would fail here.
    return torch.cat([torch.from_numpy(session.run(None, {"images": p.numpy()})[0]) for p in images.split(5)])


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


def _entry(run: Run, which: str, out: Path, meta: dict[str, Any], count: int, difference: float, share: float) -> str:
    """Return the entry as markdown; what only the authors know, or nobody measured, says FILL IN."""
    fill = "FILL IN"
    clean, robust = measured(run, which, meta)
    imported = meta["defense"] == "imported"
    normalisation = (
        "inside the network: the class above plus buffers `mu` and `sigma` [1, 3, 1, 1] (in the file), "
        "x = (x - mu) / sigma before its forward"
    )
    rows = {
        **dict.fromkeys(("Paper title", "Authors", "Venue, year, URL"), fill),
        "Data set": markdown(str(meta["dataset"])),
        "Architecture": f"{meta['model']}, `{_architecture(meta)}`",
        "Normalisation": normalisation if meta["normalized"] else "none; images in [0, 1]",
        "Threat model": {"linf": "Linf", "l2": "L2"}[meta["norm"]],
        "Epsilon": pixels(meta["epsilon"]),
        "Clean accuracy": clean,
        "AutoAttack accuracy": robust,
        "Additional training data": f"{fill} (an imported file does not say)" if imported else "no",
        "Training": f"{markdown(meta['defense'])}, {which} weights, BatchNorm branch {meta['exported_branch']}",
        "Checkpoint": f"{markdown_code(out.name)}, "
        f"sha256 `{hashlib.sha256(out.read_bytes()).hexdigest()}`; link: {fill}",
        "Check": f"logits on {count:,} test images, eval mode, float32: largest difference from the training model "
        f"{difference:.2e} ({share:.1e} of the largest logit)",
        "License": fill,
    }
    return "# RobustBench entry\n\n" + "".join(f"- **{key}**: {value}\n" for key, value in rows.items())


def measured(run: Run, which: str, meta: dict[str, Any]) -> tuple[str, str]:
    """Return clean and AutoAttack accuracy of these weights from the run's evaluation, or what is to be run."""
    file, branch = run.evaluation(which), meta["exported_branch"]
    flags = f"--weights {which} --branch {branch} --attack clean,autoattack"
    todo = "FILL IN after " + markdown_code(f"fastarat eval {run.path.name} {flags}")
    found = run.read_evaluation(which)
    if found is None:
        return todo, todo
    settings, accuracy = found["settings"], found["accuracy"]
    same = settings.get("branch") == branch and settings["norm"] == meta["norm"]
    stale = run.stale(which, found)
    if "weights_sha256" not in settings and file.stat().st_mtime < run.weights(which).stat().st_mtime:
        stale = "older than the weights"
    elif (not stale and not same) or abs(settings["epsilon"] - meta["epsilon"]) >= 1e-9:
        stale = "of another branch or budget"
    if stale:
        todo, accuracy = f"{todo} ({file.name} is {stale})", {}
    whole = "the whole test set" if settings.get("limit") is None else "NOT the whole test set"
    told = f"on {found['num_images']:,} images ({whole})"
    clean, robust = (
        f"{accuracy[key]:.2%} {told}" if key in accuracy else todo for key in ("clean_acc", "robust_acc_aa")
    )
    return clean, robust
