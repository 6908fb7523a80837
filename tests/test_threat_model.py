"""The threat model is the one asked for: every public entry takes the same names and refuses the same mistakes."""

import dataclasses
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from small import batch, small_model as network
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastarat
from fastarat import UserError, losses, specs
from fastarat.attacks import PGD, pgd, random_start, strongest
from fastarat.bench import BenchConfig
from fastarat.checks import check_images
from fastarat.config import Config, EvalConfig, OptimConfig, SwaConfig, from_dict, to_dict
from fastarat.device import readable
from fastarat.evaluation import adversarial_examples, evaluate
from fastarat.specs import Attack
from fastarat.values import coerce, named, settle, within

K = 4


def train_step(images, labels, **options):
    step = fastarat.TrainStep(network(), fastarat.AT(), batch()[0], **{"epsilon": 0.1, "num_steps": 2} | options)
    step(images, labels)
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def pgd_class(images, labels, **options):
    return PGD(network(), **{"epsilon": 0.1, "num_steps": 2} | options)(images, labels).images


TWO_STEPS = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 2}


def pgd_function(images, labels, **options):
    return pgd(network().eval(), images, labels, labels, images, **TWO_STEPS | options).images


def start(images, labels, **options):
    return random_start(images, generator=torch.Generator().manual_seed(3), **{"epsilon": 0.1} | options)


def several(images, labels, **options):
    model = network().eval()
    objective = options.pop("objective", "ce")
    runs = [partial(pgd, model, images, labels, labels, images, **TWO_STEPS | options)] * 2
    return strongest(model, runs, labels, objective).images


def evaluated(images, labels, **options):
    options = {"epsilon": 0.1} | options
    return evaluate(network(), (images, labels), "clean,pgd-2", progress=False, **options).max_perturbation


def examples(images, labels, **options):
    return adversarial_examples(network(), images, labels, **{"epsilon": 0.1, "num_steps": 2} | options)


def attack_config(images, labels, **options):
    return Attack(**options)


def config(images, labels, **options):
    return Config(attack=options)


def bench_config(images, labels, **options):
    return BenchConfig(attack=options)


TENSORS = (train_step, pgd_class, pgd_function, start, several, evaluated, examples)
CONFIGS = (attack_config, config, bench_config)
ALL = TENSORS + CONFIGS
STEPPED = tuple(e for e in ALL if e is not start)
COUNTED = tuple(e for e in STEPPED if e is not evaluated)
SEEDED = (evaluated, examples, train_step)
BY_TENSOR = (pgd_class, pgd_function, start, several)


def refused(entry, words: str, change=lambda images, labels: (images, labels), **options) -> None:
    with pytest.raises(UserError, match=words) as error:
        entry(*change(*batch()), **options)
    assert "\n" not in str(error.value)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def cases(table) -> list:
    """A case for each entry and each value of the rows (entries, option, values, what comes of them)."""
    return [
        pytest.param(entry, option, value, outcome, id=f"{entry.__name__} {option}={value}")
        for entries, option, values, outcome in table
        for value in values
        for entry in entries
    ]


# Other spellings, and the canonical one.
NAMES = [
    (ALL, "norm", ("Linf", "L_inf", "l-inf", "LINF", "inf", "Linfinity", float("inf"), np.inf, "L∞"), "linf"),
    (ALL, "norm", ("L2", "l_2", "2", 2, 2.0, np.int64(2)), "l2"),
    ((train_step, pgd_class), "precision", ("float32", "FP32", "torch.float32", torch.float32), "fp32"),
    ((train_step, pgd_class), "precision", ("BF16", "bfloat16", torch.bfloat16), "bf16"),
    ((pgd_class, pgd_function, several, train_step), "objective", ("CE", "cross-entropy"), "ce"),
    ((pgd_class, pgd_function, several, train_step), "objective", ("CW", "Cw"), "cw"),
    ((pgd_class, train_step), "objective", ("KL", "Kl"), "kl"),
    ((train_step,), "attack_bn", ("Train-Frozen", "train_frozen", "TRAIN FROZEN"), "train-frozen"),
    ((pgd_class,), "mode", ("Eval", "EVAL"), "eval"),
    ((pgd_class, train_step), "start", ("Gaussian",), "gaussian"),
    ((pgd_class, train_step), "start", ("None", "NONE"), "none"),
    ((start,), "kind", ("uniform_unclamped", "Uniform-Unclamped"), "uniform-unclamped"),
    ((pgd_class, pgd_function), "backend", ("Plain",), "plain"),
    ((train_step,), "kernels", ("Plain",), "plain"),
    ((train_step,), "capture", ("off", "OFF"), False),
    (CONFIGS, "bn", ("Train_Frozen",), "train-frozen"),
    (CONFIGS, "objective", ("KL",), "kl"),
    (CONFIGS, "start", ("Uniform-Unclamped",), "uniform-unclamped"),
    (CONFIGS, "start", ("None",), "none"),
]
SWITCHES = [
    *(((train_step,), switch) for switch in ("channels_last", "compile_loss", "fold_bn")),
    ((evaluated,), "tf32"),
    ((pgd_class, pgd_function), "count"),
]
TAKEN = [
    *NAMES,
    *((entries, switch, ("no",), False) for entries, switch in SWITCHES),
    (ALL, "epsilon", ("8/255",), 8 / 255),
    (BY_TENSOR, "epsilon", (torch.tensor(0.125),), 0.125),
    ((pgd_class, pgd_function, several), "step_size", (torch.tensor(0.0625),), 0.0625),
    (COUNTED, "num_steps", ("2", np.float32(2), Fraction(4, 2)), 2.0),
    (SEEDED, "seed", (str(2**63 - 1),), 2**63 - 1),
    ((evaluated,), "device", ("auto", torch.device("cpu")), "cpu"),
]


