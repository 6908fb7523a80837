"""Captured functions and steps. Without a GPU the fake twin runs: same buffers, checks and ownership, replay = call."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from small import batch, small_model, step_of, trained

import fastarat
from fastarat.attacks import PGD
from fastarat.config import OptimConfig

CUDA = torch.cuda.is_available()
MODES = ["fake", "cuda"] if CUDA else ["fake"]


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    """On a GPU eager and captured steps are compared: let no plan of cuDNN's, nor rounding to TF32, part them."""
    for name, value in (("deterministic", True), ("benchmark", False), ("allow_tf32", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)


def where(mode: str) -> torch.device:
    return torch.device("cuda" if mode == "cuda" else "cpu")


def steps(mode, defense=None):
    """Two equal training steps: the first eager, the second captured."""
    # On a GPU, as in a captured step: a Python number has other digits.
    lr = torch.tensor(0.1, device="cuda") if mode == "cuda" else 0.1
    return [
        step_of(
            defense, where(mode), num_steps=2, capture=capture,
            optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=5e-4, fused=True),
        )
        for capture in (False, mode if mode == "fake" else True)
    ]  # fmt: skip


def assert_equal_state(a, b, exact=True):
    tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(a.model.state_dict(), b.model.state_dict(), **tolerances)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_captured_attack_equals_eager_also_after_the_weights_change(mode, precision):
    device = where(mode)
    model = small_model(device).to(memory_format=torch.channels_last)
    images, labels = batch(device=device)
    eager, inner = (
        PGD(model, epsilon=0.1, num_steps=3, precision=precision, count=True,
            generator=torch.Generator(device).manual_seed(5)) for _ in "ab"
    )  # fmt: skip
    fast = fastarat.capture(inner, (images, labels), mode=mode, warmup=1)
    inner.generator.manual_seed(9)
    eager.generator.manual_seed(9)
    for seed in (1, 2, 3):
        images, labels = batch(seed=seed, device=device)
        found, wanted = fast(images, labels), eager(images, labels)
        torch.testing.assert_close(found.images, wanted.images, rtol=0, atol=1e-6)
        assert torch.equal(found.kappa, wanted.kappa)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("mode", MODES)
def test_buffers_are_owned_and_outputs_overwritten(mode):
    device = where(mode)
    example = torch.arange(4.0, device=device)
    fast = fastarat.capture(lambda x: {"double": 2 * x}, (example,), mode=mode)
    first = fast(example)["double"]
    kept = first.clone()
    example.add_(100)
    again = fast(torch.ones(4, device=device))["double"]
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(first, torch.full((4,), 2.0, device=device))
    assert torch.equal(kept, 2 * torch.arange(4.0, device=device))
    assert fast.inputs[0].data_ptr() != example.data_ptr()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:4], y), r"argument 0 has shape \(4, 3, 8, 8\), captured for \(8, 3, 8, 8\)"),
        (lambda x, y: (x, y.int()), "argument 1 has dtype torch.int32"),
        (lambda x, y: (x,), "captured for 2 tensors, called with 1"),
    ],
)
def test_another_shape_or_dtype_is_refused(change, words):
    images, labels = batch()
    calls = []

    def fn(x, y):
        calls.append(1)
        return x

    fast = fastarat.capture(fn, (images, labels), mode="fake", warmup=0)
    with pytest.raises(ValueError, match=words):
        fast(*change(images, labels))
    assert not calls


def test_any_memory_layout_is_taken():
    images, labels = batch(16)
    table = torch.stack([labels, labels], 1)
    eager, fast = steps("fake")
    for step in (eager, fast):
        step(images[::2], table[::2, 0])
        step(images[8:].contiguous(), labels[8:])
    assert_equal_state(eager, fast)


def test_capture_needs_cuda_tensors():
    with pytest.raises(fastarat.UserError, match="needs CUDA tensors"):
        fastarat.capture(lambda x: x, (torch.ones(2),))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("defense", fastarat.DEFENSES)
