"""Evaluation against closed forms and against the official AutoAttack call; what it refuses and what it restores."""

import json
import logging
import os
import re
from contextlib import nullcontext

import numpy as np
import pyautoattack
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from small import shorten_autoattack
from torch import nn
from tqdm import tqdm
from tqdm.notebook import tqdm_notebook

from fastarat.attacks import pgd
from fastarat.data import Split, make_loader
from fastarat.errors import UserError
from fastarat.evaluation import Evaluation, adversarial_examples, collect, crafted, evaluate, parse_attacks, wilson
from fastarat.evaluation.autoattack import build_ensemble
from fastarat.evaluation.task import Task, share
from fastarat.nets.batchnorm import SplitBatchNorm2d
from fastarat.values import checked_budget

SHAPE = (3, 6, 6)


@pytest.fixture
def quick(monkeypatch):
    """Shorten every attack of AutoAttack, in the official call and in ours alike."""
    shorten_autoattack(monkeypatch, apgd=25, fab=8, square=100)


def linear(num_classes, seed=0, scale=1.0):
    """A linear classifier, and images far enough from 0 and 1 for its closed form to hold, labelled by it."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), num_classes))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=g) * scale)
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))  # else one class wins everywhere
    images = 0.2 + 0.6 * torch.rand(32, *SHAPE, generator=g)
    return model, images, model(images).argmax(1)


def linear_robust(model, images, labels, epsilon, order):
    """The exact share: every margin exceeds epsilon times the dual norm of the weight difference."""
    weight, logits = model[1].weight.detach(), model(images).detach()
    slack = []
    for j in range(len(weight)):
        dual = torch.linalg.vector_norm(weight[labels] - weight[j], ord=order, dim=1)
        margin = logits.gather(1, labels[:, None])[:, 0] - logits[:, j]
        slack.append(torch.where(labels == j, torch.inf, margin - epsilon * dual))
    least = torch.stack(slack).amin(0)
    assert least.abs().min() > 1e-3, "an image on the edge would make the test depend on rounding"
    return share(least > 0)


class Small(nn.Module):
    """A nonlinear ten-class network with split BatchNorm, dropout and one frozen parameter."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3)
            self.bn = SplitBatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(8 * 16, 10)
            nn.init.normal_(self.bn.clean.weight)
            nn.init.normal_(self.bn.running_mean, std=0.1)
        self.conv.bias.requires_grad_(False)

    def forward(self, images):
        return self.head(self.drop(self.bn(self.conv(images)).relu()).flatten(1))


def small_data(model, count=14):
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    model.eval()
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # one image is misclassified without any attack
    return images, labels


@pytest.mark.parametrize(
    ("norm", "epsilon", "order", "attack"), [("linf", 0.01, 1, "clean,pgd-20,pgd-20-2"), ("l2", 0.1, 2, "clean,pgd-60")]
)
def test_pgd_reaches_the_closed_form_of_a_two_class_linear_model(norm, epsilon, order, attack):
    model, images, labels = linear(2)
    exact = linear_robust(model, images, labels, epsilon, order)
    assert 0.2 < exact < 0.8
    result = evaluate(model, (images, labels), attack, epsilon=epsilon, norm=norm, batch_size=10)
    keys = [parsed.key for parsed in parse_attacks(attack)]
    assert result.accuracy == {"clean_acc": 1.0, **dict.fromkeys(keys[1:], exact)}
    assert result.max_perturbation[attack.split(",")[1]] == pytest.approx(epsilon, abs=1e-6 if norm == "linf" else 1e-5)
    assert result.warnings == ()


@pytest.mark.parametrize("num_classes", [5, 10])
def test_autoattack_is_exact_on_linear_models_and_never_above_pgd(num_classes, quick):
    model, images, labels = linear(num_classes, scale=0.2)
    exact = linear_robust(model, images, labels, 0.01, order=1)
    result = evaluate(model, (images, labels), "clean,pgd-20,autoattack", epsilon=0.01)
    assert 0.2 < exact < 0.9
    assert result.accuracy["robust_acc_aa"] == exact
    assert result.accuracy["robust_acc_aa"] <= result.accuracy["robust_acc_pgd20"]
    assert list(result.autoattack) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert sorted(result.autoattack.values(), reverse=True) == list(result.autoattack.values())