@pytest.mark.parametrize(("entry", "option", "value", "meaning"), cases(TAKEN))
def test_what_is_meant_is_taken_by_every_entry(entry, option, value, meaning):
    assert same(entry(*batch(), **{option: value}), entry(*batch(), **{option: meaning}))


@pytest.mark.parametrize("entry", TENSORS)
def test_the_norms_differ(entry):
    assert not same(entry(*batch(), norm="l2"), entry(*batch(), norm="linf"))


# A length in other units, and what is said of it; 8/255 is what is proposed for epsilon.
LENGTHS = [
    ("eight", r"='eight': expected a number \(fractions such as 8/255"),
    (8, r"=8 is outside \(0, 1\]: pixel units where 1.0 is the full range; write 8/255$"),
    (255.0, r"=255 is outside \(0, 1\].*write 255/255$"),
    (300, r"=300 is outside \(0, 1\].*, such as 8/255$"),
    (0, r"=0 is outside \(0, 1\].*, such as 8/255$"),
    (-0.1, r"=-0.1 is outside \(0, 1\].*, such as 8/255$"),
    (math.inf, r"=inf is outside \(0, 1\].*, such as 8/255$"),
    (math.nan, "=nan: expected a number"),
    (True, "=True: expected a number"),
    ([0.1], r"=\[0.1\]: expected a number"),
]
NOT_WHOLE = (2.5, "ten", math.inf, True, np.float32(2.7), np.float64(2.5), torch.tensor(2.9), Fraction(5, 2),
             Decimal("2.7"), np.bool_(True), torch.tensor(True), torch.tensor([2, 3]))  # fmt: skip
NOT_FLOAT32 = tuple(torch.tensor(0.125, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16))
NO_DEVICE = ("gpu", "mps", "cuda:99", -1, True, 2.5, ["cpu"], *([] if torch.cuda.is_available() else [0]))
REFUSED = [
    (ALL, "norm", ("l1", "l0", "linfty", 1, -math.inf, None, ["linf"], "", "fro"), r"norm=.*[.?] Expected one of: linf, l2\."),
    (ALL, "norm", ("linfty",), "did you mean 'linf'"),
    *(((entry,), option, ("no such",), r"='no such'\. Expected one of: ")
      for entry, option in dict.fromkeys((entry, row[1]) for row in NAMES for entry in row[0])),
    *((entries, switch, ("perhaps", 2, None, []), f"{switch}=.*: expected true or false") for entries, switch in SWITCHES),
    *((ALL, "epsilon", (value,), "epsilon" + words) for value, words in LENGTHS),
    *((STEPPED, "step_size", (value,), "step_size" + words.replace("such as 8/255$", "such as 2/255$")) for value, words in LENGTHS),
    ((pgd_class,), "epsilon", (np.bool_(True), torch.tensor(True)), "epsilon=.*: expected a number"),
    ((pgd_class,), "epsilon", (torch.tensor(8.0),), "write 8/255"),  # read once, before anything is captured
    (BY_TENSOR, "epsilon", (torch.tensor([0.1, 0.1]),), r"epsilon=a float32 tensor \[2\]: expected a number or a 0-d"),
    (BY_TENSOR, "epsilon", NOT_FLOAT32, r"epsilon=.*0-d float32 tensor; write epsilon.float\(\)$"),
    ((pgd_class, pgd_function, several), "step_size", NOT_FLOAT32, r"write step_size.float\(\)$"),
    (COUNTED, "num_steps", (-1,), "num_steps=-1: expected . or more"),
    (COUNTED, "num_steps", NOT_WHOLE, "num_steps=.*: expected a whole number"),
    ((*CONFIGS, train_step, pgd_class, examples), "num_steps", (0,), "num_steps=0: expected 1 or more"),
    ((*CONFIGS, train_step), "num_restarts", (0,), "num_restarts=0: expected 1 or more"),
    *((SEEDED, "seed", (seed,), rf"seed={seed} is outside \[0, 2\^63\)") for seed in (2**64, 2**63, -1)),
    (SEEDED, "seed", ("x",), "seed='x': expected a whole number"),
    ((evaluated,), "device", NO_DEVICE, "device .*(expected auto, cpu, cuda|not supported: use cpu|this machine has)"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "option", "value", "words"), cases(REFUSED))
