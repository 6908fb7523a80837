"""Who runs in the ladder: the released structure, then our step with each fast path added to the ones before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from fastarat.kernels import why_not_fold, why_not_triton

from benchmarks import gates, plain
from benchmarks.gates import PLAINEST, Setup, engine_step, released_loop
from fastarat.bench.harness import (
    Call,
    Clock,
    Contestant,
    count_launches,
    peak_memory,
    profiled,
    quartiles,
    warmed,
)
from fastarat.device import bf16_support
from fastarat.specs import Fast

MATRIX = [
    "ar-at:resnet18:128",
    "trades:resnet18:128",
    "ar-at:resnet18:512:short",
    "at:resnet18:128:short",
    "at-eval:resnet18:128:short",
    "ar-at:resnet18:256:short",
    "ar-at:preactresnet18:128:short",
    "ar-at:wrn-34-10:128:short",
    "trades:wrn-34-10:128:short",
]
"""Setups of the ladder, most informative first: a time budget cuts from the end."""


class Predicted(NamedTuple):
    """ms per step a speed-up should save: a prediction from arithmetic, for one H200, ResNet-18, batch 128, PGD-10.

    item: its number in the ranked list of speed-ups the predictions come from. low, high: None where the list gives
    no number of its own. note: what the prediction assumes.
    """

    item: int
    low: float | None
    high: float | None
    note: str = ""


def predictions_hold(setup: Setup) -> bool:
    return (setup.model, setup.batch_size, setup.num_steps) == ("resnet18", 128, 10)


PREDICTED = {
    "step": Predicted(6, 0.4, 0.4, "one forward on [clean; adv]; host reads go with item 1"),
    "channels-last": Predicted(2, None, None, "counted with bf16"),
    "bf16": Predicted(2, 23, 23, "of device time, channels-last included; an eager host may hide it"),
    "triton": Predicted(3, 3.6, 3.6, "once the host is out of the way"),
    "graph": Predicted(1, 13, 13, "more on a slow host"),
    "fold": Predicted(14, 4.3, 4.3),
    "compile": Predicted(16, 0.05, 0.1),
}
# Most telling first, not in the ladder's order: a time budget ends the building, and half a ladder should say the
# most.
_BUILT_FIRST = ("graph", "released", "bf16", "step", "triton", "fold", "channels-last", "compile")
_COMPILING_S = 45


@dataclass(frozen=True)
class Rung:
    """One form of the step. fast: None is the released structure. skipped: why it is not there."""

    name: str
    adds: str
    fast: Fast | None
    skipped: str = ""


def rungs(setup: Setup) -> list[Rung]:
    """Return the ladder of `setup`: each rung has all fast paths of the one before."""
    cuda = setup.device != "cpu"
    fast = replace(PLAINEST, precision="tf32" if cuda else "fp32")
    no_loop = "" if setup.model in gates.PLAIN_MODELS else f"no loop of the {plain.STRUCTURE} for {setup.model}"
    adds = "NCHW, PyTorch's defaults, a forward per batch, host reads, input gradients in the attack"
    found = [Rung("released", f"{plain.STRUCTURE}: {adds}", None, no_loop)]

    def add(name: str, adds: str, skipped: str | None = None, **changes: Any) -> None:
        nonlocal fast
        fast = fast if skipped else replace(fast, **changes)
        found.append(Rung(name, adds, fast, skipped or ""))

    add("step", "our step, eager: one forward on [clean; adv], no host reads")
    add("channels-last", "channels-last", channels_last=True)
    able, why = bf16_support(setup.device)
    add("bf16", "bf16 with weights cast once per step", "" if able else why, precision="bf16")
    fused = "fused BN + add + ReLU, PGD update and stem gradient in Triton"
    add("triton", fused, why_not_triton(setup.device), kernels="auto")
    if cuda or not setup.dry:
        add("graph", "the whole step as one CUDA graph", "" if cuda else "a CPU has no CUDA graphs", capture="on")
    else:
        add("graph", "fake capture in place of a CUDA graph", capture="fake")
    if setup.attack_bn == "eval":
        why_not = why_not_fold(setup.device, torch.bfloat16 if fast.precision == "bf16" else torch.float32)
        add("fold", "BatchNorm folded into the attack's convolutions", why_not, fold_bn=True)
    compiles = "" if cuda else "compiling for a CPU takes longer than it can save"
    add("compile", "compiled loss", compiles, compile_loss=True)
    return [r for r in found if not setup.short or r.name in ("triton", "graph", "fold")]


def _call(setup: Setup, fast: Fast | None) -> Call:
    batch = gates.random_batch(setup)
    if fast is None:
        loop = released_loop(setup)
        return lambda: loop(batch.images.clone(), batch.labels)  # AR-AT's leaves its noise in the batch
    return partial(engine_step(setup, fast), batch.laid_out(fast.channels_last), batch.labels)


def count_rungs(
    setup: Setup, results: Sequence[dict[str, Any]], deadline: float, on_counted: Callable[[], None]
) -> None:
    """Count what one step of each timed rung starts, run eagerly, once nothing is left to be timed in this process.

    results: the record's rungs. deadline: of time.monotonic(); after it none is counted.
    """
    device, fasts = torch.device(setup.device), {rung.name: rung.fast for rung in rungs(setup)}
    counted: dict[Fast | None, dict[str, Any]] = {}
    for result in results:
        if "ms" not in result:
            continue
        fast = fasts[result["name"]]
        eager = fast and replace(fast, capture="off")
        if eager not in counted:  # a graph starts what its step starts: one count serves both
            if time.monotonic() > deadline:
                return
            counted[eager] = count_launches(partial(_call, setup, eager), device)
        result |= counted[eager]
        on_counted()


def profile_step(setup: Setup, found: dict[str, Any], on_timed: Callable[[], None]) -> None:
    """Time an eager step with all fast paths on, then list what it starts, by name, into `found`.

    on_timed: called between the two, when the times are in `found`.
    """
    device = torch.device(setup.device)
    on = [rung.fast for rung in rungs(replace(setup, short=False)) if rung.fast and not rung.skipped]
    fast = replace(on[-1], capture="off", compile_loss=False)
    found["what"] = f"{setup.defense}, {setup.model}, {setup.batch_size} images, PGD-{setup.num_steps}, eager"
    found["fast"] = asdict(fast)
    call, seconds = warmed(partial(_call, setup, fast), device)
    clock = Clock(device)
    found |= seconds | {"ms": quartiles([clock(call, 1) for _ in range(5)], 1e3)}
    on_timed()
    names: dict[tuple[str, str], dict[str, Any]] = {}
    for one in profiled(call, device):
        row = names.setdefault((one.kind, one.name), {"kind": one.kind, "name": one.name, "count": 0, "us": 0.0})
        row["count"] += 1
        row["us"] += one.us
    found["kernels"] = sorted(names.values(), key=lambda row: -row["us"])


def rung_contestant(setup: Setup, rung: Rung) -> Contestant:
    """Make a rung run on one batch of random images that rests on the device."""
    device = torch.device(setup.device)
    cuda, before = device.type == "cuda", 0

    def build() -> Call:
        nonlocal before
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
        return _call(setup, rung.fast)

    def after(result: dict[str, Any], call: Call) -> None:
        result["memory"] = {"method": "not measured: all rungs share one process", "peak_bytes": None}
        if cuda:
            memory = peak_memory(call, device)
            result["memory"] = memory | {"peak_bytes": memory["peak_bytes"] - before}
        clock = Clock(device)
        result["alone_ms"] = quartiles([clock(call, 1) for _ in range(3)], 1e3)

    return Contestant(
        rung.name,
        build,
        lambda: gates.check_rung(setup, rung.fast),
        after,
        skipped=rung.skipped,
        # Inductor may take most of a minute, and the rounds of the others must still fit.
        least_s=_COMPILING_S if rung.name == "compile" and not setup.dry else 0,
        order=_BUILT_FIRST.index(rung.name),
    )
