"""`fastarat.SGD`: torch.optim.SGD's numbers and checkpoints, and copies that are never stale."""

import contextlib
import copy

import pytest
import torch
from test_graphs import batch, small_model

import fastarat
from fastarat.data import Batch
from fastarat.optim import SGD, lay_out_state

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
    )


def copies_of(model, dtype=torch.bfloat16):
    return {p: torch.empty_like(p, dtype=dtype, requires_grad=False) for p in model.parameters() if p.dim() >= 2}


def train(model, optimizer, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(4, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("backend", ["auto", "plain", "triton"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_numbers_are_those_of_pytorch(backend, nesterov):
    model = network().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    theirs = train(twin, torch.optim.SGD(twin.parameters(), nesterov=nesterov, fused=True, **OPTIONS))
    optimizer = SGD(model.parameters(), nesterov=nesterov, backend=backend, **OPTIONS)
    kept = copies_of(model)
    optimizer.keep_copies(kept)
    assert all(torch.equal(c, p.detach().bfloat16()) for p, c in kept.items())
    ours = train(model, optimizer)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p, c in kept.items():
        assert (c.float() - p.detach()).abs().max() <= p.detach().abs().max() / 128
        assert p.grad is not None
    optimizer.refresh()
    assert all(torch.equal(c, p.detach().bfloat16()) for p, c in kept.items())


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_checkpoints_go_both_ways_and_between_memory_formats(backend):
    first, second = network(), network().to(memory_format=torch.channels_last)
    theirs = torch.optim.SGD(first.parameters(), fused=True, **OPTIONS)
    ours = SGD(second.parameters(), backend=backend, **OPTIONS)
    ours.keep_copies(copies_of(second))
    train(first, theirs)
    second.load_state_dict(first.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for a, b in zip(train(first, theirs, seed=1), train(second, ours, seed=1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    first.load_state_dict(second.state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    lay_out_state(theirs)
    for a, b in zip(train(first, theirs, seed=2), train(second, ours, seed=2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_resumed_step_minds_the_memory_format():
    """A fused optimiser pairs weights and momentum by address: a checkpoint of another layout would be misread."""
    made = [
        fastarat.TrainStep(small_model(), fastarat.AT(), torch.empty(2, 3, 8, 8), epsilon=1e-6, num_steps=1,
                           channels_last=last) for last in (False, True)
    ]  # fmt: skip
    made[0](*batch())
    made[1].load_state_dict(copy.deepcopy(made[0].state_dict()))
    for step in made:
        step.generator.manual_seed(1)
        step(*batch(seed=1))
    for a, b in zip(*(step.model.parameters() for step in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["momentum", "scaled", "closure", "float64", "transposed", "one has no gradient"])
def test_what_the_kernel_does_not_know_is_pytorchs(why, monkeypatch):
    model = network()
    if why == "float64":
        model.double()
    if why == "transposed":
        model[3].weight = torch.nn.Parameter(torch.randn(8 * 36, 4).T)
    options = OPTIONS | ({"momentum": 0.0} if why == "momentum" else {})
    optimizer = SGD(model.parameters(), backend="triton", **options)
    kept = copies_of(model)
    optimizer.keep_copies(kept)
    called = []
    monkeypatch.setattr(fastarat.optim, "sgd_update", lambda *a, **k: called.append(len(a[0])))
    image = torch.rand(4, 3, 8, 8, dtype=next(model.parameters()).dtype)
    before = {p: p.detach().clone() for p in model.parameters()}

    def closure():
        optimizer.zero_grad()
        loss = model(image).square().mean()
        loss.backward()
        return loss

    if why == "closure":
        assert optimizer.step(closure) > 0
    else:
        closure()
        if why == "scaled":
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        if why == "one has no gradient":
            model[0].weight.grad = None
        optimizer.step()
    assert called == ([1] if why == "one has no gradient" else [])
    assert torch.equal(model[0].weight, before[model[0].weight]) == (why == "one has no gradient")
    assert not torch.equal(model[0].bias, before[model[0].bias])
    if not called:
        assert all(torch.equal(c, p.detach().to(c.dtype)) for p, c in kept.items())


def step_with(optimizer, **options):
    torch.manual_seed(0)
    return fastarat.TrainStep(
        small_model(), fastarat.AT(), torch.empty(2, 3, 8, 8), optimizer=optimizer, epsilon=0.1, num_steps=2,
        precision="bf16", **options,
    )  # fmt: skip


def assert_fresh(step, exact=True):
    own = dict(step.model.named_parameters())
    with step._attack_weights("train"):
        assert len(step.forward.weights) > 5
        for name, used in step.forward.weights.items():
            p = own[name].detach()
            assert torch.equal(used, p.bfloat16()) if exact else (used - p).abs().max() <= p.abs().max() / 128


@pytest.mark.parametrize("capture", [False, "fake"])
@pytest.mark.parametrize("backend", ["plain", "triton"])
@pytest.mark.parametrize("awp", [None, 0.01])
def test_a_step_is_the_one_with_pytorchs_sgd(capture, backend, awp):
    ours = step_with(lambda p: SGD(p, backend=backend, **OPTIONS), capture=capture, awp=awp)
    theirs = step_with(lambda p: torch.optim.SGD(p, fused=True, **OPTIONS), awp=awp)
    assert (ours.one_pass, theirs.one_pass) == (True, False)
    for i in range(3):
        images, labels = batch(seed=i)
        a, b = ours(images, labels), theirs(images, labels)
        exact = backend == "plain"
        a, b = (sum(terms.values()) for terms in (a, b))
        torch.testing.assert_close(a, b, rtol=0 if exact else 0.02, atol=0 if exact else 0.02)
        assert_fresh(ours, exact or awp is not None)  # weights that AWP pulls back are cast by PyTorch
    if backend == "plain":
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("capture", [False, "fake"])
@pytest.mark.parametrize("write", ["load", "in place", "step's load"])
def test_weights_written_between_steps_are_cast_again(capture, write):
    step = step_with(lambda p: SGD(p, backend="plain", **OPTIONS), capture=capture)
    images, labels = batch()
    step(images, labels)
    state = {k: v + 0.5 if v.is_floating_point() else v for k, v in step.model.state_dict().items()}
    if write == "load":
        step.model.load_state_dict(state)
    elif write == "step's load":
        step.load_state_dict(step.state_dict() | {"model": state})
    else:
        with torch.no_grad():
            for p in step.model.parameters():
                p += 0.5
    used = []
    weights_of = step._attack_weights
    own = dict(step.model.named_parameters())

    def looked_at(mode):
        used.append(all(torch.equal(c, own[name].detach().bfloat16()) for name, c in step._low.items()))
        return weights_of(mode)

    step._attack_weights = looked_at
    step(images, labels)
    assert used
    assert all(used)


def test_a_capture_holds_no_cast_of_its_own():
    """The graph's step relies on the copies its own optimiser writes: casting in it would be the pass that is saved."""
    step = step_with(lambda p: SGD(p, backend="plain", **OPTIONS), capture="fake")
    images, labels = batch()
    casts = []
    refresh = step.optimizer.refresh
    step.optimizer.refresh = lambda: (casts.append(1), refresh())
    step(images, labels)
    casts.clear()
    step(images, labels)
    assert len(casts) == 1  # the plain twin's own, after PyTorch's step


def test_a_defense_that_writes_weights_after_the_step():
    class Pulling(fastarat.AT):
        def after_step(self, companions, model, step):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

    torch.manual_seed(0)
    step = fastarat.TrainStep(
        small_model(), Pulling(), torch.empty(2, 3, 8, 8), optimizer=lambda p: SGD(p, backend="triton", **OPTIONS),
        epsilon=0.1, num_steps=1, precision="bf16", capture="fake",
    )  # fmt: skip
    for i in range(2):
        step(*batch(seed=i))
        assert_fresh(step)


def test_an_averaged_network_is_attacked_with_its_own_weights():
    """averaged_model puts another network in the step's place; the copies the optimiser writes are not its weights."""
    from fastarat.averages import averaged_model

    step = step_with(lambda p: SGD(p, backend="plain", **OPTIONS))
    images, labels = batch()
    step(images, labels)
    average = fastarat.averages.WeightAverage(step.model)
    average.update(step.model)
    for mean in average.parameters:
        mean.add_(1.0)
    seen = []
    weights_of = step._attack_weights

    @contextlib.contextmanager
    def looked_at(mode):
        with weights_of(mode):
            own = dict(step.model.named_parameters())
            seen.append(all(torch.equal(c, own[n].detach().bfloat16()) for n, c in step.forward.weights.items()))
            yield

    step._attack_weights = looked_at
    averaged = averaged_model(step, average, [Batch(images, labels, torch.arange(len(labels)))])
    assert seen == [True]
    assert averaged is not step.model
    step._attack_weights = weights_of
    step._cast_if_written()
    assert_fresh(step)