def test_captured_steps_equal_eager_ones(mode, defense):
    """Full batches, a short last one, a third shape; the learning rate and the balance move between steps."""
    made = eager, fast = steps(mode, defense=fastarat.DEFENSES[defense]())
    if fast.defense.why_eager:
        assert fast.why_eager == fast.defense.why_eager
        return
    for i, n in enumerate((8, 8, 5, 8, 5, 3)):
        images, labels = batch(n, seed=i, device=where(mode))
        for step in made:
            step.set_lr(0.05 / (i + 1))
            step.forward.epoch.fill_(i + 1)
            step.forward.progress.fill_(i / 6)
            step.defense.before_epoch(step.companions, lambda name, count, i=i: torch.tensor(i / 6), i + 1)
        a, b = eager(images, labels), fast(images, labels)
        assert list(a) == list(b)
        tolerances = {"rtol": 0, "atol": 0} if mode == "fake" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(a, b, **tolerances)
    assert len(fast._run.graphs) == 2
    assert_equal_state(eager, fast, exact=mode == "fake")
    assert eager.meter.read() == pytest.approx(fast.meter.read(), rel=1e-12 if mode == "fake" else 1e-3)


def test_capturing_leaves_no_trace():
    _, step = steps("fake")
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    generator = step.generator.get_state(), torch.get_rng_state()
    images, labels = batch()
    step._run.captured(images, labels)
    for key, value in step.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for state in step.optimizer.state.values():
        assert not state["momentum_buffer"].any()
    assert torch.equal(step.generator.get_state(), generator[0])
    assert torch.equal(torch.get_rng_state(), generator[1])
    assert step.meter.read() == {}
    assert step.steps == 0


def test_loading_a_state_drops_the_graphs():
    eager, fast = steps("fake")
    for step in (eager, fast):
        step(*batch())
    fast.load_state_dict(copy.deepcopy(eager.state_dict()))
    assert not fast._run.graphs
    for step in (eager, fast):
        step.generator.manual_seed(3)
        step(*batch(seed=4))
    assert_equal_state(eager, fast)


def test_learning_rate_is_a_device_tensor_only_when_captured():
    eager, fast = steps("fake")
    eager.set_lr(0.5), fast.set_lr(0.5)
    assert eager.optimizer.param_groups[0]["lr"] == 0.5
    rate = fast.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate == 0.5


def test_what_cannot_be_captured_says_why():
    class Eager(fastarat.AT):
        why_eager = "it asks an oracle"

    with pytest.raises(fastarat.UserError, match="it asks an oracle"):
        step_of(Eager(), capture=True)
    assert step_of(Eager(), capture="fake").why_eager == "it asks an oracle"
    if not CUDA:
        with pytest.raises(fastarat.UserError, match="cpu has no CUDA graphs"):
            step_of(fastarat.AT(), capture=True)


def test_a_captured_run_has_the_weights_of_an_eager_one(tmp_path):
    options = {"limit_train": 150, "epochs": 2, "device": "cpu", "optim": OptimConfig(lr=0.05)}
    runs = [trained(tmp_path / capture, capture=capture, **options) for capture in ("off", "fake")]
    eager, captured = (load_file(run / "last.safetensors") for run in runs)
    assert all(torch.equal(eager[k], captured[k]) for k in eager)


