"""One typed tree for the command line, YAML and Python, and every check that crosses two fields."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastarat.data import SETS, RandAugment
from fastarat.defenses import ARAT, DEFENSES, Defense
from fastarat.defenses.naming import Foreign, defense_key, resolve_defense
from fastarat.errors import UserError, nearest
from fastarat.interrupts import Pace
from fastarat.nets.models import MODELS
from fastarat.schedules import RECIPES, Recipe, counted, recipe_of
from fastarat.specs import Attack, Fast, fields_of, known, setting, spec_of
from fastarat.values import Precision, coerce, hints_of, settle, shown

_COUNT = "[1, inf)"
_FROM_0 = "[0, inf)"
_MOST_BYTES = 1 << 16  # of a config, which has 3,000; PyYAML reads as many in up to a second


# Settings that configs saved by older versions hold; none of them changed a number beyond rounding.
_GONE = ("winograd",)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its schedule. Unset fields follow the recipe."""

    recipe: str | None = setting(None, f"named schedule, of {', '.join(RECIPES)} (default: the defense's)")
    lr: float | None = setting(None, "base learning rate", _FROM_0)
    warmup: int | None = setting(
        None,
        "epochs in which the learning rate rises along a line; 0: none (default: the recipe's first epochs)",
        _FROM_0,
    )
    milestones: tuple[int, ...] | None = setting(
        None, "after how many epochs the learning rate falls, such as 75,90 (default: the recipe's)", _COUNT
    )
    gamma: float | None = setting(None, "factor of the learning rate at each milestone (default: 0.1)", "(0, 1]")
    momentum: float | None = setting(None, "of SGD", "[0, 1)")
    weight_decay: float | None = setting(
        None, "on every parameter, BatchNorm and biases included, as released", _FROM_0
    )
    nesterov: bool | None = setting(None, "Nesterov momentum")
    optimizer: Literal["torch", "apex"] = setting("torch", "PyTorch's fused SGD, or NVIDIA Apex's if installed")

    def __post_init__(self) -> None:
        settle(self, "optim.")
        if self.recipe is not None and self.recipe.lower() in RECIPES:
            object.__setattr__(self, "recipe", self.recipe.lower())

    def schedule(self) -> Recipe:
        """The recipe, which is set by now, with these milestones. Raises: UserError for those that cannot be."""
        return recipe_of(known(self.recipe), self.milestones, self.gamma)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation after each epoch; it chooses the best checkpoint. The test set chooses nothing."""

    every: int = setting(1, "epochs between validations", _COUNT)
    num_steps: int = setting(10, "PGD steps on the validation split", _COUNT)
    val_images: int | None = setting(
        None, "images held out of the training set (default: 1000; a tenth of small sets)", _FROM_0
    )

    def __post_init__(self) -> None:
        settle(self, "eval.")


@dataclass(frozen=True, kw_only=True)
class SwaConfig:
    """Stochastic weight averaging (AR-AT+SWA): a uniform mean of snapshots, BatchNorm re-estimated at the end."""

    start: float = setting(0.75, "averaging begins after this share of the epochs (epoch 76 of 100)", "[0, 1)")
    every: int | None = setting(
        None, "steps between snapshots (default: 500, or an epoch where that gives fewer than 5)", _COUNT
    )
    exact: bool = setting(False, "let attack forwards move the statistics during re-estimation, as released")

    def __post_init__(self) -> None:
        settle(self, "swa-config.")


@dataclass(frozen=True, kw_only=True)
class Config(Fast):
    """Everything a run depends on. The resolved form is saved in the run folder and reloads to an equal object."""

    defense: Defense = field(default_factory=ARAT, metadata={"help": ", ".join(DEFENSES) + ", or FILE.py:CLASS"})
    dataset: str = setting("digits", f"{', '.join(SETS)}, an image folder, an archive of one, or a .beton")
    model: str | None = setting(
        None,
        f"{', '.join(sorted(MODELS))}, any wrn-DEPTH-WIDTH, or timm:NAME "
        "(default: resnet18; resnet-small for images under 32 pixels)",
    )
    epochs: int | None = setting(None, "default: the recipe's", _COUNT)
    extended: tuple[int, ...] | None = setting(
        None,
        "totals of epochs that the run was extended from, each with the schedule of so many; set by --resume RUN "
        "--epochs N",
        _COUNT,
    )
    batch_size: int = setting(128, "images per step, of all processes together", "(-inf, 2^24]")
    accumulate: int = setting(
        1, "micro-batches, one after another, that a batch is taken in: less memory, the same batch_size", _COUNT
    )
    sync_bn: bool = setting(
        False, "in several processes: BatchNorm normalises, per branch, by the statistics of all of them"
    )
    precision: Precision | None = setting(
        None, "of convolutions; statistics and losses are float32 (default: fp32; with --amp the fastest that is right)"
    )
    amp: bool = setting(
        False, "bf16 where the hardware has it; on a CPU only where a step is faster in it, which is timed at the start"
    )
    swa: bool = setting(False, "also average weights (see --swa-config.start)")
    ema: float | None = setting(
        None, "also keep an exponential moving average of the weights with this decay, such as 0.995", "(0, 1)"
    )
    seed: int = setting(0, "of everything random", "[0, 2^63)")
    out: str | None = setting(None, "run folder (default: runs/DATASET-MODEL-DEFENSE-seedN)")
    data_dir: str = setting("data", "where downloads and caches live")
    loader: Literal["auto", "resident", "ffcv"] = setting("auto", "data on the device, or streamed from .beton by FFCV")
    order: Literal["random", "pages"] = setting(
        "random", "of training images; pages: of the .beton file, for one larger than the memory"
    )
    augment: bool = setting(True, "random crop and flip, as each data set is used in the literature")
    randaugment: tuple[int, ...] | None = setting(
        None, "also N random operations of magnitude M (0 to 30) on each training image, as N,M: 2,9", _FROM_0
    )
    cutmix: float | None = setting(
        None,
        "a window of another image in each training image: alpha of lambda ~ Beta(alpha, alpha), such as 1",
        "(0, inf)",
    )
    normalize: bool = setting(False, "normalise by the training set's mean and deviation inside the model")
    image_size: int | None = setting(None, "resize image folders to this many pixels", "[1, 4096]")
    extra_data: str | None = setting(
        None, "also train on the images of this .npz file: image uint8 [N, H, W, C], label int64 [N]"
    )
    extra_ratio: float | None = setting(None, "share of each batch that is of --extra-data (default: 0.7)", "(0, 1)")
    limit_train: int | None = setting(None, "use only this many training images (stratified)", _COUNT)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N")
    threads: int | None = setting(
        None, "CPU threads (default: PyTorch's choice; 1 is best for small networks on a busy machine)", _COUNT
    )
    awp: float | None = setting(
        None,
        "gamma_w of adversarial weight perturbation, a share of each weight's norm (0.01 for AT, 0.005 for TRADES)",
        "(0, 1)",
    )
    awp_warmup: int = setting(0, "epochs without weight perturbation", _FROM_0)
    label_smoothing: float = setting(
        0.0, "share of the loss's targets that goes to all classes alike, such as 0.1; not of the attack's", "[0, 1)"
    )
    log_every: int | None = setting(
        None, "steps between reads of the device's metrics (default: 1 on a CPU, 50 on a GPU)", _COUNT
    )
    checkpoint_every: str | None = setting(
        None,
        "also save within an epoch, every so many steps (500) or so much time (90s, 10min, 2h), so that a kill loses "
        "no more (default: at each epoch's end, and when a signal ends the run)",
    )
    tensorboard: bool = setting(True, "write TensorBoard events")
    loggers: tuple[Literal["csv", "wandb", "mlflow"], ...] | None = setting(
        None, "also log epochs to these, with commas between: csv, wandb, mlflow"
    )
    early_stop: int | None = setting(
        None,
        "end after so many epochs without a new best on validation images, by the rule of the best checkpoint: PGD "
        "accuracy (default: train all epochs)",
        _COUNT,
    )
    diagnostics: bool = setting(
        False, "measure gradient similarity, BatchNorm statistics and representation distance; changes no other number"
    )
    attack: Attack = field(default_factory=Attack)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    swa_config: SwaConfig = field(default_factory=SwaConfig)

    def __post_init__(self) -> None:
        # Frozen for everybody else; a name, a dict or a class becomes a Defense here, from Python as from YAML.
        object.__setattr__(self, "defense", _build_defense(self.defense, "config"))
        for name, hint in hints_of(Config).items():
            part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
            if part and isinstance(value := getattr(self, name), dict):
                object.__setattr__(self, name, from_dict(value, hint, f"{name}."))
        if type(self.checkpoint_every) is int:  # YAML's, for a number of steps
            object.__setattr__(self, "checkpoint_every", str(self.checkpoint_every))
        settle(self)
        Pace(self.checkpoint_every)
        for name in ("dataset", "model", "out", "data_dir", "extra_data"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"{name}={value!r}: expected a name or path; leave it out for the default")
        if self.extra_ratio is not None and self.extra_data is None:
            raise UserError(f"extra_ratio={self.extra_ratio:g}: there are no extra images; name them with --extra-data")
        if self.batch_size < 2:
            raise UserError(
                f"batch_size={self.batch_size}: BatchNorm needs at least 2 images to normalise by; write --batch-size "
                "2 or more (128 is usual)"
            )
        recipe = dataclasses.replace(self.optim, recipe=self.optim.recipe or self.defense.recipe).schedule()
        for name, does in (("warmup", "warms up by itself"), ("momentum", "moves the momentum by itself")):
            if recipe.one_cycle and (value := getattr(self.optim, name)) is not None:
                raise UserError(
                    f"optim.{name}={value:g}: the recipe {self.optim.recipe or self.defense.recipe} {does}; leave it "
                    "out, or choose another --optim.recipe"
                )
        if self.epochs is not None and (self.optim.warmup or 0) > self.epochs:
            raise UserError(
                f"optim.warmup={self.optim.warmup} is longer than the run of {counted(self.epochs, 'epoch')}"
            )
        if self.epochs is not None and (marks := self.optim.milestones) and marks[-1] >= self.epochs:
            raise UserError(
                f"optim.milestones={','.join(map(str, marks))}: a run of {counted(self.epochs, 'epoch')} never "
                f"comes to the last of them; leave out what is {self.epochs} or more"
            )
        totals = (*(self.extended or ()), self.epochs or math.inf)
        if any(before >= after for before, after in itertools.pairwise(totals)):
            raise UserError(
                f"extended={','.join(map(str, totals[:-1]))} with epochs={self.epochs}: expected totals that grow, the "
                "last of them below epochs"
            )
        self._check_weight_perturbation()
        if self.early_stop is not None and self.eval.val_images == 0:
            raise UserError(
                f"early_stop={self.early_stop}: there are no validation images to stop by; give --eval.val-images, or "
                "leave --early-stop out"
            )
        self._check_targets()

    @property
    def fast(self) -> Fast:
        """The `Fast` among these fields."""
        return spec_of(Fast, self, {})

    def _check_targets(self) -> None:
        if self.randaugment is not None:
            RandAugment.of(self.randaugment)
        for name, value in (("label_smoothing", self.label_smoothing), ("cutmix", self.cutmix)):
            mixed = name == "cutmix"
            if value and (why := self.defense.why_hard(mixed=mixed, objective=self.attack.objective)):
                raise UserError(f"{name}={value:g}: {why}; leave it out, or choose another --defense")

    def _check_weight_perturbation(self) -> None:
        if self.awp is None and self.awp_warmup:
            raise UserError(
                f"awp_warmup={self.awp_warmup}: there is no weight perturbation to wait for; leave it out, or set --awp"
            )
        if self.awp is not None and not self.defense.attacks:
            raise UserError(
                f"awp={self.awp:g}: the defense {self.defense.name} has no attack, and the perturbation is of "
                "adversarial training; leave it out, or choose another --defense"
            )
        if self.awp is not None and self.epochs is not None and self.awp_warmup >= self.epochs:
            raise UserError(
                f"awp_warmup={self.awp_warmup}: weights would never be perturbed in a run of "
                f"{counted(self.epochs, 'epoch')}; write a smaller number, or leave --awp out"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a Config (or a part) into plain YAML values; `from_dict` gives back an equal object."""
    result: dict[str, Any] = {}
    for f in fields_of(config):
        value = getattr(config, f.name)
        if isinstance(value, Foreign):
            value = {"name": value.named, **value.settings}
        elif isinstance(value, Defense):
            # asdict would turn the defense into its fields alone, and lose which one it was.
            value = {"name": defense_key(value), **to_dict(value)}
        elif dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        result[f.name] = value
    return result