def official(model, images, labels, epsilon, norm, caplog):
    """Return the robust accuracy of one official call and the accuracies it logs after each member, in percent."""
    names = {"linf": "Linf", "l2": "L2"}
    attack = pyautoattack.AutoAttack(model, norm=names[norm], eps=epsilon, seed=3, version="standard")
    with caplog.at_level(logging.DEBUG, logger="auto-attack"):
        points, _ = attack.run_standard_evaluation(images, labels, batch_size=5)
    logged = dict(re.findall(r"robust accuracy after (\S+): ([\d.]+)%", caplog.text))
    return share(model(points).argmax(1) == labels), {name.lower(): value for name, value in logged.items()}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_the_official_single_call(norm, quick, caplog):
    model = Small()
    images, labels = small_data(model)
    epsilon = {"linf": 0.02, "l2": 0.15}[norm]
    robust, logged = official(model, images, labels, epsilon, norm, caplog)
    result = evaluate(model, (images, labels), "autoattack", epsilon=epsilon, norm=norm, seed=3, batch_size=5)
    assert 0 < robust < result.autoattack["clean"] == 13 / 14
    assert result.accuracy["robust_acc_aa"] == robust
    assert {k: f"{100 * v:.2f}" for k, v in result.autoattack.items() if k != "clean"} == logged


def test_the_members_keep_their_official_settings():
    """The tests above shorten both sides; a real evaluation runs what version="standard" sets."""
    model, _, _ = linear(10)
    task = Task(model, *[torch.empty(0)] * 2, checked_budget(0.01), 256, 3, "adv", False, torch.device("cpu"), False)
    built = build_ensemble(pyautoattack, task, num_classes=10)
    official = pyautoattack.AutoAttack(model, eps=0.01, seed=3, version="standard", device="cpu")
    for member in ("apgd", "apgd_targeted", "fab", "square"):
        ours, theirs = vars(getattr(built, member)), vars(getattr(official, member))
        plain = {k: v for k, v in theirs.items() if isinstance(v, (int, float, str, type(None)))}
        assert len(plain) > 8
        assert {k: ours[k] for k in plain} == plain
    assert built.square.n_queries == 5000
    assert built.apgd_targeted.n_target_classes == 9


def test_a_single_member_attacks_alone(quick):
    model = Small()
    data = small_data(model)
    result = evaluate(model, data, "apgd-ce,fab-t,square", epsilon=0.02)
    assert list(result.accuracy) == ["robust_acc_apgd_ce", "robust_acc_fab_t", "robust_acc_square"]
    assert result.autoattack == {}
    assert all(value <= 13 / 14 for value in result.accuracy.values())


def test_few_classes_are_handled_and_said(quick):
    for num_classes, members in (
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
    ):
        model, images, labels = linear(num_classes)
        exact = linear_robust(model, images, labels, 0.01, order=1)
        result = evaluate(model, (images, labels), "autoattack", epsilon=0.01)
        assert list(result.autoattack) == ["clean", *members]
        assert any("not the standard version" in w for w in result.warnings)
        assert result.accuracy["robust_acc_aa"] == exact
        with pytest.raises(UserError, match="apgd-t needs at least 4 classes"):
            evaluate(model, (images, labels), "apgd-t", epsilon=0.01)


def interrupt(monkeypatch, at):
    """Make the `at`-th batch of apgd-t fail; return the sizes of those begun."""
    original, calls = APGDAttack_targeted.perturb, []

    def interrupted(self, x, y):
        calls.append(len(x))
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, x, y)

    monkeypatch.setattr(APGDAttack_targeted, "perturb", interrupted)
    return calls


