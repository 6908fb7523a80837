"""One typed tree for the command line, YAML and Python, and every check that crosses two fields."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastarat.defenses import ARAT, DEFENSES, Defense
from fastarat.errors import UserError, nearest, unknown
from fastarat.models import MODELS
from fastarat.schedules import RECIPES, recipe_of


def _f(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """The training attack. Unset fields follow the defense."""

    epsilon: float = _f(8 / 255, "budget in pixel units, 1.0 the full range; fractions such as 8/255 are read")
    step_size: float | None = _f(None, "pixel units (default: epsilon / 4)")
    num_steps: int = _f(10, "gradient steps")
    num_restarts: int = _f(1, "keep the strongest of this many starts")
    norm: Literal["linf", "l2"] = _f("linf", "ball")
    bn: Literal["eval", "train", "train-frozen"] | None = _f(
        None,
        "BatchNorm during the attack (default: the defense's): running statistics; batch statistics that move "
        "the running ones; batch statistics that do not",
    )
    start: Literal["none", "uniform", "uniform-unclamped", "gaussian", "l2"] | None = _f(
        None, "random start (default: the defense's)"
    )
    objective: Literal["ce", "kl", "cw"] | None = _f(None, "what is maximised (default: the defense's)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its schedule. Unset fields follow the recipe."""

    recipe: str | None = _f(None, f"named schedule, of {', '.join(RECIPES)} (default: the defense's)")
    lr: float | None = _f(None, "base learning rate")
    momentum: float | None = _f(None, "of SGD")
    weight_decay: float | None = _f(None, "on every parameter, BatchNorm and biases included, as released")
    nesterov: bool | None = _f(None, "Nesterov momentum")
    optimizer: Literal["fastarat", "torch", "apex"] = _f(
        "fastarat", "fused SGD that also writes the attack's bf16 weights, torch's, or NVIDIA Apex's if installed"
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation after each epoch; it chooses the best checkpoint. The test set chooses nothing."""

    every: int = _f(1, "epochs between validations")
    num_steps: int = _f(10, "PGD steps on the validation split")
    val_images: int | None = _f(None, "images held out of the training set (default: 1000; a tenth of small sets)")


@dataclass(frozen=True, kw_only=True)
class SwaConfig:
    """Stochastic weight averaging (AR-AT+SWA): a uniform mean of snapshots, BatchNorm re-estimated at the end."""

    start: float = _f(0.75, "averaging begins after this share of the epochs (epoch 76 of 100)")
    every: int | None = _f(None, "steps between snapshots (default: 500, or an epoch where that gives fewer than 5)")
    exact: bool = _f(False, "let attack forwards move the statistics during re-estimation, as released")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on. The resolved form is saved in the run folder and reloads to an equal object."""

    defense: Defense = field(default_factory=ARAT, metadata={"help": ", ".join(DEFENSES) + ", or FILE.py:CLASS"})
    dataset: str = _f("digits", "digits, cifar10, cifar100, an image folder, an archive of one, or a .beton")
    model: str | None = _f(
        None,
        f"{', '.join(sorted(MODELS))}, any wrn-DEPTH-WIDTH, or timm:NAME "
        "(default: resnet18; resnet-small for images under 32 pixels)",
    )
    epochs: int | None = _f(None, "default: the recipe's")
    batch_size: int = _f(128, "images per step")
    amp: bool = _f(False, "short for --precision bf16, where the hardware has it")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = _f(
        "fp32", "of convolutions; statistics and losses are float32"
    )
    swa: bool = _f(False, "also average weights (see --swa-config.start)")
    ema: float | None = _f(
        None, "also keep an exponential moving average of the weights with this decay, such as 0.995"
    )
    seed: int = _f(0, "of everything random")
    out: str | None = _f(None, "run folder (default: runs/DATASET-MODEL-DEFENSE-seedN)")
    data_dir: str = _f("data", "where downloads and caches live")
    loader: Literal["auto", "resident", "ffcv"] = _f("auto", "data on the device, or streamed from .beton by FFCV")
    augment: bool = _f(True, "random crop and flip, as each data set is used in the literature")
    normalize: bool = _f(False, "normalise by the training set's mean and deviation inside the model")
    image_size: int | None = _f(None, "resize image folders to this many pixels")
    limit_train: int | None = _f(None, "use only this many training images (stratified)")
    device: str = _f("auto", "auto, cpu, cuda, cuda:N")
    threads: int | None = _f(
        None, "CPU threads (default: PyTorch's choice; 1 is best for small networks on a busy machine)"
    )
    channels_last: bool = _f(True, "memory format of images and weights")
    kernels: Literal["auto", "triton", "plain"] = _f("auto", "fused Triton kernels or their plain twins")
    capture: Literal["auto", "on", "off", "fake"] = _f(
        "auto", "replay the whole step as one CUDA graph; fake: its buffers and checks, without a graph"
    )
    compile_loss: bool = _f(False, "torch.compile the loss")
    fold_bn: bool = _f(True, "in eval-mode attacks, fold BatchNorm into the convolutions once per step")
    winograd: bool = _f(True, "on a CPU, Winograd convolutions where they are faster")
    awp: float | None = _f(None, "gamma_w of adversarial weight perturbation (0.01 for AT, 0.005 for TRADES)")
    awp_warmup: int = _f(0, "epochs without weight perturbation")
    log_every: int | None = _f(None, "steps between reads of the device's metrics (default: 1 on a CPU, 50 on a GPU)")
    tensorboard: bool = _f(True, "write TensorBoard events")
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    swa_config: SwaConfig = field(default_factory=SwaConfig)

    def __post_init__(self) -> None:
        self._check()

    @property
    def step_size(self) -> float:
        """Attack step in pixel units."""
        return self.attack.epsilon / 4 if self.attack.step_size is None else self.attack.step_size

    def _check(self) -> None:
        check_epsilon("attack.epsilon", self.attack.epsilon, self.attack.norm)
        if self.attack.step_size is not None:
            check_epsilon("attack.step_size", self.attack.step_size, self.attack.norm)
        for name, value, least in (
            ("attack.num_steps", self.attack.num_steps, 1),
            ("attack.num_restarts", self.attack.num_restarts, 1),
            ("epochs", self.epochs, 1),
            ("eval.every", self.eval.every, 1),
            ("eval.num_steps", self.eval.num_steps, 1),
            ("limit_train", self.limit_train, 1),
            ("threads", self.threads, 1),
            ("log_every", self.log_every, 1),
            ("awp_warmup", self.awp_warmup, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{name}={value}: expected {least} or more")
        if self.batch_size < 2:
            raise UserError(
                f"batch_size={self.batch_size}: BatchNorm needs at least 2 images to normalise by; write --batch-size "
                "2 or more (128 is usual)"
            )
        for name, value in (("optim.lr", self.optim.lr), ("optim.weight_decay", self.optim.weight_decay)):
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"{name}={value}: expected a number of at least 0")
        if self.optim.momentum is not None and not 0 <= self.optim.momentum < 1:
            raise UserError(f"optim.momentum={self.optim.momentum} is outside [0, 1)")
        if not 0 <= self.swa_config.start < 1:
            raise UserError(f"swa-config.start={self.swa_config.start} is outside [0, 1): it is a share of the epochs")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: expected a whole number from 0 to 2^63 - 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"ema={self.ema:g} is outside (0, 1): it is the decay of the average, such as 0.995")
        if self.awp is not None and not 0 < self.awp < 1:
            raise UserError(f"awp={self.awp:g} is outside (0, 1): it is a share of each weight's norm, such as 0.005")
        recipe_of(self.optim.recipe or self.defense.recipe)


def check_epsilon(name: str, value: float, norm: str = "linf") -> None:
    """Raise UserError unless `value` is a sensible budget or step in pixel units."""
    if norm == "linf" and not 0 < value <= 1:
        raise UserError(
            f"{name}={value:g} is outside (0, 1]: it is in pixel units where 1.0 is the full range; write {value:g}/255"
        )
    if not 0 < value < 1000:
        raise UserError(f"{name}={value:g}: expected a positive length in pixel units, such as 128/255 for L2")


def resolve_defense(name: str) -> type[Defense]:
    """Return a defense class by name, or from `FILE.py:CLASS`. Raises: UserError, before anything runs."""
    if name in DEFENSES:
        return DEFENSES[name]
    if ":" in name or name.endswith(".py"):
        return _defense_from_file(name)
    raise unknown("defense", name, DEFENSES)


def _defense_from_file(name: str) -> type[Defense]:
    path, _, cls = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"no such file: {path} (a defense of your own is named FILE.py:CLASS)")
    # Two files of one name are two modules: a run's config must name the file its defense came from.
    digest = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=6).hexdigest()
    module_name = f"_fastarat_defense_{Path(path).stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not import: {type(error).__name__}: {error}") from error
    found = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Defense) and c is not Defense]
    if cls not in found:
        raise UserError(f"{path} defines no defense {cls!r}{nearest(cls, found)} Found: {', '.join(found) or 'none'}.")
    return getattr(module, cls)