@pytest.mark.parametrize("defense", fastarat.DEFENSES)
def test_losses_compile_whole(defense):
    """fullgraph: no graph break; every term equal to the eager loss."""
    step, seen = step_of(fastarat.DEFENSES[defense](), num_steps=2), []
    step.loss = lambda views: seen.append(views) or step.eager_loss(views)
    step(*batch())
    torch._dynamo.reset()
    compiled = torch.compile(step.eager_loss, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        expected, got = (loss(seen[0]) for loss in (step.eager_loss, compiled))
    assert list(got) == list(expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_step_with_a_compiled_loss_equals_the_eager_step():
    eager, fast = (step_of(compile_loss=compiled) for compiled in (False, True))
    for i in range(2):
        torch.testing.assert_close(eager(*batch(seed=i)), fast(*batch(seed=i)), rtol=1e-4, atol=1e-4)
    assert_equal_state(eager, fast, exact=False)


def test_awp_by_hand():
    """Wu et al.: v = gamma_w ||w|| g / ||g|| per weight tensor; loss at w + v; step there; subtract the same v."""
    images, labels = batch()
    step = step_of(fastarat.AT(), awp=0.01, attack_bn="eval", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    by_hand = copy.deepcopy(step.model)
    kept = []
    attack = step.attack
    step.attack = lambda *a: kept.append(attack(*a)) or kept[-1]
    step(images, labels)
    adv = kept[0].images
    probe = copy.deepcopy(by_hand)
    loss = torch.nn.functional.cross_entropy(probe(adv), labels)
    weights = [(n, p) for n, p in by_hand.named_parameters() if p.dim() >= 2]
    grads = torch.autograd.grad(loss, [p for _, p in probe.named_parameters() if p.dim() >= 2])
    moves = [0.01 * p.norm() / g.norm() * g for (_, p), g in zip(weights, grads, strict=True)]
    with torch.no_grad():
        for (_, p), v in zip(weights, moves, strict=True):
            p.add_(v)
    torch.nn.functional.cross_entropy(by_hand(adv), labels).backward()
    with torch.no_grad():
        for p in by_hand.parameters():
            p.sub_(0.1 * p.grad)
        for (_, p), v in zip(weights, moves, strict=True):
            p.sub_(v)
    torch.testing.assert_close(step.model.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-6)


def test_awp_warmup_changes_nothing():
    images, labels = batch()
    plain, warm = step_of(), step_of(awp=0.01, awp_warmup=1)
    plain(images, labels), warm(images, labels)
    assert_equal_state(plain, warm, exact=False)
    warm.forward.epoch.fill_(2)
    plain.forward.epoch.fill_(2)
    plain(images, labels), warm(images, labels)
    assert not torch.allclose(plain.model.conv1.weight, warm.model.conv1.weight, atol=1e-6)
    assert plain.model.bn1.num_batches_tracked == warm.model.bn1.num_batches_tracked


@pytest.mark.parametrize("capture", [False, "fake"])
@pytest.mark.parametrize("defense", ["at", "fat"])
def test_an_attack_that_stands_still_is_noticed(capture, defense):
    """A NaN gradient has no sign: the images stay fine, the training terms too, and the attack is none."""
    step = step_of(fastarat.DEFENSES[defense](), num_steps=3, capture=capture)
    images, labels = batch()
    step(images, labels)
    assert step.meter.bad() is None
    run, sick = step.attacker.__class__.__call__, []

    def logits(self, points):
        out = run(self, points)
        return out + float("nan") if sick and points.requires_grad else out

    step.attacker.__class__ = type("Sick", (step.attacker.__class__,), {"__call__": logits})
    sick.append(1)
    terms = step(images, labels)
    assert all(v.isfinite() for v in terms.values())
    assert step.meter.bad() == (1, "the attack's objective")
    assert "the attack's objective" not in step.meter.read()


def test_the_objective_is_the_sum_over_steps_and_restarts():
    model, (images, labels) = small_model().eval(), batch()
    seen = []

    def objective(logits, target):
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        seen.append(loss.sum().item())
        return loss

    options = {"epsilon": 0.1, "step_size": 0.05, "objective": objective}
    found = fastarat.attacks.pgd(model, images, labels, labels, images, num_steps=3, **options)
    assert found.objective.item() == pytest.approx(sum(seen))
    runs = [
        lambda n=n: fastarat.attacks.pgd(model, images, labels, labels, images, num_steps=n, **options) for n in (1, 2)
    ]
    del seen[:]
    both = fastarat.attacks.strongest(model, runs, labels)
    assert both.objective.item() == pytest.approx(sum(seen))
    none = fastarat.attacks.pgd(model, images, labels, labels, images, num_steps=0, **options)
    assert none.objective is None