def test_what_cannot_be_meant_is_refused_by_every_entry(entry, option, value, words):
    refused(entry, words, **{option: value})


def test_canonical_names_are_stored_and_saved():
    made = Config(
        precision=torch.bfloat16,
        capture=True,
        attack=Attack(norm="L_2", bn="Train", objective="CW", epsilon="128/255", start="None"),
        defense={"name": "trades", "beta": "3"},
    )  # fmt: skip
    assert (made.precision, made.capture, made.attack.norm, made.attack.bn) == ("bf16", "on", "l2", "train")
    assert (made.attack.objective, made.attack.epsilon) == ("cw", 128 / 255)
    assert Attack(start="NONE").start == "none"
    text = yaml.safe_dump(to_dict(made))
    assert "L_2" not in text
    assert from_dict(yaml.safe_load(text)) == made


def test_no_two_choices_are_one_name():
    for literal in (specs.Start, specs.BatchNormMode, specs.Objective, losses.Align, losses.Distance):
        choices = literal.__args__
        for choice in choices:
            assert named("x", choice.upper(), choices) == choice


@pytest.mark.parametrize("entry", ALL)
def test_an_l2_length_is_positive_and_no_longer_than_the_diagonal(entry):
    for value in (0, -1.0, math.inf):
        refused(entry, r"epsilon=\S+ is outside \(0, .*such as 128/255$", epsilon=value, norm="l2")
    if entry in TENSORS:  # sqrt(3 * 8 * 8)
        refused(entry, r"epsilon=128 is outside \(0, 13.86\].*write 128/255", epsilon=128, norm="l2")
        entry(*batch(), epsilon=13.8, norm="l2")


@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True)], ids=repr)
def test_what_is_a_bool(value):
    assert coerce(value, bool, "x") is True


def test_the_words_for_no_switch_off():
    images, labels = batch()
    assert PGD(network(), epsilon=0.1, num_steps=1, count="off")(images, labels).kappa is None
    step = fastarat.TrainStep(network(), fastarat.AT(), images, channels_last="no", fold="off")
    assert (step.memory_format, step.fast.fold_bn) == (torch.contiguous_format, False)
    for tf32, precision in (("no", "float32"), ("yes", "tf32")):
        measured = evaluate(network(), (images, labels), "clean", tf32=tf32, progress="off")
        assert measured.settings["precision"] == precision
    with pytest.raises(UserError, match="progress='maybe': expected true or false"):
        evaluate(network(), (images, labels), "clean", progress="maybe")


def test_triton_is_refused_on_a_cpu_before_any_work(monkeypatch):
    monkeypatch.setattr(specs, "interpreting", lambda: False)
    with pytest.raises(UserError, match=r"backend=triton cannot be had here: .*write backend=auto"):
        PGD(network(), epsilon=0.1, backend="Triton")
    refused(pgd_function, "backend=triton cannot be had here", backend="triton", num_steps=0)
    refused(train_step, "kernels=triton cannot be had here: .*write kernels=auto", kernels="triton")


def test_no_step_is_the_start():
    images, labels = batch()
    assert torch.equal(pgd_function(images, labels, num_steps=0), images)


FREE = {
    "uint8": (lambda x, y: ((x * 255).byte(), y), r"uint8.*write images.float\(\) / 255"),
    "float64": (lambda x, y: (x.double(), y), r"float64.*write images.float\(\)$"),
    "NHWC": (lambda x, y: (x.permute(0, 2, 3, 1), y), r"looks like \[B, H, W, C\].*write images.permute\(0, 3, 1, 2\)"),
    "one image": (lambda x, y: (x[0], y[:1]), r"\[3, 8, 8\].*write images\[None\]"),
    "one uint8 HWC": (
        lambda x, y: ((x[0] * 255).byte().permute(1, 2, 0), y[:1]),
        r"write images\[None\].permute\(0, 3, 1, 2\).float\(\) / 255",
    ),
    "flat": (lambda x, y: (x.flatten(1), y), r"\[8, 192\]: expected float32 \[B, C, H, W\] in \[0, 1\]$"),
    "empty": (lambda x, y: (x[:0], y[:0]), r"\[0, 3, 8, 8\]: expected float32"),
}
LABELS = {
    "float": (lambda x, y: (x, y.float()), r"float32 \[8\]: expected int64 \[8\]; write \w+.long\(\)"),
    "int32": (lambda x, y: (x, y.int()), r"write \w+.long\(\)"),
    "column": (lambda x, y: (x, y[:, None]), r"write \w+.squeeze\(1\)"),
    "one-hot": (lambda x, y: (x, torch.eye(K, dtype=torch.int64)[y]), r"write \w+.argmax\(1\)"),
    "too few": (lambda x, y: (x, y[:-1]), "8 images but 7 (labels|target): expected one label per image"),
}
VALUES = {
    "0 to 255": (lambda x, y: (x * 255, y), r"images span .*outside \[0, 1\]: divide by 255"),
    "normalised": (lambda x, y: (x * 4 - 2, y), "put it inside the model"),
    "rounded": (lambda x, y: (x + 0.005, y), r"write images.clamp\(0, 1\)"),
    "slightly": (lambda x, y: (x.clamp(min=0.5).fill_(1.00001), y), r"images span \[1.00001, 1.00001\d*\], outside"),
    "infinite": (lambda x, y: (x / 0, y), r"inf\], outside \[0, 1\]: these are no 8-bit pixels"),
    "huge": (lambda x, y: (x * 1e30, y), "these are no 8-bit pixels"),
    "nan": (lambda x, y: (x.clone().fill_(math.nan), y), "images contain NaN"),
    "from 1": (lambda x, y: (x, y.fill_(1).scatter_(0, torch.tensor([0]), K)), r"labels span 1 to 4, but the model has 4 classes: expected 0 to 3; write labels - 1"),
    "beyond": (lambda x, y: (x, y + K), "but the model has 4 classes"),
    "negative": (lambda x, y: (x, y - K), "labels span -4"),
}  # fmt: skip
WITH_VALUES = (train_step, pgd_class, evaluated, examples)
INPUTS = [(TENSORS, FREE), ([e for e in TENSORS if e is not start], LABELS), (WITH_VALUES, VALUES)]


