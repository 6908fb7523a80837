"""How fast a training step is on this machine: time by phase, TFLOP/s, share of the machine's own rate, memory.

The loop that is timed is the trainer's (resident loader, augmentation, step) on random images. What benchmarks/
shares with `fastarat bench` lives here: clocks, quartiles, counts of work, the description of the machine.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastarat.checks import settle, within
from fastarat.config import from_dict, resolve_defense
from fastarat.data import Augment, Batch, Loader, Split, make_loader
from fastarat.defenses import ARREST, CAAT, CURE, LBGAT, VIR, Defense
from fastarat.device import backend_flags, pick_device, usable_precision
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.kernels import why_not_triton
from fastarat.nets.models import build_model
from fastarat.runs import load_start
from fastarat.specs import Attack, Fast

FORMAT = 1
EPOCH_IMAGES = 50_000
"""Images of the epoch that times are given for: CIFAR-10's training set."""
H200_BF16 = 790e12
"""Dense bf16 matrix rate to expect of an H200, FLOP/s: a constant to hold results against, not measured here."""
_PHASES = ("data", "attack", "forward", "backward", "optimiser", "metrics")


# --- work -----------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Work a method needs per image, in forward passes F of the trained network, and of its teacher if it has one.

    A backward to the input counts 1 F, one that also makes weight gradients 2 F. Only what the method needs: work that
    an implementation wastes earns no credit. The attack's last input gradient reaches the stem; the training pass's
    stem gradient to the image, which nobody needs, is 0.3 % of a ResNet-18 and is counted all the same.
    """

    attack: float
    training: float
    teacher: float
    formula: str

    @property
    def forwards(self) -> float:
        """F per image of the trained network."""
        return self.attack + self.training


def cost_of(
    defense: Defense, *, num_steps: int = 10, num_restarts: int = 1, objective: str | None = None, awp: bool = False
) -> Cost:
    """Count what a step of `defense` needs per image.

    K attack steps are 2K (a forward and an input gradient each), times the restarts, of which each then also costs a
    forward to be compared; "kl" takes one forward for the clean logits. The training pass is 3 per batch that is sent
    forward and back. So AT is 2K + 3 = 23, AR-AT and MART 2K + 6 = 26, TRADES 2K + 1 + 6 = 27 for K = 10. A defense of
    your own is counted by its class constants; override nothing unless its forward or backward is its own.
    """
    forwards, backwards, teacher_forwards, teacher_backwards = _training_pass(defense)
    restarts = f"{num_restarts} x " if num_restarts > 1 else ""
    terms = []
    attack = 0
    if defense.attacks:
        attack = num_restarts * 2 * num_steps
        terms.append(f"{restarts}2 x {num_steps} attack")
        if (objective or defense.objective) == "kl":
            attack += 1
            terms.append("1 clean logits")
        if num_restarts > 1:
            attack += num_restarts
            terms.append(f"{num_restarts} to compare the restarts")
    training = forwards + 2 * backwards
    terms.append(f"{forwards} forward + 2 x {backwards} backward")
    if awp and defense.attacks:
        training *= 2
        terms.append("the same for AWP")
    teacher = teacher_forwards + 2 * teacher_backwards
    return Cost(attack, training, teacher, " + ".join(terms) + (f" (+ {teacher} of the teacher)" if teacher else ""))


def _training_pass(defense: Defense) -> tuple[int, int, int, int]:
    """Batches sent forward and back in the training pass; the teacher's."""
    if isinstance(defense, LBGAT):  # without the KL the clean batch only moves running statistics
        return 2, 2 if defense.beta else 1, 1, 1
    if isinstance(defense, ARREST):  # noisy replay looks at the clean representations
        return 1 if defense.phi is None else 2, 1, 1, 0
    if isinstance(defense, CURE):  # the score takes a gradient of each loss; the copy sees both halves
        return 2, 2 if defense.mode == "rgp" else 4, 2, 0
    if isinstance(defense, VIR) and defense.mode == "at":  # the clean logits only make weights
        return 2, 1, 0, 0
    batches = 2 if defense.needs_clean or isinstance(defense, (CAAT, VIR)) else 1
    return batches, batches, 0, 0


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Count multiplications and additions of `model`'s convolutions and linear layers on `images`, by hooks."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(count) for m in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def step_flops(step: TrainStep, example: Tensor, *, objective: str | None = None) -> tuple[float, Cost, int]:
    """Return FLOP per image of a training step by `cost_of`, that cost, and FLOP of one forward.

    example: float32 [1, C, H, W].
    """
    cost = cost_of(
        step.defense,
        num_steps=step.spec.num_steps,
        num_restarts=step.spec.num_restarts,
        objective=objective or step.spec.objective,
        awp=step.perturbation is not None,
    )
    # Copies: hooks and mode changes must not touch the network that is timed.
    flops = forward_flops(copy.deepcopy(step.model), example)
    teachers = [m for m in step.companions.children() if any(isinstance(c, nn.Conv2d) for c in m.modules())]
    of_teachers = sum(forward_flops(copy.deepcopy(m), example) for m in teachers) if cost.teacher else 0
    return cost.forwards * flops + cost.teacher * of_teachers, cost, flops


