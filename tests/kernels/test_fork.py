"""A tensor forked for its two uses: the same gradients, no addition of its own, and nobody who could see half of one."""

import pytest
import torch
from costs import Additions
from fastarat.kernels import conv, conv_bias_relu, fork, pick_pointwise, split_bn
from torch import nn

import fastarat
from fastarat.nets.batchnorm import branch, grouped_batchnorm, route_of
from fastarat.nets.models import build_model, set_kernels


def normalised(x, residual=None, *, training=True, relu=True):
    ones, zeros = torch.ones(1, x.shape[1], dtype=torch.float32), torch.zeros(1, x.shape[1])
    running = None if training else (zeros, ones)
    return split_bn(x, ones, zeros, residual, relu, running=running, backend="triton").y


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_gradients_of_both_uses_meet_in_the_producer(training, relu, residual):
    x, z = (torch.randn(4, 9, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    leaves = (x, z) if residual else (x,)
    weights = torch.randn(2, 4, 9, 5, 5)
    found = []
    for forked in (False, True):
        y = normalised(x, z if residual else None, training=training, relu=relu)
        first, second = fork(y) if forked else (y, y)
        assert torch.equal(first, y)
        assert torch.equal(second, y)
        with Additions(900) as additions:
            found.append(torch.autograd.grad((first * weights[0]).sum() + (second * weights[1]).sum(), leaves))
        assert additions.count == (not forked)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", [0, 1])
def test_one_use_alone(use):
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    found = torch.autograd.grad(fork(normalised(x))[use].square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(normalised(x).square().sum(), x)[0])


def test_one_graph_differentiated_twice_keeps_nothing_between():
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    first, second = fork(normalised(x))
    both = torch.autograd.grad(first.square().sum() + second.sum(), x, retain_graph=True)[0]
    alone = torch.autograd.grad(first.square().sum(), x, retain_graph=True)[0]
    again = torch.autograd.grad(first.square().sum() + second.sum(), x)[0]
    torch.testing.assert_close(alone, torch.autograd.grad(normalised(x).square().sum(), x)[0])
    assert torch.equal(both, again)
    assert not torch.allclose(both, alone)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.relu(), lambda x: normalised(x)[:2], lambda x: x.detach()])
def test_other_tensors_stay_themselves(make):
    y = make(torch.randn(4, 8, 3, 3, requires_grad=True))
    assert fork(y)[0] is fork(y)[1] is y


def test_a_folded_convolution_takes_two(monkeypatch):
    monkeypatch.setattr(conv, "_fused", lambda x, w, b, z, *a: torch.relu(nn.functional.conv2d(x, w, b, *a)))
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, more = torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(2, 2, 6, 8, 8)
    found = []
    for forked in (False, True):
        y = conv_bias_relu(x, weight, bias, padding=(1, 1), backend="triton")
        first, second = fork(y) if forked else (y, y)
        with Additions(700) as additions:
            found.append(torch.autograd.grad((first * more[0]).sum() + (second * more[1]).sum(), x)[0])
        assert additions.count == (not forked)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.fixture
def network():
    model = build_model("resnet-small", num_classes=4)
    set_kernels(grouped_batchnorm(model), "triton")
    return model.to(memory_format=torch.channels_last).train()


def gradient(model, images, through):
    images = images.clone().requires_grad_()
    with through, Additions() as additions:
        return torch.autograd.grad(model(images).square().sum(), images)[0], additions.count


def test_a_network_adds_no_gradients_inside_a_step(network):
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    plain, added = gradient(network, images, branch(network, "adv"))  # anybody's forward: nothing is forked
    forked, left = gradient(network, images, route_of(network).through("adv"))
    assert (added, left) == (3, 0)
    torch.testing.assert_close(forked, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["layer1.0", "layer1.0.bn2", "layer2.0.conv1", ""])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_whoever_hooks_a_module_gets_whole_gradients(network, where, kind):
    route, held = route_of(network), []
    module = network.get_submodule(where)

    def keep(module, args, *output):
        (given,) = output or args[:1]
        if given.requires_grad:
            held.append(given)

    handle = getattr(module, kind)(keep)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for through in (route.through("adv"), branch(network, "adv")):
        held.clear()
        with through:
            found.append(torch.autograd.grad(network(images).square().sum(), held[0])[0])
    torch.testing.assert_close(*found)
    handle.remove()
    with route.through("adv"):
        assert route.forks
    assert not route.forks


def test_a_training_step_is_the_same(monkeypatch):
    """AR-AT with every kernel interpreted, forked and not: gradients are summed in another order, no more."""
    states = []
    for forks in (True, False):
        if not forks:
            monkeypatch.setattr(fastarat.nets.models, "fork", lambda x: (x, x))
        torch.manual_seed(0)
        model = build_model("resnet-small", num_classes=4)
        step = fastarat.TrainStep(
            model, fastarat.ARAT(), torch.empty(2, 3, 8, 8), num_steps=1, kernels="triton", step_size=1e-9
        )
        step(torch.rand(4, 3, 8, 8), torch.arange(4))
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_a_producer_is_forked_once():
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    weights = torch.randn(4, 4, 8, 3, 3)
    found = []
    for forked in (True, False):
        y = normalised(x)
        parts = (*fork(y), *fork(y)) if forked else (y,) * 4
        found.append(torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("twice", [True, False], ids=["picked twice", "picked and used"])
def test_a_side_has_any_number_of_uses(twice):
    x, side = torch.randn(4, 8, 5, 5, requires_grad=True), torch.randn(6, 8, 1, 1)
    found = []
    for forked in (True, False):
        y = normalised(x)
        first, second = fork(y) if forked else (y, y)
        other = pick_pointwise(second, side + 1) if twice else second.exp()
        loss = first.square().sum() + pick_pointwise(second, side).square().sum() + other.sum()
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_is_kept_of_hooks_is_not_copied(network):
    import copy
    import pickle

    route = route_of(network)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with route.through("adv"):
            assert not route.forks
        assert pickle.loads(pickle.dumps(route)).groups == route.groups
        assert not copy.deepcopy(network).bn1.route._hooks
    finally:
        handle.remove()
    with route.through("adv"):
        assert route.forks


@pytest.mark.parametrize("part", ["layer2.0.shortcut.0", "layer2.0.shortcut.1"])
def test_whoever_hooks_the_backward_of_a_shortcut_is_called(network, part):
    seen = []
    network.get_submodule(part).register_full_backward_hook(lambda *a: seen.append(1))
    gradient(network, torch.rand(2, 3, 8, 8), route_of(network).through("adv"))
    assert seen