def from_dict(
    values: dict[str, Any], cls: type = Config, where: str = "", source: str = "config", *, code: bool = True
) -> Any:
    """Build a Config from plain values.

    code: whether a defense `FILE.py:CLASS` is imported, which runs the file. False for what nobody vouched for, such
    as the config of a run folder: the defense is then `Foreign`, its name and settings alone.
    Raises: UserError naming the key, what was expected and the nearest name.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: {where.rstrip('.') or 'the file'} must hold key: value lines, got {shown(values)}")
    hints, known = hints_of(cls), {f.name: f for f in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if cls is Config and name in _GONE:
            continue
        if name not in known:
            raise UserError(
                f"{source}: unknown key '{where}{key}'{nearest(name, known) or '.'} "
                f"Known here: {', '.join(sorted(known)) or 'none'}."
            )
        hint = hints[name]
        if hint is Defense:
            built[name] = _build_defense(value, source, code)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            built[name] = from_dict({} if value is None else value, hint, f"{where}{key}.", source, code=code)
        else:
            built[name] = coerce(value, hint, f"{where}{key}", source, known[name].metadata.get("help", ""))
    return cls(**built)


def _build_defense(value: Any, source: str, code: bool = True) -> Defense:
    if isinstance(value, Defense):
        return value
    if isinstance(value, type) and issubclass(value, Defense):
        return value()
    name, values = named_defense(value, source)
    if not code and name.lower() not in DEFENSES:
        return Foreign(named=name, settings=values)
    return from_dict(values, resolve_defense(name), "defense.", source)


def named_defense(value: Any, source: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the hyper-parameters that `trades` or {name: trades, beta: 6} stands for; nothing is run."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise UserError(
            f"{source}: defense={shown(value)}: expected a name, a mapping with `name`, or a Defense such as TRADES()"
        )
    values = dict(value)
    name = values.pop("name", ARAT.name)
    if not isinstance(name, str):
        raise UserError(f"{source}: defense.name={shown(name)}: expected a name, such as trades, or FILE.py:CLASS")
    return name, values


class _Loader(yaml.SafeLoader):
    """YAML without tags of Python's, whose mappings name a key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises: UserError for a missing file, bad syntax (naming its line) or another value.

    So too for what would take long: no ordinary file, one over 64 KiB, nested over 20 deep, or full of aliases.
    """
    named = str(path) if len(str(path)) < 500 else f"{str(path)[:60]}..."
    try:
        # A pipe would be waited for, for ever.
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"cannot read config {named}: expected an ordinary file")
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read config {named}: expected text in UTF-8 ({error.reason} at {error.start})"
        ) from error
    except (OSError, ValueError) as error:  # the second: a name that no file can have
        raise UserError(f"cannot read config {named}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path} is over {_MOST_BYTES:,} bytes: expected a config of a few key: value lines")
    try:
        _bounded(text, path)
        # YAML 1.1: `off` arrives as False and 1e-3, for want of a point, as text. `coerce` knows both.
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or _first(error)}") from error
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:  # a date such as 2020-99-99
        raise UserError(f"{path}: not valid YAML: a value that cannot be read ({_first(error)})") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected key: value lines, got a {type(values).__name__}")
    return values or {}


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _bounded(text: str, path: str | Path) -> None:
    """Raise UserError for YAML whose tree would be too deep, or too large for its text; nothing is built for it."""
    depth = aliases = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > 20 or aliases > 20:
            what = "is nested over 20 deep" if depth > 20 else "has over 20 aliases"
            raise UserError(f"{path} line {event.start_mark.line + 1}: {what}; expected key: value lines")


def write_yaml(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"attack.epsilon": v} -> {"attack": {"epsilon": v}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{key}: {parent} is a value already ({shown(node)}), not a group of settings")
        node[last] = value
    return tree


def _name(value: Any, below: dict[str, Any]) -> Any:
    return value.get("name", below.get("name")) if isinstance(value, dict) else value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` on top, mapping by mapping."""
    result = {str(k).replace("-", "_"): v for k, v in base.items()}
    if "amp" in over:
        result.pop("precision", None)  # --amp and --no-amp answer the same question, and a run's config states both
    for key, value in over.items():
        below = result.get(key)
        if key == "defense" and isinstance(below, str):
            below = {"name": below}
        if key == "defense" and isinstance(below, dict) and _name(value, below) != _name(below, below):
            below = None  # another defense's hyper-parameters do not carry over
        result[key] = merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result
