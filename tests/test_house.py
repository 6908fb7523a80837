"""The house rules: sizes, whose names are whose, and nothing set for the whole process that outlives the call."""

import ast
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import small
import torch

import fastarat
from fastarat.bench import BenchConfig, bench

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("fastarat", "kernels", "benchmarks", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]
MOST = {"file": 450, "class": 250, "function": 60}
# Longer for a reason that is written beside it.
_POINTERS = "a kernel's pointers, one to a line, are more than half of it"
REASONED = dict.fromkeys(
    ("_cooperative_forward_kernel", "_cooperative_backward_kernel", "_join_sums_kernel"), _POINTERS
)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_nothing_is_longer_than_a_head_can_hold():
    too_long = []
    for path in FILES:
        sizes = [("file", path.stem, len(path.read_text().splitlines()))]
        for node in ast.walk(parsed(path)):
            kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
            if kind:
                sizes.append((kind, node.name, node.end_lineno - node.lineno + 1))
        too_long += [
            f"{path}: {kind} {name}, {n} lines" for kind, name, n in sizes if n > MOST[kind] and name not in REASONED
        ]
    assert not too_long


def test_no_private_name_crosses_a_file():
    """NamedTuple's methods, torch's multi-tensor calls and what a subclass or a twin of theirs reads are public."""
    public = ("_asdict", "_replace", "_fields", "_foreach_", "_actions", "_parameters", "_modules")
    # PyTorch has no other way to ask whether there are any, and whether a tensor was written.
    public += ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_version", "_global_")
    crossing = []
    for path in FILES:
        tree = parsed(path)
        nodes = list(ast.walk(tree))
        own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for n in nodes:
            names = []
            if isinstance(n, ast.ImportFrom) and (n.level or (n.module or "").startswith(("fastarat", "benchmarks"))):
                names = [alias.name for alias in n.names]
            elif isinstance(n, ast.Attribute) and n.attr not in own and not ast.unparse(n).startswith("torch."):
                names = [n.attr]
            private = [name for name in names if name.startswith("_") and not name.startswith(("__", *public))]
            crossing += [f"{path.relative_to(ROOT)}:{n.lineno} {name}" for name in private]
    assert not crossing


def settings() -> dict[str, object]:
    """What a call could leave changed for the whole process."""
    b = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (b.cudnn.benchmark, b.cudnn.benchmark_limit, b.cudnn.deterministic, b.cudnn.allow_tf32),
        "precision": (b.cuda.matmul.fp32_precision, b.cudnn.conv.fp32_precision, b.mkldnn.matmul.fp32_precision),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


def trained(tmp_path):
    return small.trained(tmp_path / "run", limit_train=64, epochs=1, device="cpu", threads=3, amp=True, swa=True)


def measured(tmp_path):
    config = BenchConfig(model="resnet-small", image_size=8, batch_size=4, repeats=1, steps=1, threads=3, device="cpu")
    return bench(config)


def evaluated(tmp_path):
    with torch.random.fork_rng([]):
        data = torch.rand(8, 1, 8, 8), torch.arange(8)
        model = fastarat.build_model("resnet-small", num_classes=10, in_channels=1, image_size=8)
    return fastarat.evaluate(model, data, "clean,pgd-1,apgd-ce", progress=False)


@pytest.mark.parametrize("call", [trained, measured, evaluated])
def test_no_setting_outlives_the_call_that_made_it(call, tmp_path):
    call(tmp_path / "first")  # what is imported by the way may set its own things, once
    before = settings()
    call(tmp_path / "second")
    after = settings()
    assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}