# --- clocks ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of one of `calls` calls: CUDA events on a GPU, the clock on the wall elsewhere.

    cpu_s: what the last measurement took of the process's CPU time, all threads together; 0 on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_s = 0.0

    def __call__(self, call: Callable[[], object], calls: int) -> float:
        if self.device.type != "cuda":
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call()
            took, self.cpu_s = time.perf_counter() - start, (time.process_time() - start_cpu) / calls
            return took / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def marks(self) -> Marks:
        return Marks(self.device)


class Marks:
    """Call it with a name when a phase has ended; `read` gives the seconds of each. No wait in between on CUDA.

    Marks set while a CUDA graph is being captured become nodes of it, and are set again by every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.start()

    def start(self) -> None:
        """Forget all marks, and begin the first phase here."""
        self.points: list[tuple[str, Any]] = []
        self("")

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            # External: only such an event is recorded at a replay, and can be timed from outside the graph.
            external = torch.cuda.is_current_stream_capturing()
            point = torch.cuda.Event(enable_timing=True, external=external)
            point.record()
        else:
            point = time.perf_counter()
        self.points.append((name, point))

    def read(self) -> Iterator[tuple[str, float]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, before), (name, after) in zip(self.points, self.points[1:], strict=False):
            yield name, before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before


def quartiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return {"q1", "median", "q3"} of `values`, each times `scale`."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"q1": low * scale, "median": middle * scale, "q3": high * scale}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def report_phases(step: TrainStep, mark: Callable[[str], None], start: Callable[[], None] = lambda: None) -> None:
    """Make `step` tell `mark` the ends of its phases; before its first call. start: called when a step begins."""
    step.mark = lambda phase: start() if phase == "start" else mark(phase)


# --- the machine ----------------------------------------------------------------------------------------------------


class Ceiling(NamedTuple):
    """Something that exercises the machine's matrix rate: call it, `amount` FLOP each time."""

    name: str
    call: Callable[[], object]
    amount: float


def matmul_ceiling(device: torch.device, *, small: bool = False) -> Ceiling:
    """A large matrix product in the machine's fast type: bf16 on a GPU that has it, float32 elsewhere.

    One denominator for every precision, so that shares compare. Random data: zeros draw less power and clock higher
    than any real network does.
    """
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dtype = torch.bfloat16 if fast else torch.float32
    n = 256 if small else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"matmul {n}x{n}x{n} {str(dtype).removeprefix('torch.')}"
    return Ceiling(name, lambda: torch.mm(a, b, out=out), 2.0 * n**3)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the numbers depend on: device, versions, threads, commit."""
    found: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ffcv": _version("ffcv"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["host"] = found["device"]
        found["device"] = torch.cuda.get_device_name(device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **_nvidia(device)}
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia(device: torch.device) -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm")
    if not shutil.which("nvidia-smi"):
        return {}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = ["-i", f"GPU-{uuid}"] if uuid else []
    query = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return {}
    values = done.stdout.strip().splitlines()[0].split(", ")
    return {f.replace(".", "_"): v for f, v in zip(fields, values, strict=False)}


def _commit() -> str | None:
    """The checkout this package runs from, or None for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not shutil.which("git") or not (root / "kernels").is_dir():
        return None

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain") else "")


class Event(NamedTuple):
    """One thing the profiler saw. kind: "kernel", "copy" (or fill) or "op". Times in microseconds."""

    kind: str
    name: str
    start_us: float
    took_us: float