def defense_key(defense: Defense) -> str:
    """Return the name that `resolve_defense` turns back into this defense's class."""
    kind = type(defense)
    if DEFENSES.get(kind.name) is kind:
        return kind.name
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return f"{file}:{kind.__qualname__}" if file else kind.__qualname__


# --- YAML and Python values ---------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a Config (or a part) into plain YAML values; `from_dict` gives back an equal object."""
    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Defense):
            value = {"name": defense_key(value), **to_dict(value)}
        elif dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        result[f.name] = value
    return result


def from_dict(values: dict[str, Any], cls: type = Config, where: str = "", source: str = "config") -> Any:
    """Build a Config from plain values. Raises: UserError naming the key, what was expected and the nearest name."""
    if not isinstance(values, dict):
        raise UserError(f"{source}: {where.rstrip('.') or 'the file'} must hold key: value lines, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(
                f"{source}: unknown key '{where}{key}'{nearest(name, known)} Known here: {', '.join(sorted(known))}."
            )
        hint = hints[name]
        if name == "defense" and cls is Config:
            built[name] = _build_defense(value, source)
        elif dataclasses.is_dataclass(hint):
            built[name] = from_dict(value if value is not None else {}, hint, f"{where}{key}.", source)
        else:
            built[name] = coerce(value, hint, f"{where}{key}", source)
    return cls(**built)


