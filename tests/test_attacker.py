"""The network as the attack sees it: its weights are made anew at every step, everything else is the model's own."""

import contextlib
import copy

import pytest
import torch
from small import batch, small_model, step_of
from torch import nn
from torch.nn.utils import parametrizations

import fastarat
from fastarat.ascent import kl
from fastarat.averages import WeightAverage, averaged_model
from fastarat.data import Batch
from fastarat.engine.step import lay_out_state
from fastarat.nets.attacker import Attacker, frozen
from fastarat.nets.convs import FoldedConv
from fastarat.nets.models import build_model

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def attacker_of(model, **options):
    attacker = Attacker(model, **options)
    attacker.refresh()
    return attacker


def assert_folding_changes_nothing(model, x):
    """Logits and input gradients of an eval-mode network in float64, folded and not."""
    folded = attacker_of(model, fold=True)
    assert folded.folds
    grads, logits = [], []
    for network in (model, folded):
        point = x.clone().requires_grad_()
        logits.append(network(point))
        grads.append(torch.autograd.grad(logits[-1].square().sum(), point)[0])
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "resnet-small"])
@pytest.mark.parametrize("split", [True, False])
def test_folding_changes_nothing_but_rounding(name, split):
    torch.manual_seed(0)
    model = build_model(name, num_classes=4).double()
    model = fastarat.split_batchnorm(model) if split else model
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model(x)  # running statistics off their start
    model.eval()
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, "running_mean") and m.running_mean is not None:
                m.running_mean.add_(0.1 * torch.rand_like(m.running_mean))
    before = copy.deepcopy(model.state_dict())
    assert_folding_changes_nothing(model, x)
    assert not any(isinstance(m, FoldedConv) for m in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert len(list(model.foldable())) >= 6


def test_folded_attacks_follow_the_weights():
    """The fold is made anew each step: after an update the attack is the unfolded one on the new weights."""
    images, labels = batch()
    made = [step_of(fastarat.AT(), num_steps=3, bn="eval", fold_bn=fold) for fold in (True, False)]
    assert [s.attacker.folds for s in made] == [True, False]
    for i in range(3):
        for s in made:
            s.generator.manual_seed(i)
        a, b = (s.attack(images, labels).images for s in made)
        assert ((a - b).abs() > 1e-5).float().mean() < 0.01
        for s in made:
            s(images, labels)


def test_full_precision_attacks_the_model_itself():
    model = small_model()
    assert attacker_of(model).network is model
    assert attacker_of(model, precision="tf32").network is model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_twin_has_its_own_weights_and_the_models_everything_else(precision):
    model = fastarat.split_batchnorm(small_model())
    model.register_buffer("scale", torch.ones(()))
    attacker = attacker_of(model, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    twins = dict(attacker.network.named_parameters())
    layers = {id(p) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters(False)}
    for name, p in model.named_parameters():
        if id(p) in layers:
            assert torch.equal(twins[name], p.detach().to(dtype))
            assert not twins[name].requires_grad
        else:
            assert twins[name] is p
    assert attacker.network.scale is model.scale
    assert attacker.network.bn1 is model.bn1
    assert type(attacker.network) is type(model)
    addresses = {name: p.data_ptr() for name, p in twins.items()}
    attacker.refresh()  # in place: a captured step reads by address
    assert {name: p.data_ptr() for name, p in attacker.network.named_parameters()} == addresses


@pytest.mark.parametrize("how", ["as ever", "attack replaced", "no attack"])
def test_a_training_forward_is_lent_the_weights_as_they_are(how):
    """What was cast for the attack serves the training forward, whoever crafts the images: the bits of autocast's own."""
    states = []
    for lent in (True, False):
        torch.manual_seed(0)
        step = bf16_step(fastarat.Standard() if how == "no attack" else fastarat.AT(), attack_bn="train")
        if "replaced" in how:
            step.attack = lambda images, labels: fastarat.ascent.Attacked(images.clone(), None)
        if not lent:
            step.attacker.lend = dict
        for seed in range(3):
            torch.manual_seed(seed)
            step(torch.rand(4, 3, 8, 8), torch.arange(4))
        assert step.meter.bad() is None
        states.append(step.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class Noisy(fastarat.AT):
    """Writes weights in its own forward, without a trace."""

    def forward(self, run, companions, images, labels, attacked):
        for p in run.model.parameters():
            p.data.mul_(1.5)
        views = super().forward(run, companions, images, labels, attacked)
        for p in run.model.parameters():
            p.data.div_(1.5)
        return views


def test_a_forward_that_writes_weights_is_not_lent_old_ones():
    losses = []
    for defense in (fastarat.AT(), Noisy()):
        torch.manual_seed(0)
        losses.append(sum(bf16_step(defense)(torch.rand(4, 3, 8, 8), torch.arange(4)).values()).item())
    assert abs(losses[0] - losses[1]) > 0.01


def test_weights_written_since_are_not_lent():
    step = bf16_step(fastarat.AT())
    step.attacker.refresh()
    assert step.attacker.lend()
    with torch.no_grad():
        step.model.linear.weight.add_(1)
    assert step.attacker.lend() == {}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_made_of_others_is_not_lent():
    model = small_model()
    torch.nn.utils.spectral_norm(model.layer1[0].conv1)
    step = fastarat.TrainStep(model, fastarat.AT(), torch.empty(2, 3, 8, 8), precision="bf16", num_steps=1)
    step(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert step.meter.bad() is None
    assert not any("layer1.0.conv1" in name for name in step.attacker.lend())


def assert_fresh(step):
    """What the next attack reads is the weights as they are."""
    own = dict(step.model.named_parameters())
    step.attacker.refresh()
    used = {n: p for n, p in step.attacker.network.named_parameters() if p.dtype == torch.bfloat16}
    assert len(used) > 5
    assert all(torch.equal(p, own[name].detach().bfloat16()) for name, p in used.items())


def bf16_step(defense=None, **options):
    options["optimizer"] = lambda p: torch.optim.SGD(p, fused=True, **OPTIONS)
    return step_of(defense or fastarat.AT(), num_steps=2, precision="bf16", **options)


@pytest.fixture
def attacked_with_its_weights(monkeypatch):
    """Whether each attack's weights were the model's, collected as attacks happen."""
    seen, call = [], Attacker.__call__

    def looked_at(self, points):
        own = dict(self.model.named_parameters())
        low = [(n, p) for n, p in self.network.named_parameters() if p.dtype == torch.bfloat16]
        seen.append(bool(low) and all(torch.equal(p, own[n].detach().bfloat16()) for n, p in low))
        return call(self, points)

    monkeypatch.setattr(Attacker, "__call__", looked_at)
    return seen


@pytest.mark.parametrize("capture", ["off", "fake"])
@pytest.mark.parametrize("write", ["load", "in place", "through data", "step's load", "another object"])
def test_weights_written_between_steps_are_what_is_attacked(capture, write, attacked_with_its_weights):
    step = bf16_step(capture=capture)
    images, labels = batch()
    step(images, labels)
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in step.model.state_dict().items()}
    if write == "load":
        step.model.load_state_dict(state)
    elif write == "step's load":
        step.load_state_dict(step.state_dict() | {"model": state})
    elif write == "another object":
        step.model.conv1.weight = nn.Parameter(step.model.conv1.weight.detach() + 0.5)
    else:
        with torch.no_grad():
            for p in step.model.parameters():
                (p.data if write == "through data" else p).add_(0.5)
    attacked_with_its_weights.clear()
    step(images, labels)
    assert len(attacked_with_its_weights) >= 2
    assert all(attacked_with_its_weights)


@pytest.mark.parametrize("awp", [None, 0.01])
def test_a_defense_that_writes_weights_after_the_step(awp):
    class Pulling(fastarat.AT):
        def after_step(self, companions, model, step):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

    step = bf16_step(Pulling(), capture="fake", awp=awp)
    for i in range(2):
        step(*batch(seed=i))
        assert_fresh(step)


def test_an_averaged_network_is_attacked_with_its_own_weights(attacked_with_its_weights):
    step = bf16_step()
    images, labels = batch()
    step(images, labels)
    average = WeightAverage(step.model)
    average.update(step.model)
    for mean in average.parameters:
        mean.add_(1.0)
    attacked_with_its_weights.clear()
    own = step.model
    averaged = averaged_model(step, average, [Batch(images, labels, torch.arange(len(labels)))])
    assert attacked_with_its_weights == [True, True]
    assert averaged is not step.model
    assert step.model is step.attacker.model is own
    assert_fresh(step)


def test_a_layer_or_setting_changed_between_steps_is_what_is_attacked():
    class Net(nn.Module):
        gain = 1.0

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x):
            return self.gain * self.fc(x.flatten(1))

    model, x = Net(), torch.rand(2, 3, 2, 2)
    attacker = Attacker(model, precision="bf16")
    for change in (lambda: None, lambda: setattr(model, "gain", 3.0), lambda: setattr(model, "fc", nn.Linear(12, 4))):
        change()
        attacker.refresh()
        torch.testing.assert_close(attacker(x).float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("capture", ["off", "fake"])
def test_a_batchnorm_layer_replaced_between_steps_is_routed_and_moves(capture):
    step = step_of(fastarat.ARAT(), capture=capture)
    step(*batch())
    for name in ("bn1", "layer2"):  # the first layer, and a block in the middle, their own routes with them
        setattr(step.model, name, copy.deepcopy(getattr(step.model, name)))
    norms = step.model.bn1, step.model.layer2[0].bn1
    assert norms[0].route is not norms[1].route
    before = [(m.running_mean.clone(), m.clean.running_mean.clone()) for m in norms]
    step(*batch(seed=1))
    for m, (adv, clean) in zip(norms, before, strict=True):
        assert not torch.equal(m.running_mean, adv)
        assert not torch.equal(m.clean.running_mean, clean)
        assert m.clean.num_batches_tracked == 2


def test_tied_parametrised_and_hooked_weights_are_followed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
            self.two.weight = self.one.weight
            self.normed = parametrizations.weight_norm(nn.Linear(12, 12))
            with pytest.warns(FutureWarning):
                self.hooked = nn.utils.weight_norm(nn.Linear(12, 4))

        def forward(self, x):
            return self.hooked(self.normed(self.two(self.one(x.flatten(1)))))

    model, x = Net(), torch.rand(2, 3, 2, 2)
    called = []
    model.one.register_forward_hook(lambda *_: called.append(1))
    attacker = Attacker(model, precision="bf16")
    for _ in range(2):
        attacker.refresh()
        called.clear()
        found = attacker(x)
        assert called == [1]
        torch.testing.assert_close(found.float(), model(x), rtol=0.05, atol=0.05)
        assert attacker.network.one.weight is attacker.network.two.weight
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3)


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_step_minds_the_memory_format(fused):
    """A fused optimiser pairs weights and momentum by address: a checkpoint of another layout would be misread."""
    options = {"epsilon": 1e-6, "optimizer": lambda p: torch.optim.SGD(p, fused=fused, **OPTIONS)}
    made = [step_of(fastarat.AT(), channels_last=last, **options) for last in (False, True)]
    made[0](*batch())
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
    for p, state in made[1].optimizer.state.items():
        assert state["momentum_buffer"].stride() == p.stride()
    lay_out_state(made[1].optimizer)  # once more changes nothing
    for step in made:
        step.generator.manual_seed(1)
        step(*batch(seed=1))
    torch.testing.assert_close(*(list(step.model.parameters()) for step in made), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_convolution_replaced_between_steps_is_folded_anew(precision):
    step = step_of(fastarat.AT(), bn="eval", precision=precision)
    step(*batch())
    step.model.layer2[0].conv2 = nn.Conv2d(32, 32, 3, 1, 1, bias=False)
    step.model.linear = nn.Linear(64, 4)
    step(*batch(seed=1))
    step.model.eval()
    step.attacker.refresh()
    point = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(step.attacker(point).float(), step.model(point), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("place", ["conv1", "conv2", "shortcut"])
@pytest.mark.parametrize("change", ["bias", "groups", "dilation", "padding", "circular", "act", "no affine"])
def test_what_cannot_be_folded_is_not(place, change):
    model = small_model()
    block = model.layer2[0]
    one, owner, name = (
        (block.shortcut[0], block.shortcut, "0") if place == "shortcut" else (getattr(block, place), block, place)
    )
    (kernel, _), (stride, _), shape = one.kernel_size, one.stride, (one.in_channels, one.out_channels, *one.kernel_size)
    norm = {"conv1": block.bn1, "conv2": block.bn2, "shortcut": block.shortcut[-1]}[place]
    options = {"bias": {"bias": True}, "groups": {"groups": 2}, "padding": {"padding": "same"} if stride == 1 else {},
               "dilation": {"dilation": 2, "padding": kernel - 1}, "circular": {"padding_mode": "circular"}}  # fmt: skip
    if change in options:
        new = {"padding": kernel // 2, "stride": stride, "bias": False} | options[change]
        setattr(owner, name, nn.Conv2d(*shape[:2], kernel, **new))
    elif change == "act":
        norm.act = nn.Tanh()
    else:
        norm.weight = norm.bias = None
        norm.affine = False
    x = torch.rand(4, 3, 8, 8)
    model(x)
    model.eval()
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):
        attacker = attacker_of(model, fold=True, precision=precision, exact=True)
        assert attacker.folds
        torch.testing.assert_close(attacker(x).float(), model(x), rtol=tolerance, atol=tolerance)
        point, grads = x.clone().requires_grad_(), []
        for inside in (contextlib.nullcontext(), attacker.route.through("adv")):
            with inside, frozen(model):
                loss = (attacker.exact if grads else model)(point).square().sum()
            grads.append(torch.autograd.grad(loss, point)[0])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet-small", "preactresnet18"])
def test_an_exact_first_step_is_folded_too(name):
    """KL from a thousandth away, where half precision sees rounding: the folded twin's gradient is the network's."""
    torch.manual_seed(0)
    model = fastarat.split_batchnorm(build_model(name, num_classes=4))
    images = torch.rand(4, 3, 16, 16)
    for _ in range(4):
        model(images)
    attacker = attacker_of(model.eval(), fold=True, precision="bf16", exact=True)
    made = [m for m in attacker.exact_network.modules() if isinstance(m, FoldedConv)]
    assert len(made) == len(list(model.foldable()))
    assert {m.weight.dtype for m in made} == {torch.float32}
    points = images + 1e-3 * torch.randn_like(images)
    grads = []
    for forward in (copy.deepcopy(model).double(), model, attacker.exact, attacker):
        around = [x.double() if not grads else x for x in (points, images)]
        point = around[0].requires_grad_()
        grads.append(torch.autograd.grad(kl(forward(point), forward(around[1]).detach()).sum(), point)[0])
    wanted, unfolded, found, low = (g.double() for g in grads)
    # Rounding has the last word on a gradient this small: it may take as much of the folded one as of the other.
    assert (found - wanted).norm() < 2 * (unfolded - wanted).norm() < 0.02 * wanted.norm()
    large = wanted.abs() > 1e-2 * wanted.abs().max()
    assert large.float().mean() > 0.5
    assert torch.equal(found.sign()[large], wanted.sign()[large])
    assert (low.sign() != wanted.sign())[large].float().mean() > 0.02, "half precision would have done"


def test_the_float32_twin_is_made_where_it_is_used():
    model = small_model()
    for options in ({"fold": True}, {"exact": True}, {"fold": True, "exact": True, "precision": "fp32"}):
        attacker = attacker_of(model, **{"precision": "bf16"} | options)
        assert attacker.exact_network is model
    for defense, exact in ((fastarat.AT(), False), (fastarat.TRADES(), True), (fastarat.CURE(), True)):
        step = step_of(defense, precision="bf16", bn="eval")
        step.attack(*batch())
        assert step.starts_exactly == exact
        assert (step.attacker.exact_network is not step.model) == exact


def test_nothing_is_folded_for_a_step_that_does_not_attack():
    assert not step_of(fastarat.Standard(), bn="eval").attacker.folds


@pytest.mark.parametrize("defense", [fastarat.TRADES, fastarat.LBGAT])
def test_a_step_with_a_folded_first_step(defense):
    crafted, losses, passes = [], [], []
    for fold in (False, True):
        step = step_of(
            defense(), num_steps=3, precision="bf16", fold_bn=fold, optimizer=lambda p: torch.optim.SGD(p, lr=0.01)
        )
        count = [0]
        step.model.bn1.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        images, labels = batch(32)
        for i in range(3):
            losses.append(sum(v.item() for v in step(images, labels).values()))
            count[0] = 0
            step.generator.manual_seed(i)
            crafted.append(step.attack(images, labels).images)
            passes.append(count[0])
        step.model.eval()
        torch.testing.assert_close(step.attacker.exact(images), step.model(images), rtol=0.01, atol=0.01)
    assert passes == [4] * 3 + [0] * 3
    assert losses[:3] == pytest.approx(losses[3:], rel=0.1)
    for unfolded, folded in zip(crafted[:3], crafted[3:], strict=True):
        assert ((unfolded - folded).abs() > 1e-5).float().mean() < 0.2


def test_modules_with_slots_or_arguments_of_their_own_have_twins():
    class Slots(nn.Linear):
        __slots__ = ("factor",)

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.factor = 2.0

        def forward(self, x):
            return super().forward(x) * self.factor

    class NewArguments(nn.Linear):
        def __new__(cls, width, count):
            return super().__new__(cls)

    model, x = nn.Sequential(nn.Flatten(), Slots(12, 8), NewArguments(8, 4)), torch.rand(2, 3, 2, 2)
    torch.testing.assert_close(attacker_of(model, precision="bf16")(x).float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("use", ["evaluate", "PGD", "branch", "step"])
def test_a_network_used_within_another_between_steps_goes_on_as_before(use):
    class Both(nn.Module):
        def __init__(self, *networks):
            super().__init__()
            self.networks = nn.ModuleList(networks)

        def forward(self, x):
            return sum(network(x) for network in self.networks)

    images, labels = batch()
    step = step_of(fastarat.ARAT())
    step(images, labels)
    both = Both(fastarat.split_batchnorm(small_model()), step.model)
    if use == "evaluate":
        fastarat.evaluate(both.eval(), (images, labels), "clean", progress=False)
    elif use == "PGD":
        fastarat.attacks.PGD(both, epsilon=0.1, num_steps=1)(images, labels)
    elif use == "step":
        fastarat.TrainStep(both, fastarat.AT(), images, epsilon=0.1, num_steps=1)
    else:
        with fastarat.branch(both, "adv"):
            both(images)
    before = int(step.model.bn1.clean.num_batches_tracked), step.model.bn1.clean.running_mean.clone()
    step(images, labels)
    assert step.model.bn1.clean.num_batches_tracked == before[0] + 1
    assert not torch.equal(step.model.bn1.clean.running_mean, before[1])


@pytest.mark.parametrize(("defense", "refused"), [
    (fastarat.ARREST(), True), (fastarat.CURE(), True), (fastarat.CURE(warmup_epochs=1), False), (fastarat.AT(), False),
])  # fmt: skip
def test_a_network_that_is_not_known_to_be_trained_is_refused_where_that_matters(defense, refused):
    model, example = fastarat.build_model("resnet-small", num_classes=4), torch.empty(2, 3, 8, 8)
    if not refused:
        fastarat.TrainStep(model, defense, example)
        return
    with pytest.raises(fastarat.UserError, match=r"starts from a standardly trained network.*load_start"):
        fastarat.TrainStep(model, defense, example)
    model.started_from = "memory"
    fastarat.TrainStep(model, defense, example)


@pytest.mark.parametrize(("branches", "updates", "words"), [
    ((), None, "names no branch"), (("adv",), ("advv",), "'advv' is not among"), (("ad",), None, "unknown BatchNorm branch 'ad'"),
])  # fmt: skip
def test_a_forward_of_ones_own_that_names_no_branch_is_told(branches, updates, words):
    class Mine(fastarat.AT):
        splits = True

        def forward(self, run, companions, images, labels, attacked):
            logits, _ = run(attacked.images, *branches, updates=updates)
            return run.views(labels, logits_adv=logits)

    with pytest.raises(fastarat.UserError, match=words):
        step_of(Mine())(*batch())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_no_bit(precision):
    """Lightning and accelerate call a step under autocast in mixed precision; the step's precision is its own."""
    alone, called = (step_of(num_steps=2, precision=precision) for _ in range(2))
    for seed in range(2):
        terms = alone(*batch(seed=seed))
        with torch.autocast("cpu", torch.bfloat16):
            within = called(*batch(seed=seed))
            assert torch.is_autocast_enabled("cpu")
        assert all(torch.equal(terms[name], within[name]) for name in terms)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters, called.parameters, strict=True))