def profiled(call: Callable[[], object], device: torch.device) -> list[Event]:
    """Run `call` under torch.profiler: on a GPU its kernels and copies, elsewhere its ATen ops (outermost ones)."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as prof:
        call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy"} if cuda else {"cpu_op": "op"}
    found, ends = [], {}
    for e in sorted((e for e in events if e.get("cat") in kinds), key=lambda e: (e["ts"], -e.get("dur", 0))):
        if not cuda:
            if not e["name"].startswith("aten::") or e["ts"] < ends.get(e["tid"], 0):
                continue
            ends[e["tid"]] = e["ts"] + e.get("dur", 0)
        found.append(Event(kinds[e["cat"]], e["name"], float(e["ts"]), float(e.get("dur", 0))))
    return found


def launches(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Count what one `call` starts: {"kernels", "copies"} on a GPU (a graph's are counted too), {"ops"} elsewhere."""
    kinds = [e.kind for e in profiled(call, device)]
    if device.type == "cuda":
        return {"kernels": kinds.count("kernel"), "copies": kinds.count("copy")}
    return {"ops": len(kinds)}


def peak_memory(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Memory the process holds at most while `call` runs, weights, optimiser state and graphs included."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()  # what autotuning and warming up left behind
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return {
            "method": "CUDA caching allocator: bytes reserved at most, after its cache was emptied",
            "peak_bytes": torch.cuda.max_memory_reserved(device),
        }
    try:
        import resource
    except ImportError:
        return {"method": "not measured on this system", "peak_bytes": None}
    call()
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"method": "resident bytes of the whole process at most since it began", "peak_bytes": peak}


# --- fastarat bench -------------------------------------------------------------------------------------------------