def _build_defense(value: Any, source: str) -> Defense:
    if isinstance(value, Defense):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise UserError(f"{source}: defense={value!r}: expected a name or a mapping with `name`")
    value = dict(value)
    kind = resolve_defense(str(value.pop("name", ARAT.name)))
    return from_dict(value, kind, "defense.", source)


def coerce(value: Any, hint: Any, key: str, source: str = "config") -> Any:
    """Turn a YAML or command-line value into the field's type; fractions such as 8/255 are numbers."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    # A Literal may itself offer "none" (no random start), which is then not the missing value.
    offered = {choice for o in options if typing.get_origin(o) is Literal for choice in typing.get_args(o)}
    unset = value is None or (str(value).lower() in ("none", "null", "auto") and value not in offered)
    if type(None) in options and unset:
        return None
    hint = next(o for o in options if o is not type(None))
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise UserError(
            f"{source}: {key}={value!r}{nearest(str(value), map(str, choices))} "
            f"Expected one of: {', '.join(map(str, choices))}."
        )
    try:
        if hint is bool:
            return _bool(value)
        if hint is int:
            return _int(value)
        if hint is float:
            return _float(value)
        if hint is str and isinstance(value, (str, int, float)):
            return str(value)
        if origin is tuple:
            items = value.split(",") if isinstance(value, str) else value
            inner = typing.get_args(hint)[0]
            return tuple(coerce(v.strip() if isinstance(v, str) else v, inner, key, source) for v in items)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
    wanted = {bool: "true or false", int: "a whole number", float: "a number (fractions such as 8/255 are read)"}
    raise UserError(f"{source}: {key}={value!r}: expected {wanted.get(hint, getattr(hint, '__name__', str(hint)))}")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "yes", "on", "1"):
        return True
    if str(value).lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str) and "/" in value:
        top, bottom = value.split("/")
        return float(top) / float(bottom)
    result = float(value)
    if result != result:
        raise ValueError
    return result


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises: UserError for a missing file or bad syntax, naming file and line."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    return {} if values is None else values


def write_yaml(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


# --- flags ----------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, cls: type, prefix: str = "") -> None:
    """Add one flag per field of `cls`: --batch-size, --attack.epsilon, --amp / --no-amp."""
    hints = typing.get_type_hints(cls)
    title = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
    if issubclass(cls, Defense) and cls.name:
        title = f"{cls.name}: {title}"
    group = parser.add_argument_group(title) if prefix else parser
    for f in dataclasses.fields(cls):
        hint, flag = hints[f.name], "--" + prefix + f.name.replace("_", "-")
        if f.name == "defense" and cls is Config:
            parser.add_argument(
                flag,
                dest="defense.name",
                default=argparse.SUPPRESS,
                metavar="NAME",
                help=f"{f.metadata['help']} (default: ar-at)",
            )
            continue
        if dataclasses.is_dataclass(hint):
            add_flags(parser, hint, prefix + f.name.replace("_", "-") + ".")
            continue
        default = f.default if f.default is not dataclasses.MISSING else None
        text = f.metadata.get("help", "")
        if default is not None and default is not False:
            text += f" (default: {default:.6g})" if isinstance(default, float) else f" (default: {default})"
        text = text.replace("%", "%%")
        dest = prefix.replace("-", "_") + f.name
        if hint is bool:
            group.add_argument(
                flag, dest=dest, default=argparse.SUPPRESS, action=argparse.BooleanOptionalAction, help=text
            )
        else:
            options = (hint, *typing.get_args(hint))
            choices = [str(a) for o in options if typing.get_origin(o) is Literal for a in typing.get_args(o)]
            if any("," in choice for choice in choices):
                choices = [repr(choice) for choice in choices]  # one could be taken for two
            elif bool in options:
                choices = ["true", "false"]
            group.add_argument(
                flag,
                dest=dest,
                default=argparse.SUPPRESS,
                help=text,
                metavar="{" + ",".join(map(str, choices)) + "}" if choices else f.name.upper(),
            )


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"attack.epsilon": v} -> {"attack": {"epsilon": v}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` on top, mapping by mapping."""
    result = {str(k).replace("-", "_"): v for k, v in base.items()}
    for key, value in over.items():
        below = result.get(key)
        if key == "defense" and isinstance(below, str):
            below = {"name": below}
        if key == "defense" and isinstance(below, dict) and value.get("name", below.get("name")) != below.get("name"):
            below = None  # another defense's hyper-parameters do not carry over
        result[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result