@pytest.mark.parametrize(
    ("entry", "change", "words"),
    [
        pytest.param(entry, *mistake, id=f"{entry.__name__}-{name}")
        for entries, mistakes in INPUTS
        for name, mistake in mistakes.items()
        for entry in entries
        if (entry, name) != (evaluated, "uint8")  # a data set, there
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(entry, change, words):
    refused(entry, words, change)


@pytest.mark.parametrize("entry", WITH_VALUES)
def test_rounding_is_no_mistake(entry):
    images, labels = batch()
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 1 + 2e-7, -2e-7
    entry(images, labels)


@pytest.mark.parametrize("entry", [e for e in TENSORS if e is not evaluated])
def test_arrays_are_refused_with_their_mend(entry):
    refused(entry, r"expected a float32 tensor.*write torch.from_numpy\(images\)", lambda x, y: (x.numpy(), y))
    if entry is not start:
        refused(entry, r"expected an int64 tensor \[8\]; write torch.as_tensor", lambda x, y: (x, y.numpy()))


def test_layout_is_told_by_what_the_network_takes():
    images = torch.rand(2, 32, 32, 3)
    with pytest.raises(UserError, match="permute"):
        check_images(images)
    check_images(images, channels=32)
    check_images(torch.rand(2, 22, 100, 1))  # 22 channels in time, one wide
    check_images(torch.rand(2, 12, 1, 1))
    with pytest.raises(UserError, match="permute"):
        check_images(torch.rand(2, 28, 28, 1))


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.net, self.error = network(), error

    def forward(self, x):
        raise self.error


# Every entry that takes a network.
ON_A_MODEL = {
    "evaluate": lambda model, x, y: evaluate(model, (x, y), "clean", progress=False),
    "adversarial_examples": adversarial_examples,
    "TrainStep": lambda model, x, y: fastarat.TrainStep(model, fastarat.AT(), x),
    "PGD": lambda model, x, y: PGD(model, epsilon=0.1)(x, y),
    "PGD on a KL": lambda model, x, y: PGD(model, epsilon=0.1, objective="kl", start="gaussian")(x, y),
}
FAILS = "the model does not take images torch.float32 .*"


@pytest.mark.parametrize("entry", ON_A_MODEL)
@pytest.mark.parametrize(
    ("model", "channels", "words"),
    [
        (network, 1, r"does not take images.*\[\d, 1, 8, 8\].*3 channels"),
        (lambda: network().forward, 3, "expected an nn.Module"),
        (lambda: network().double(), 3, r"conv1.weight is torch.float64: .*call model.float\(\)"),
        (lambda: network().half(), 3, r"conv1.weight is torch.float16: .*call model.float\(\)"),
        (lambda: network().bfloat16(), 3, r"conv1.weight is torch.bfloat16: .*call model.float\(\)"),
        (lambda: Raising(AssertionError("wrong size")), 3, FAILS + "AssertionError: wrong size"),
        (lambda: Raising(KeyError("x")), 3, FAILS + "KeyError: 'x'"),
        (lambda: Raising(TypeError("two\nlines")), 3, FAILS + "TypeError: two$"),
        (lambda: Raising(AttributeError("no such")), 3, FAILS + "AttributeError: no such"),
        (lambda: Raising(RuntimeError("shapes")), 3, FAILS + r"\[\d, 3, 8, 8\]: shapes$"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(entry, model, channels, words):
    images, labels = batch()
    with pytest.raises(UserError, match=words) as found:
        ON_A_MODEL[entry](model(), images[:, :channels].contiguous(), labels)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("entry", ["evaluate", "adversarial_examples", "TrainStep"])
def test_probabilities_and_what_is_not_finite_are_refused_before_work(entry):
    images, labels = batch()
    for last, words in (
        (nn.Softmax(1), "returned probabilities.*remove the final softmax"),
        (nn.LogSoftmax(1), "returned log-probabilities.*remove the final log-softmax"),
        (nn.Threshold(math.inf, math.nan), "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=words) as found:
            ON_A_MODEL[entry](nn.Sequential(network(), last), images, labels)
        assert "\n" not in str(found.value)
    # In [0, 1], and no probabilities; negative, and no logarithms of any; all equal.
    for last in (nn.Sigmoid(), nn.LogSigmoid(), nn.Threshold(math.inf, 0.0)):
        ON_A_MODEL[entry](nn.Sequential(network(), last), images, labels)


class Twice(nn.Module):
    def forward(self, logits):
        return logits, logits


def step_on(x, defense=fastarat.AT, **options):
    model = options.pop("model", None)
    return fastarat.TrainStep(network() if model is None else model, defense(), x, num_steps=1, **options)


def attacked(x, y, target=None, model=None, start=None, **options):
    points = x if start is None else start
    options = {"epsilon": 0.1, "step_size": 0.1, "num_steps": 1} | options
    return pgd(model or network(), x, y, y if target is None else target, points, **options)


NO_DEFENSE = r"expected a Defense, such as fastarat.TRADES\(\)"
NO_GRADIENT = r"no parameter of the model requires a gradient.*requires_grad_\(True\)"
NO_OPTIMIZER = "the optimizer function returned .*: expected an optimizer, such as"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: step_on((3, 8, 8)), "example=.*expected a float32 tensor"),
        (lambda x, y: step_on(x)(x[:, :1], y), "images have 1 channels, the example had 3"),
        (lambda x, y: step_on(x, fastarat.ARAT)(x[:1], y[:1]), "a batch of one: BatchNorm .*ARAT .*at least 2 images.*drop_last=True"),
        (lambda x, y: step_on(x, awp=2), r"awp=2 is outside \(0, 1\)"),
        (lambda x, y: step_on(x, awp_warmup=-1), "awp_warmup=-1: expected 0 or more"),
        (lambda x, y: step_on(x, lambda: "trades"), NO_DEFENSE),
        (lambda x, y: step_on(x, lambda: fastarat.TRADES), NO_DEFENSE),
        (lambda x, y: step_on(x, lambda: None), NO_DEFENSE),
        (lambda x, y: step_on(x, model=nn.Sequential(network(), Twice())), "the model returned tuple"),
        (lambda x, y: step_on(x, model=nn.Sequential(network(), nn.Softmax(1))), "returned probabilities.*remove the final softmax"),
        (lambda x, y: step_on(x, model=network().requires_grad_(False)), NO_GRADIENT),
        (lambda x, y: step_on(x, fastarat.ARAT, model=network().requires_grad_(False)), NO_GRADIENT),
        (lambda x, y: step_on(x, model=nn.Flatten()), "a Flatten without parameters"),
        (lambda x, y: step_on(x, fastarat.ARAT, model=nn.Flatten()), "a Flatten without parameters"),
        (lambda x, y: step_on(x, optimizer=torch.optim.SGD(network().parameters(), lr=0.1)), "expected a function of the list of parameters"),
        (lambda x, y: step_on(x, optimizer=lambda p: torch.optim.SGD(p[1:], lr=0.1)), r"leaves out 1 of the \d+ parameters.*requires_grad_\(False\)"),
        (lambda x, y: step_on(x, optimizer=lambda p: None), NO_OPTIMIZER),
        (lambda x, y: step_on(x, optimizer=lambda p: 3), NO_OPTIMIZER),
        (lambda x, y: step_on(x, optimizer=lambda p: "sgd"), NO_OPTIMIZER),
        (lambda x, y: strongest(network(), [], y), "at least one"),
        (lambda x, y: attacked(x, y, objective="kl"), r"kl takes the clean logits, float \[8, K\]"),
        (lambda x, y: attacked(x, y, torch.zeros(8, 3), objective="kl"), r"target is \[8, 3\], the logits \[8, 4\]: expected one shape"),
        (lambda x, y: attacked(x, y, start=x[:4]), "start is .* expected one shape"),
        (lambda x, y: attacked(x, y, model=lambda x: (network()(x),)), "the model returned tuple for 8 images: expected logits"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(call, words):
    with pytest.raises(UserError, match=words):
        call(*batch())


def test_the_optimizer_holds_what_is_trained():
    images, labels = batch()
    model = network()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"leaves out \d+ of the \d+ parameters.*before BatchNorm was split"):
        step_on(images, fastarat.ARAT, model=model, optimizer=lambda p: early)
    model = network()
    model.conv1.requires_grad_(False)  # freezing a part is no mistake
    groups = lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.01}], lr=0.1)  # noqa: E731
    step_on(images, model=model, optimizer=groups)(images, labels)


def test_a_batch_of_one_suits_a_defense_without_split_statistics():
    images, labels = batch()
    step_on(images)(images[:1], labels[:1])


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda z: z.mean(), "returned Tensor: expected a dict of named scalar terms"),
        (lambda z: None, "returned NoneType: expected a dict"),
        (lambda z: {"ce": z.mean(1)}, r"term 'ce' has shape \[8\]: expected a scalar"),
        (lambda z: {"ce": 1.0}, "term 'ce' is a float"),
        (lambda z: {"ce": z.mean().detach()}, "no term has a gradient"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"capture": "fake"}, {"awp": 0.01}])