def test_an_interrupted_autoattack_continues_where_it_stopped(tmp_path, monkeypatch, quick):
    model = Small()
    data = small_data(model)
    call = {"attack": "autoattack", "epsilon": 0.01, "batch_size": 5, "seed": 1, "state_dir": tmp_path}
    whole = evaluate(model, data, **{**call, "state_dir": None})
    assert whole.autoattack["apgd-ce"] > 6 / 14, "apgd-t needs several batches for this test"

    calls = interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, **call)

    def again(self, x, y=None):
        raise AssertionError("a finished attack ran again")

    monkeypatch.setattr(APGDAttack, "perturb", again)
    resumed = evaluate(model, data, **call)
    assert resumed.autoattack == whole.autoattack
    assert resumed.max_perturbation == whole.max_perturbation
    survivors = round(14 * whole.autoattack["apgd-ce"])
    assert sum(calls) == survivors + 5, "only the interrupted batch of apgd-t was attacked twice"

    monkeypatch.setattr(APGDAttack_targeted, "perturb", again)
    assert evaluate(model, data, **call).autoattack == whole.autoattack


def test_a_state_of_other_weights_or_settings_is_not_continued(tmp_path, monkeypatch, quick):
    model = Small()
    data = small_data(model)
    with monkeypatch.context() as m:
        interrupt(m, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, data, "autoattack", epsilon=0.01, state_dir=tmp_path)
    other = Small(seed=1)
    fresh = evaluate(other, data, "autoattack", epsilon=0.02)
    result = evaluate(other, data, "autoattack", epsilon=0.02, state_dir=tmp_path)
    assert result.autoattack == fresh.autoattack
    assert any("unfinished" in w and "other weights, epsilon:" in w for w in result.warnings)
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("damage", ["edited", "other data", "cut short", "no checksum", "nested", "not text", "list"])
def test_a_damaged_or_edited_state_is_attacked_anew_with_a_warning(tmp_path, damage, quick):
    model = Small()
    data = small_data(model, 4)
    call = {"attack": "square", "epsilon": 0.02, "state_dir": tmp_path}
    truth = evaluate(model, data, **call).accuracy
    (path,) = tmp_path.glob("*.json")
    good = json.loads(path.read_text())
    state = json.loads(path.read_text())
    state["robust"] = "".join("10"[int(flag)] for flag in state["robust"])
    state["done"]["square"]["accuracy"] = 1 - state["done"]["square"]["accuracy"]
    if damage == "other data":
        state["fingerprint"]["data"] = "0"
    if damage == "no checksum":
        del state["sha256"]
    text = {"cut short": path.read_text()[:50], "nested": "[" * 100_000, "list": "[1]"}.get(damage, json.dumps(state))
    path.write_bytes(b"\xff\xfe" if damage == "not text" else text.encode())
    result = evaluate(model, data, **call)
    assert result.accuracy == truth
    assert any("attacked anew" in w and str(path) in w for w in result.warnings)
    assert json.loads(path.read_text())["robust"] == good["robust"], "the good state takes the place of the damaged"


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        ("clean,pgd20", "did you mean 'pgd-20'"),
        ("auto-attack", "did you mean 'autoattack'"),
        ("apgd-dlr", "unknown attack 'apgd-dlr'"),
        ("pgd", "unknown attack 'pgd'"),
        ("pgd-0", "start at 1"),
        ("pgd-5-0", "start at 1"),
        ("pgd-1-2-3", "unknown attack"),
        ("", "unknown attack ''"),
    ],
)
def test_an_unknown_attack_is_refused_before_any_work(attack, text):
    with pytest.raises(UserError, match=re.escape(text)):
        evaluate(None, None, attack)


def test_attack_lists_are_parsed_once_each():
    parsed = parse_attacks(" Clean, pgd-20 ,pgd-20,pgd-10-1, pgd-50-10,apgd-t")
    assert [(a.name, a.key, a.num_steps, a.num_restarts) for a in parsed] == [
        ("clean", "clean_acc", 0, 1),
        ("pgd-20", "robust_acc_pgd20", 20, 1),
        ("pgd-10", "robust_acc_pgd10", 10, 1),
        ("pgd-50-10", "robust_acc_pgd50_r10", 50, 10),
        ("apgd-t", "robust_acc_apgd_t", 0, 1),
    ]


