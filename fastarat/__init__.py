"""fastarat: fast, faithful adversarial training for image classifiers.

A public name is imported at its first use: `fastarat --version` needs no PyTorch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastarat import attacks as attacks, losses as losses
    from fastarat.ablation import ablate as ablate
    from fastarat.callbacks import Callback as Callback, CallbackError as CallbackError, StepInfo as StepInfo
    from fastarat.config import Config as Config
    from fastarat.defenses import (
        ARAT as ARAT,
        ARREST as ARREST,
        AT as AT,
        CAAT as CAAT,
        CURE as CURE,
        DEFENSES as DEFENSES,
        DONE as DONE,
        FAT as FAT,
        GAIRAT as GAIRAT,
        GAIRFAT as GAIRFAT,
        LBGAT as LBGAT,
        MART as MART,
        TRADES as TRADES,
        VIR as VIR,
        Defense as Defense,
        Standard as Standard,
        Views as Views,
    )
    from fastarat.engine import TrainStep as TrainStep, capture as capture
    from fastarat.errors import UserError as UserError
    from fastarat.evaluation import Evaluation as Evaluation, evaluate as evaluate
    from fastarat.nets.batchnorm import (
        SplitBatchNorm2d as SplitBatchNorm2d,
        branch as branch,
        split_batchnorm as split_batchnorm,
    )
    from fastarat.nets.models import build_model as build_model
    from fastarat.results import Result as Result, load_run as load_run
    from fastarat.specs import Attack as Attack, Fast as Fast
    from fastarat.training import train as train

    __version__: str
else:  # out of a type checker's sight, which would take any name for one that `__getattr__` knows
    from importlib import import_module

    _NAMES = {
        "ablation": "ablate",
        "callbacks": "Callback CallbackError StepInfo",
        "config": "Config",
        "defenses": "ARAT ARREST AT CAAT CURE DEFENSES DONE FAT GAIRAT GAIRFAT LBGAT MART TRADES VIR Defense Standard "
        "Views",
        "engine": "TrainStep capture",
        "errors": "UserError",
        "evaluation": "Evaluation evaluate",
        "nets.batchnorm": "SplitBatchNorm2d branch split_batchnorm",
        "nets.models": "build_model",
        "results": "Result load_run",
        "specs": "Attack Fast",
        "training": "train",
    }
    _HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
    __all__ = sorted([*_HOME, "attacks", "losses"])

    def __getattr__(name):
        if name == "__version__":
            return _version()
        if name in _HOME:
            # Kept, so that the next look-up is an ordinary one. No submodule has a public name's name: importing it
            # would put the module in the function's place.
            value = globals()[name] = getattr(import_module(f"fastarat.{_HOME[name]}"), name)
            return value
        if not name.startswith("_"):
            try:
                return import_module(f"fastarat.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"fastarat.{name}":
                    raise
        raise AttributeError(f"module 'fastarat' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, "__version__"})

    def _version() -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fastarat")
        except PackageNotFoundError:  # a checkout that was never installed
            return "0+unknown"