def test_the_loss_of_a_defense_of_ones_own(loss, words, options):
    @dataclass(frozen=True, kw_only=True)
    class Mine(fastarat.Defense):
        def loss(self, views):
            return loss(views.logits_adv)

    images, labels = batch()
    step = fastarat.TrainStep(network(), Mine(), images, num_steps=1, **options)
    with pytest.raises(UserError, match=rf"Mine.loss.*{words}"):
        step(images, labels)


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_values_are_looked_at_once_per_shape_on_a_gpu_and_always_on_a_cpu(on_a_gpu, monkeypatch):
    images, labels = batch()
    step = fastarat.TrainStep(network(), fastarat.AT(), images, epsilon=0.1, num_steps=1)
    attack = PGD(network(), epsilon=0.1, num_steps=1)
    seen = []
    for module in ("fastarat.checks", "fastarat.attacks"):
        monkeypatch.setattr(f"{module}.check_pixels", lambda images: seen.append(tuple(images.shape)))
    if on_a_gpu:  # there, a read would make the host wait
        monkeypatch.setattr("fastarat.checks.waits", lambda images: True)
        monkeypatch.setattr("fastarat.attacks.waits", lambda images: True)
    for n in (8, 8, 4, 8, 4):
        step(images[:n], labels[:n])
        attack(images[:n], labels[:n])
    shapes = [(8, 3, 8, 8), (4, 3, 8, 8)] if on_a_gpu else [(n, 3, 8, 8) for n in (8, 8, 4, 8, 4)]
    assert seen == [shape for shape in shapes for _ in range(2)]