def _f(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What `bench` measures. Fields that `Config` has too mean the same."""

    defense: str = _f("ar-at", "defenses, comma-separated, as in fastarat train")
    model: str = _f("resnet18", "network, as in fastarat train")
    batch_size: int | None = _f(None, "images per step (default: 128; 16 on a CPU)")
    image_size: int = _f(32, "pixels of each side of the random images")
    num_classes: int = _f(10, "classes")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] | None = _f(None, "default: bf16 on a GPU, fp32 on a CPU")
    amp: bool | None = _f(None, "short for --precision bf16, where the hardware has it; --no-amp for fp32")
    device: str = _f("auto", "auto, cpu, cuda, cuda:N")
    channels_last: bool = _f(True, "memory format of images and weights")
    kernels: Literal["auto", "triton", "plain"] = _f("auto", "fused Triton kernels or their plain twins")
    capture: Literal["auto", "on", "off", "fake"] = _f("auto", "replay the whole step as one CUDA graph")
    compile_loss: bool = _f(False, "torch.compile the loss")
    fold_bn: bool = _f(True, "in eval-mode attacks, fold BatchNorm into the convolutions once per step")
    awp: float | None = _f(None, "gamma_w of adversarial weight perturbation")
    repeats: int | None = _f(None, "samples (default: 20; 5 on a CPU)")
    steps: int | None = _f(None, "steps per sample (default: half a second's worth)")
    threads: int | None = _f(None, "CPU threads of PyTorch (default: its own choice)")
    attack: Attack = field(default_factory=Attack)

    def fast(self, precision: str) -> Fast:
        """The `Fast` among these fields, in `precision`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Fast) if hasattr(self, f.name)}
        return Fast(**own | {"precision": precision})

    def __post_init__(self) -> None:
        if isinstance(self.attack, dict):
            object.__setattr__(self, "attack", from_dict(self.attack, Attack, "attack.", "bench"))
        settle(self)
        if self.awp is not None:
            within("awp", self.awp, "(0, 1)", "a share of each weight's norm, such as 0.005")
        for name, least in (
            ("batch_size", 2),
            ("image_size", 1),
            ("repeats", 1),
            ("steps", 1),
            ("threads", 1),
            ("num_classes", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")


def bench(
    config: BenchConfig | None = None,
    defenses: Sequence[Defense] | None = None,
    *,
    command: str = "",
    on_result: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure training steps on random images.

    Args:
        config: default `BenchConfig()`: AR-AT, ResNet-18, 32x32.
        defenses: replace those `config` names.
        command: kept in the record.
        on_result: called with the record so far after each defense.
    Returns: the record: machine, config, and per defense all samples, medians and quartiles.
    Raises: UserError for what cannot be measured.
    """
    config = config or BenchConfig()
    if defenses is None:
        defenses = [resolve_defense(name.strip())() for name in config.defense.split(",")]
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.threads:
        torch.set_num_threads(config.threads)
    cuda = device.type == "cuda"
    config = dataclasses.replace(
        config,
        batch_size=config.batch_size or (128 if cuda else 16),
        precision=asked_precision(config, cuda=cuda),
        repeats=config.repeats or (20 if cuda else 5),
    )
    record: dict[str, Any] = {
        "format": FORMAT,
        "kind": "bench",
        "command": command,
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": "random images",
        "machine": machine(device),
        "config": dataclasses.asdict(config),
        "results": [],
    }
    precision, note = usable_precision(config.precision, device)
    with backend_flags(device, precision):
        for defense in defenses:
            record["results"].append(_measured(config, defense, device, precision) | {"precision_note": note})
            on_result(record)
    return record


def asked_precision(config: BenchConfig, *, cuda: bool) -> str:
    """Return the precision asked for: `--amp` turns fp32 into bf16 and nothing else, as in `fastarat train`."""
    if config.amp and config.precision in (None, "fp32"):
        return "bf16"
    return config.precision or ("bf16" if cuda and config.amp is None else "fp32")


def random_split(count: int, shape: tuple[int, int, int], num_classes: int) -> Split:
    """Return random uint8 images and labels as a training split. shape: (C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape[1:], shape[0]), dtype=torch.uint8, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return Split(pixels, labels, torch.arange(count), shape)


def make_step(config: BenchConfig, defense: Defense, device: torch.device, precision: str) -> TrainStep:
    """Build the step that `config` describes; `config.batch_size` and `.precision` are not read."""
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=config.num_classes, image_size=config.image_size).to(device)
    load_start(defense, model)
    return TrainStep(
        model,
        defense,
        torch.empty(2, 3, config.image_size, config.image_size),
        attack=config.attack,
        fast=config.fast(precision),
        awp=config.awp,
    )


def _forever(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def _measured(config: BenchConfig, defense: Defense, device: torch.device, precision: str) -> dict[str, Any]:
    gc.collect()  # the step before this one, and its graphs
    clock = Clock(device)
    size = config.batch_size
    split = random_split(size * (64 if device.type == "cuda" else 4), (3, *[config.image_size] * 2), config.num_classes)
    loader = make_loader(
        split, batch_size=size, device=device, kind="resident", shuffle=True, augment=Augment(4, True), drop_last=True
    )
    batches = _forever(loader)

    started = time.perf_counter()
    step = make_step(config, defense, device, precision)

    def once() -> None:
        batch = next(batches)
        step.set_lr(0.01)
        step.forward.progress.fill_(0.5)
        step(batch.images, batch.labels)

    for _ in range(2):
        once()
    synchronize(device)
    warmup_s = time.perf_counter() - started

    took = clock(once, 2)
    steps = config.steps or max(1, math.ceil(0.5 / took))
    ceiling = matmul_ceiling(device)
    peak_calls = max(1, math.ceil(0.02 / min(clock(ceiling.call, 1) for _ in range(3))))
    samples: dict[str, list[float]] = {"loop": [], "matmul": []}
    for _ in range(config.repeats):
        samples["matmul"].append(clock(ceiling.call, peak_calls))
        samples["loop"].append(clock(once, steps))
    memory = peak_memory(once, device)
    counts = launches(once, device)
    data = _data_samples(batches, clock, config.repeats)
    phases, phases_of = _phase_samples(config, defense, device, precision)

    flops, cost, forward = step_flops(step, torch.zeros(1, *split.shape, device=device))
    rates = [ceiling.amount / s for s in samples["matmul"]]
    work = flops * size
    name = defense.name or type(defense).__name__
    return {
        "defense": name,
        "what": f"{name}, {config.model}, {size} images {config.image_size}x{config.image_size}, "
        f"PGD-{config.attack.num_steps}, {precision}",
        "precision": precision,
        "captured": not step.why_eager,
        "why_eager": step.why_eager,
        "fast_paths": _fast_paths(config, step, device),
        "cost": cost._asdict() | {"forwards": cost.forwards, "forward_flop": forward, "flop_per_image": flops},
        "repeats": config.repeats,
        "steps_per_sample": steps,
        "warmup_s": warmup_s,
        "samples_s": samples,
        "data_samples_s": data,
        "phase_samples_s": phases,
        "phases_of": phases_of,
        "ms": quartiles(samples["loop"], 1e3),
        "epoch_s": quartiles(samples["loop"], EPOCH_IMAGES / size),
        "images_per_s": quartiles([size / s for s in samples["loop"]]),
        "tflops": quartiles([work / s / 1e12 for s in samples["loop"]]),
        "peak": {"name": ceiling.name, "tflops": quartiles(rates, 1e-12)},
        "mfu": quartiles([work / s / r for s, r in zip(samples["loop"], rates, strict=True)]),
        "phase_ms": {"data": quartiles(data, 1e3)} | {name: quartiles(v, 1e3) for name, v in phases.items()},
        "memory": memory,
        "launches": counts,
    }


def _data_samples(batches: Iterator[Batch], clock: Clock, repeats: int) -> list[float]:
    clock(lambda: next(batches), 1)
    return [clock(lambda: next(batches), 4) for _ in range(repeats)]


def _phase_samples(
    config: BenchConfig, defense: Defense, device: torch.device, precision: str
) -> tuple[dict[str, list[float]], str]:
    """Time the phases of a step like the measured one, each of its marks a node of the graph if it is captured."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(config.num_classes, shape[:1], generator=generator, device=device)
    reason = ""
    for capture in dict.fromkeys((config.capture, "off")):
        step = make_step(dataclasses.replace(config, capture=capture), defense, device, precision)
        marks = Marks(device)
        report_phases(step, marks, marks.start)
        samples: dict[str, list[float]] = {}
        try:
            for number in range(-2, config.repeats):
                step(images, labels)
                # Read after each step: a replay sets the same marks again.
                for phase, seconds in marks.read():
                    if number >= 0:
                        samples.setdefault(phase, []).append(seconds)
        except (RuntimeError, UserError) as error:
            if capture == "off":
                raise
            reason = f" (marks inside the graph failed: {str(error).splitlines()[0]})"
            continue
        return samples, ("the same step uncaptured" + reason) if step.why_eager else "the captured step"
    raise AssertionError("an eager step has phases")


def _fast_paths(config: BenchConfig, step: TrainStep, device: torch.device) -> list[str]:
    found = ["channels-last"] if config.channels_last else []
    if config.kernels != "plain" and why_not_triton(device) is None:
        found.append("Triton kernels")
    if step.attacker.folds:
        found.append("BatchNorm folded in the attack")
    if not step.why_eager:
        found.append("fake capture" if config.capture == "fake" else "one CUDA graph")
    if config.compile_loss:
        found.append("compiled loss")
    return found


def render(record: dict[str, Any]) -> str:
    """Return a record of `bench` as a table for a terminal: medians, and quartiles in brackets."""
    where = record["machine"]
    lines = [
        f"{where['device']}, torch {where['torch']}"
        + ("" if "driver_version" in where else f", {where['threads']} threads")
        + f"; {record['data']}",
    ]
    for r in record["results"]:
        rows = {
            "": r["what"],
            "precision": r["precision_note"],
            "fast paths": ", ".join(r["fast_paths"]) or "none",
            "captured": "yes" if r["captured"] else f"no: {r['why_eager']}",
            f"epoch of {EPOCH_IMAGES:,} images": cell(r["epoch_s"]) + " s",
            "step": cell(r["ms"]) + " ms, data included",
            "images/s": cell(r["images_per_s"]),
            "work": f"{r['cost']['forwards']:g} forwards per image = {r['cost']['formula']}; "
            f"{r['cost']['flop_per_image'] / 1e9:.3g} GFLOP",
            "TFLOP/s": cell(r["tflops"]),
            "machine's rate": f"{cell(r['peak']['tflops'])} TFLOP/s, {r['peak']['name']}, in the same run",
            "MFU": f"{r['mfu']['median']:.1%} ({r['mfu']['q1']:.1%} to {r['mfu']['q3']:.1%})",
            "phases": f"of {r['phases_of']}",
            **{f"  {name}": cell(r["phase_ms"][name]) + " ms" for name in _PHASES if name in r["phase_ms"]},
            "peak memory": "not measured"
            if r["memory"]["peak_bytes"] is None
            else f"{r['memory']['peak_bytes'] / 2**20:,.0f} MiB ({r['memory']['method']})",
            "per step": ", ".join(f"{n:,} {kind}" for kind, n in r["launches"].items()),
            "before the first timed step": f"{r['warmup_s']:.1f} s (building, compiling, autotuning, capturing)",
        }
        if "H200" in where["device"]:
            rows["share of 790 TFLOP/s"] = f"{r['tflops']['median'] * 1e12 / H200_BF16:.1%} (an H200's usual rate)"
        width = max(map(len, rows))
        lines += ["", *(f"{key:<{width}}  {value}" for key, value in rows.items())]
    return "\n".join(lines)


def cell(q: dict[str, float]) -> str:
    """Format quartiles: median (q1 to q3), with as many digits as they deserve."""
    style = ",.0f" if abs(q["median"]) >= 100 else ".3g"
    return f"{q['median']:{style}} ({q['q1']:{style}} to {q['q3']:{style}})"


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write JSON whole or not at all, so that a run stopped by the clock leaves its last complete state."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(record, indent=1) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