def test_wrong_settings_and_data_are_refused():
    """Budgets, images and labels: test_threat_model."""
    model, images, labels = linear(3)
    for settings in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=r"(limit|batch_size)=0"):
            evaluate(model, (images, labels), **settings)
    with pytest.raises(UserError, match="cannot evaluate on a str"):
        evaluate(model, "cifar10")
    with pytest.raises(UserError, match="cannot evaluate on a dict"):
        evaluate(model, {"test": (images, labels)})
    with pytest.raises(UserError, match="labels span"):
        evaluate(model, (images.numpy(), labels.numpy() + 1))


def test_what_train_takes_is_evaluated_alike():
    model, images, labels = linear(10)
    images = (images * 255).round() / 255
    pixels = (images * 255).round().byte()
    pairs = torch.utils.data.TensorDataset(images, labels)
    want = evaluate(model, (images, labels), "clean,pgd-2", limit=20)
    for data in (
        (images.numpy(), labels.numpy()),
        (pixels, labels),
        (pixels.permute(0, 2, 3, 1).numpy(), labels.numpy()),
        pairs,
        torch.utils.data.DataLoader(pairs, batch_size=5),
        [(x, int(y)) for x, y in zip(images, labels, strict=True)],
    ):
        found = evaluate(model, data, "clean,pgd-2", limit=20)
        assert (found.num_images, found.accuracy) == (want.num_images, want.accuracy)
        assert found.settings["data_sha256"] == want.settings["data_sha256"]