def test_a_bad_batch_is_refused_after_good_ones_and_looked_at_again():
    images, labels = batch()
    step = fastarat.TrainStep(network(), fastarat.AT(), images, epsilon=0.1, num_steps=1)
    attack = PGD(network(), epsilon=0.1, num_steps=1)
    for call in (step, attack):
        call(images, labels)
        for _ in range(2):
            with pytest.raises(UserError, match="divide by 255"):
                call(images * 255, labels)
            with pytest.raises(UserError, match="but the model has"):
                call(images, labels + K)
        call(images, labels)


def test_a_refused_batch_leaves_the_step_as_it_was():
    images, labels = batch()
    used, fresh = (
        fastarat.TrainStep(network(), fastarat.ARAT(), images, epsilon=0.1, num_steps=1, capture="fake") for _ in "ab"
    )
    for bad in ((images * 255, labels), (images, labels + K)):
        with pytest.raises(UserError):
            used(*bad)
    used(images, labels)
    fresh(images, labels)
    for a, b in zip(used.model.state_dict().values(), fresh.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_read_where_there_are_no_values():
    assert readable(torch.ones(2))
    assert not readable(torch.ones(2, device="meta"))
    with FakeTensorMode():
        assert not readable(torch.ones(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_is_read_during_a_capture():
    model = network().cuda()
    images, labels = (t.cuda() for t in batch())
    attack = PGD(model, epsilon=0.1, num_steps=2)
    fast = fastarat.capture(attack, (images, labels), warmup=1)
    attack._seen.clear()  # as if a shape were met for the first time inside a capture
    fast = fastarat.capture(attack, (images, labels), warmup=0)
    assert (fast(images, labels).images - images).abs().max() <= 0.1 + 1e-6
    step = fastarat.TrainStep(model, fastarat.AT(), images, epsilon=0.1, num_steps=2)
    step(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_attack_leaves_frozen_layers_in_their_own_mode():
    model = network().train()
    model.bn1.eval()
    PGD(model, epsilon=0.1, num_steps=1)(*batch())
    assert model.training
    assert not model.bn1.training


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimConfig(lr=-1), r"optim.lr=-1 is outside \[0, inf\): base learning rate"),
        (lambda: OptimConfig(lr=math.inf), "optim.lr=inf"),
        (lambda: OptimConfig(momentum=1.0), r"optim.momentum=1 is outside \[0, 1\)"),
        (lambda: OptimConfig(weight_decay="much"), "optim.weight_decay='much': expected a number"),
        (lambda: OptimConfig(nesterov="perhaps"), "optim.nesterov='perhaps': expected true or false"),
        (lambda: EvalConfig(every=0), "eval.every=0: expected 1 or more"),
        (lambda: EvalConfig(num_steps=0.5), "eval.num_steps=0.5: expected a whole number"),
        (lambda: EvalConfig(val_images=-1), "eval.val_images=-1: expected 0 or more"),
        (lambda: SwaConfig(start=1), r"swa-config.start=1 is outside \[0, 1\).*share of the epochs"),
        (lambda: SwaConfig(every=0), "swa-config.every=0: expected 1 or more"),
        (lambda: Config(epochs=0), "epochs=0: expected 1 or more"),
        (lambda: Config(epochs=math.inf), "epochs=inf: expected a whole number"),
        (lambda: Config(image_size=0), "image_size=0"),
        (lambda: Config(awp_warmup=-1), "awp_warmup=-1"),
        (lambda: Config(seed=2**63), r"seed=9223372036854775808 is outside \[0, 2\^63\)"),
        (lambda: Config(ema=1.0), r"ema=1 is outside \(0, 1\).*such as 0.995"),
        (lambda: Config(awp=-0.1), r"awp=-0.1 is outside \(0, 1\)"),
        (lambda: Config(dataset=torch.rand(4, 3, 8, 8)), r"dataset=a float32 tensor \[4, 3, 8, 8\]: expected text: digits, cifar10"),
        (lambda: Config(dataset=None), "dataset=None: expected text: digits"),
        (lambda: Config(attack=3), "attack=3: expected an Attack"),
        (lambda: Config(attack={"epsilom": 1}), "unknown key 'attack.epsilom'; did you mean 'epsilon'"),
        (lambda: Config(defense=3), r"defense=3: expected a name.*TRADES\(\)"),
        (lambda: Config(defense="tradez"), "did you mean 'trades'"),
        (lambda: BenchConfig(precision="fp8"), "precision='fp8'"),
        (lambda: BenchConfig(awp=2), r"awp=2 is outside \(0, 1\)"),
        (lambda: BenchConfig(image_size=0), "--image-size 0: expected 1 or more"),
        (lambda: BenchConfig(repeats="many"), "repeats='many': expected a whole number"),
        (lambda: fastarat.TRADES(beta=-1), r"defense.beta=-1 is outside \[0, inf\): weight of the KL"),
        (lambda: fastarat.TRADES(beta=math.inf), "defense.beta=inf"),
        (lambda: fastarat.MART(lam=-0.5), "defense.lam=-0.5"),
        (lambda: fastarat.LBGAT(beta=-1), "defense.beta=-1"),
        (lambda: fastarat.ARAT(gamma=-1), "defense.gamma=-1"),
        (lambda: fastarat.ARAT(balance_power=-1), "defense.balance_power=-1"),
        (lambda: fastarat.ARAT(align="x=>y"), "did you mean 'x->y'"),
        (lambda: fastarat.ARREST(phi=181), r"defense.phi=181 is outside \[0, 180\]: degrees"),
        (lambda: fastarat.ARREST(tau=1.5), r"defense.tau=1.5 is outside \[0, 1\]"),
        (lambda: fastarat.ARREST(lam=-1), "defense.lam=-1"),
        (lambda: fastarat.CURE(beta=-1), "defense.beta=-1"),
        (lambda: fastarat.CURE(gamma=-1), "defense.gamma=-1"),
        (lambda: fastarat.VIR(scale=-1), "defense.scale=-1"),
        (lambda: fastarat.VIR(sharpness=-1), "defense.sharpness=-1"),
        (lambda: fastarat.VIR(offset=-1), "defense.offset=-1"),
        (lambda: fastarat.FAT(slack_epochs=(0, 3)), "defense.slack_epochs=0: expected 1 or more"),
        (lambda: fastarat.FAT(slack="0,x,2"), "defense.slack='x': expected a whole number"),
    ],
)  # fmt: skip
def test_settings_and_hyper_parameters_out_of_range(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_what_is_meant_is_taken(tmp_path):
    assert Config(defense="trades") == Config(defense=fastarat.TRADES) == Config(defense=fastarat.TRADES())
    assert Config(defense="TRADES") == Config(defense={"name": "trades"})
    assert Config(attack={"epsilon": "4/255"}).attack == Attack(epsilon=4 / 255)
    assert Config(out=tmp_path).out == str(tmp_path)
    assert Config(batch_size="64", amp="yes").batch_size == 64
    assert Config(attack=Attack(epsilon="8/255")) == Config()
    assert BenchConfig(precision="float32").precision == "fp32"


@pytest.mark.parametrize("kind", list(fastarat.DEFENSES.values()))
def test_every_hyper_parameter_is_typed(kind):
    for f in dataclasses.fields(kind):
        with pytest.raises(UserError, match=rf"defense.{f.name}=.*: expected|defense.{f.name}=.* Expected one of"):
            kind(**{f.name: object()})
    again = kind(
        **{f.name: str(v) for f in dataclasses.fields(kind) if type(v := getattr(kind(), f.name)) in (int, float)}
    )
    assert again == kind()


def floats(kind) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if str(f.type).startswith("float")]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in fastarat.DEFENSES.values() for n in floats(k)])
def test_no_number_of_a_defense_is_nan_or_minus_infinity(kind, name):
    for value in (math.nan, -math.inf):
        with pytest.raises(UserError, match=f"defense.{name}="):
            kind(**{name: value})


