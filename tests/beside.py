"""The packages that people use beside this one, as they are installed, and what they lack to be imported here."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.resources import files
from types import ModuleType

import pyautoattack
import pytest
import torch
from pyautoattack.state import EvaluationState

EPSILON = 0.1  # of what is attacked, digits of 8x8
_OPERATORS: list[torch.library.Library] = []  # a library's operators go when it goes


def neighbour(name: str) -> ModuleType:
    """Import a package; without it the test is skipped, or fails where FASTARAT_REQUIRE_NEIGHBOURS=1."""
    try:
        _import_torchvision()
        return import_module(name)
    except Exception as error:
        if os.environ.get("FASTARAT_REQUIRE_NEIGHBOURS") == "1":
            raise
        pytest.skip(f"needs the neighbour {name} ({type(error).__name__}: {error}); make neighbours installs it")


def _import_torchvision() -> None:
    """Nearly all import torchvision, whose registry wheel is built for CUDA: a CPU build of torch cannot load its operators.

    It then fails on registering two that do not exist. They are declared here; none of a classifier's is among them.
    """
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return  # whoever needs it says so
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        _OPERATORS.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _OPERATORS[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


class Official(pyautoattack.AutoAttack):
    """The package `autoattack`, which no registry has: the same attacks, by the names that its callers use."""

    def __init__(
        self, model, norm="Linf", eps=0.3, seed=0, version="standard", device="cpu", log_path=None, **_
    ) -> None:
        super().__init__(model, norm=norm, eps=eps, seed=seed, version=version, device=device)

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        adversarial, _ = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
        return adversarial


def robustbench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import robustbench with what it imports and nobody has.

    `autoattack`; `pkg_resources`, which setuptools dropped; `gdown`, for downloads from a drive, which no test makes.
    """
    for name, content in {
        "autoattack": {"AutoAttack": Official},
        "autoattack.state": {"EvaluationState": EvaluationState},
        "pkg_resources": {"resource_filename": lambda package, path: str(files(package) / path)},
        "gdown": {},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return neighbour("robustbench")