class Changed(nn.Module):
    """A linear model whose output goes through `change`."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda z: z.softmax(1), "probabilities.*remove the final softmax"),
        (lambda z: (z, z), "returned tuple"),
        (lambda z: z[:, :1], r"returned \[32, 1\]"),
        (lambda z: z[..., None], r"returned \[32, 3, 1\]"),
        (lambda z: z / 0, "NaN or infinite"),
        (lambda z: z.bfloat16(), "torch.bfloat16: expected float32 logits"),
        (lambda z: z.detach(), "do not depend on the images"),
    ],
)
def test_a_model_that_does_not_return_logits_is_refused(change, text):
    model, images, labels = linear(3)
    for call in (lambda m: evaluate(m, (images, labels)), lambda m: adversarial_examples(m, images, labels)):
        with pytest.raises(UserError, match=text):
            call(Changed(model, change))


def test_square_needs_no_gradient(quick):
    model, images, labels = linear(3)
    result = evaluate(Changed(model, torch.Tensor.detach), (images, labels), "clean,square", epsilon=0.01)
    assert result.accuracy["robust_acc_square"] < 1


def test_a_randomised_model_is_noted():
    model, images, labels = linear(3)
    noisy = Changed(model, lambda z: z + 0.01 * torch.randn_like(z))
    result = evaluate(noisy, (images, labels), "clean")
    assert any("randomised" in w for w in result.warnings)


def test_masked_gradients_are_noted_and_autoattack_logs_nothing_of_its_own(quick, caplog):
    # Logits of several thousand: cross-entropy has gradient zero in float32, the scale-free DLR loss has not.
    model, images, labels = linear(10, scale=1e4)
    with caplog.at_level(logging.WARNING):
        result = evaluate(model, (images, labels), "clean,pgd-20,autoattack,apgd-ce", epsilon=0.01)
    assert caplog.text == ""
    assert result.accuracy["robust_acc_pgd20"] > result.accuracy["robust_acc_aa"] + 0.02
    assert any("zero input gradient on" in w for w in result.warnings)
    assert any("points below pgd-20: report AutoAttack" in w for w in result.warnings)
    assert any("zero input gradient" in line for line in result.table().splitlines())


def test_an_attack_that_leaves_the_ball_is_caught(monkeypatch):
    model, images, labels = linear(3)
    far = lambda *a, **k: pgd(*a, **{**k, "epsilon": 0.03})  # noqa: E731
    monkeypatch.setattr(crafted, "pgd", far)
    with pytest.raises(AssertionError, match=r"exceeds epsilon 0\.02"):
        evaluate(model, (images, labels), "pgd-20", epsilon=0.02)


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_model_and_the_random_state_come_back_as_they_were(interrupt, quick):
    model = Small()
    data = small_data(model)
    model.train()
    model.drop.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    rng, stored_images = torch.get_rng_state(), data[0].clone()
    seen = []

    def look(module, args, output):
        assert not module.training
        assert not any(p.requires_grad for p in model.parameters())
        assert module.route.groups == ("clean",)
        assert output.dtype == torch.float32
        seen.append(1)
        if interrupt and len(seen) == 20:
            raise KeyboardInterrupt

    hook = model.bn.register_forward_hook(look)
    ends = pytest.raises(KeyboardInterrupt) if interrupt else nullcontext()
    with ends, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        evaluate(model, data, "clean,pgd-5,autoattack", epsilon=0.02, branch="clean")
    hook.remove()
    assert len(seen) >= 20
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen
    assert model.bn.route.groups == ("adv",)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(data[0], stored_images)


def test_float32_precision_switches_come_back():
    model, images, labels = linear(3)
    seen = []

    def look(z):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return z

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        evaluate(Changed(model, look), (images, labels), "clean")
        assert set(seen) == {"ieee"}
        assert torch.get_float32_matmul_precision() == "high"
        seen.clear()
        assert evaluate(Changed(model, look), (images, labels), "clean", tf32=True).settings["precision"] == "tf32"
        assert set(seen) == {"tf32"}
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_branch_decides_the_numbers():
    model = Small()
    data = small_data(model)
    adv, clean = (evaluate(model, data, "clean", branch=b).accuracy["clean_acc"] for b in ("adv", "clean"))
    assert adv == 13 / 14 > clean
    with pytest.raises(UserError, match="unknown BatchNorm branch"):
        evaluate(model, data, "clean", branch="advs")


def test_a_split_and_a_loader_give_what_tensors_give():
    pixels = torch.randint(256, (30, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, _, _ = linear(3)
    images = pixels.permute(0, 3, 1, 2).float().div(255)
    labels = model(images).argmax(1)
    split = Split(images=pixels, labels=labels, indices=torch.arange(30), shape=SHAPE)
    # An augmented, shuffled, truncated training loader must not leak into the measurement.
    loader = make_loader(split, batch_size=8, device="cpu", shuffle=True, drop_last=True)
    for data in (split, loader, (images, labels)):
        result = evaluate(model, data, "clean,pgd-3", batch_size=7)
        assert result.num_images == 30
        assert result.accuracy["clean_acc"] == 1.0
        assert result.accuracy == evaluate(model, (images, labels), "clean,pgd-3", batch_size=7).accuracy
        some, some_labels = collect(data, limit=4)
        assert torch.equal(some, images[[0, 7, 15, 22]])
        assert torch.equal(some_labels, labels[[0, 7, 15, 22]])
    with pytest.raises(UserError, match="holds no images"):
        evaluate(model, Split(pixels[:0], labels[:0], labels[:0], SHAPE), "clean")


def test_channels_last_models_pass_through_every_attack(quick):
    model = Small().to(memory_format=torch.channels_last)
    data = small_data(model, 5)
    formats = set()
    model.conv.register_forward_pre_hook(
        lambda m, args: formats.add(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    result = evaluate(model, data, "clean,pgd-2,autoattack", epsilon=0.01)
    plain = evaluate(Small(), data, "clean,pgd-2,autoattack", epsilon=0.01)
    assert formats == {True}
    assert result.accuracy == plain.accuracy


def test_evaluation_writes_json_and_a_table(tmp_path):
    model, images, labels = linear(2)
    result = evaluate(model, (images, labels), "clean,pgd-20", epsilon=8 / 255, limit=16)
    path = result.save(tmp_path / "run" / "eval.json")
    record = json.loads(path.read_text())
    assert os.listdir(path.parent) == ["eval.json"]
    assert record["accuracy"] == result.accuracy
    assert record["num_images"] == 16
    assert record["settings"]["step_size"] == pytest.approx(2 / 255)
    assert record["interval_95"]["clean_acc"] == list(wilson(1.0, 16))
    table = result.table()
    assert re.search(r"^pgd-20 +16 +[\d.]+% +[\d.]+% to [\d.]+% +[\d.]+ s$", table, re.M)
    assert "linf epsilon 8/255, PGD step 2/255, branch adv, seed 0, float32, cpu" in table


def test_table_lists_every_member():
    result = Evaluation(
        accuracy={"robust_acc_aa": 0.5},
        num_images=100,
        settings={"attacks": {"autoattack": "robust_acc_aa"}, "epsilon": 0.031, "step_size": 0.0071, "norm": "linf",
                  "branch": "adv", "seed": 0, "precision": "float32", "device": "cpu"},
        autoattack={"clean": 0.8, "apgd-ce": 0.55, "square": 0.5},
        wall_s={"autoattack": 3.0, "autoattack/apgd-ce": 2.0, "autoattack/square": 1.0},
    )  # fmt: skip
    table = result.table()
    assert "50.00%" in table
    assert "40.38% to 59.62%" in table
    assert re.search(r"^  after apgd-ce +100 +55.00% .* 2.0 s$", table, re.M)
    assert "epsilon 0.031, PGD step 0.0071" in table


def test_wilson_interval():
    # z^2 = 3.8415; (0.5 + 0.0192) / 1.0384 -+ 1.96 sqrt(0.0025 + 0.000096) / 1.0384
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert wilson(0.0, 10)[0] == 0.0


@pytest.mark.parametrize(("kind", "progress", "hidden"), [(tqdm, True, False), (tqdm_notebook, True, False),
                                                           (tqdm_notebook, False, True)])  # fmt: skip
def test_a_bar_is_shown_on_a_terminal_and_in_a_notebook(kind, progress, hidden, monkeypatch):
    seen = {}
    bar = type("Bar", (kind,), {"__init__": lambda self, **options: seen.update(options), "__del__": lambda self: None})
    monkeypatch.setattr("fastarat.evaluation.task.tqdm", bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    model, images, labels = linear(2)
    Task(model, images, labels, checked_budget(0.1), 10, 0, "adv", False, torch.device("cpu"), progress).bar("x", 32)
    assert seen == {"desc": "x", "total": 4, "unit": "batch", "leave": False, "disable": hidden}


def test_adversarial_examples_stay_in_the_ball_and_repeat():
    model = Small().train()
    images, labels = small_data(Small())
    kept = images.clone()
    points = adversarial_examples(model, images, labels, epsilon=0.02, num_steps=5, seed=2)
    assert torch.equal(images, kept)
    assert model.training
    assert 0.01 < (points - images).abs().max() <= 0.02 + 1e-6
    assert points.min() >= 0
    assert points.max() <= 1
    assert torch.equal(points, adversarial_examples(model, images, labels, epsilon=0.02, num_steps=5, seed=2))
    result = evaluate(model, (images, labels), "pgd-5", epsilon=0.02, seed=2)
    model.eval()
    assert result.accuracy["robust_acc_pgd5"] == share(model(points).argmax(1) == labels)


def test_a_result_that_cannot_be_written_is_no_traceback_and_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    result = Evaluation({"clean_acc": 0.5}, 100, settings={})
    old = result.save(tmp_path / "e.json").read_text()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/e.json: No space left"):
        Evaluation({"clean_acc": 0.75}, 100, settings={}).save(tmp_path / "e.json")
    assert (tmp_path / "e.json").read_text() == old