def test_hyper_parameters_in_range():
    assert fastarat.TRADES(beta="6") == fastarat.TRADES(beta=6)
    assert fastarat.GAIRAT(lam=math.inf, lam_max="inf").lam_max == math.inf
    assert fastarat.GAIRFAT(lam="inf", slack=[0, 1, 2]).slack == (0, 1, 2)
    assert fastarat.ARREST(phi="none").phi is None
    assert fastarat.ARAT(align="X->Y", metric="COS", layers="penultimate").layers == ("penultimate",)


def test_a_defense_of_ones_own_gets_the_same():
    class Thing:
        """Something checks know nothing of."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(fastarat.Defense):
        weight: float = dataclasses.field(default=1.0, metadata={"help": "of it", "range": "(0, 1]"})
        kind: Literal["soft", "hard"] = "soft"
        several: tuple[float, ...] = ()
        pair: tuple[int, str] = (1, "a")
        either: int | str = 1
        thing: Any = None
        table: dict[str, float] = dataclasses.field(default_factory=dict)
        unset: float = None

        def loss(self, views):
            return {}

    made = Mine(
        weight="1/2", kind="HARD", several=["1/4", 2], pair=["3", "b"], either="three", thing=Thing, table={"a": 1}
    )
    assert (made.weight, made.kind, made.several, made.pair) == (0.5, "hard", (0.25, 2.0), (3, "b"))
    assert (made.either, made.thing, made.table, made.unset) == ("three", Thing, {"a": 1}, None)
    with pytest.raises(UserError, match=r"defense.weight=2 is outside \(0, 1\]: of it"):
        Mine(weight=2)
    with pytest.raises(UserError, match=r"defense.pair=.*: expected values with commas"):
        Mine(pair=(1, "a", 2))


def test_a_class_whose_annotations_cannot_be_looked_up_is_taken_as_it_is():
    @dataclass(frozen=True)
    class Hidden:
        value: "Nowhere" = 1  # noqa: F821

    made = Hidden("x")
    settle(made)
    assert made.value == "x"


def test_intervals():
    for value, interval in ((0, "[0, 1)"), (1, "(0, 1]"), (math.inf, "(-inf, inf]"), (2**63 - 1, "[0, 2^63)")):
        assert within("x", value, interval) == value
    for value, interval in ((1, "[0, 1)"), (0, "(0, 1]"), (-math.inf, "(-inf, inf]"), (math.inf, "[0, inf)")):
        with pytest.raises(UserError, match="x="):
            within("x", value, interval)
    assert coerce("8/255", float | None, "x") == 8 / 255


def test_branches():
    model = fastarat.split_batchnorm(network())
    for name, words in (("avd", "did you mean 'adv'"), ("Adv", "did you mean 'adv'"), (3, "this model has clean, adv")):
        with pytest.raises(UserError, match=words), fastarat.branch(model, name):
            pass
    with pytest.raises(UserError, match="names no branch"), fastarat.branch(model):
        pass
    with pytest.raises(UserError, match="'clean' is not among"), fastarat.branch(model, "adv", updates=("clean",)):
        pass
    with pytest.raises(UserError, match=r"expected an nn.Module"):
        fastarat.split_batchnorm(model.forward)
    for branches in ("adv", ("adv",), ("a", "a")):
        with pytest.raises(UserError, match=r"expected at least two different names, such as"):
            fastarat.split_batchnorm(network(), branches)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z, y: losses.trades(z, z[:, :3], y, 6.0), r"logits_adv is \[8, 3\], logits_clean \[8, 4\]"),
        (lambda z, y: losses.trades(z, z[:4], y, 6.0), r"logits_adv is \[4, 4\]"),
        (lambda z, y: losses.trades(z, y, z, 6.0), "logits_adv=an int64 tensor .*: expected logits"),
        (lambda z, y: losses.trades(z, z, y.float(), 6.0), r"write labels.long\(\)"),
        (lambda z, y: losses.mart(z, z, y[:3], 5.0), "8 images but 3 labels"),
        (lambda z, y: losses.lbgat(None, z, z, y, 6.0), "logits_clean=None: expected logits"),
        (lambda z, y: losses.lbgat(z, z, z[:, :2], y), r"logits_teacher is \[8, 2\]"),
        (lambda z, y: losses.ar_at_invariance(z[:, :2], z), r"z_adv is \[8, 4\], z_clean \[8, 2\]"),
        (lambda z, y: losses.ar_at_invariance(z, z, distance="cosine"), "did you mean 'cos'"),
        (lambda z, y: losses.ar_at_invariance(z, z, align="xy"), "Known: x->y"),
        (lambda z, y: losses.gairat_weights(y, 10, kind="tan"), "did you mean 'tanh'"),
    ],
)  # fmt: skip
def test_losses_say_what_does_not_fit(call, words):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match=words):
        call(torch.randn(8, 4, generator=g), torch.randint(4, (8,), generator=g))
