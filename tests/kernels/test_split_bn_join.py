"""Two BatchNorms added, against the same in two calls of split_bn; and gradients of every other pixel."""

import pytest
import torch
import torch.nn.functional as F
from fastarat.kernels import fork, joins, pick_pointwise, split_bn, split_bn_join

import fastarat
from fastarat.nets.batchnorm import branch, route_of
from fastarat.nets.models import build_model, set_kernels

LAST = torch.channels_last


def images(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=LAST).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 64, 5, 5), (2, 2, 9, 4, 6), (2, 3, 72, 7, 7)], ids=str)
def test_is_two_batchnorms_added(dtype, forked, shape, device):
    groups, batch, channels, height, width = shape
    x, x2 = (images(groups * batch, channels, height, width, dtype=dtype, device=device) for _ in range(2))
    affine = [(torch.rand(groups, channels, device=device) + 0.5).requires_grad_() for _ in range(4)]
    leaves = (x, x2, *affine)

    def separate(x, x2, weight, bias, weight2, bias2):
        side = split_bn(x2, weight2, bias2, eps=1e-3, backend="plain")
        whole = split_bn(x, weight, bias, side.y, backend="plain")
        return whole.y, whole.mean, whole.var, side.mean, side.var

    exact = separate(*(t.detach().double().requires_grad_() for t in leaves))
    exact = exact[0].relu(), *exact[1:]
    found = split_bn_join(x, *affine[:2], x2, *affine[2:], eps2=1e-3)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.y.double(), exact[0], rtol=2 * rounding, atol=16 * rounding)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)

    weights = [torch.randn(found.y.shape, device=device).to(dtype) for _ in range(2)]
    mine = fork(found.y) if forked else (found.y, found.y)
    got = torch.autograd.grad(sum((y * w).sum() for y, w in zip(mine, weights, strict=True)), leaves)
    again = [t.detach().requires_grad_() for t in leaves]
    # The mask of our values: one within rounding of zero may fall either way.
    y = separate(*again)[0] * (found.y > 0)
    wanted = torch.autograd.grad(sum((y * w).sum() for w in weights), again)
    for ours, theirs in zip(got, wanted, strict=True):
        size = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(8 if dtype != torch.float32 else 64) * rounding * size)


def test_only_what_moves_gets_a_gradient():
    x, x2 = images(4, 8, 3, 3), images(4, 8, 3, 3).detach()
    ones = torch.ones(1, 8)
    y = split_bn_join(x, ones, ones, x2, ones, ones).y
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(dx).all()


def test_opcheck():
    ops = torch.ops.fastarat
    x, x2 = images(4, 9, 3, 3), images(4, 9, 3, 3)
    affine = [torch.rand(2, 9).requires_grad_() for _ in range(4)]
    torch.library.opcheck(ops.split_bn_join.default, (x, *affine[:2], x2, *affine[2:], 1e-5, 1e-5, True))


def test_joins_says_where_there_are_kernels():
    x = torch.zeros(2, 3, 4, 4)
    assert joins(x, x, "triton")
    assert not joins(x, x, "plain")
    assert not joins(x, x.bfloat16(), "triton")
    assert not joins(x, x[:, :, :2], "triton")


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["split_bn", "join", "conv"])
def test_a_strided_shortcut_hands_back_what_it_picked(size, training, kind, monkeypatch):
    from fastarat.kernels import conv, conv_bias_relu

    monkeypatch.setattr(conv, "_fused", lambda x, w, b, z, *a: torch.relu(F.conv2d(x, w, b, *a)))
    x, x2 = images(3, 8, *size), images(3, 8, *size)
    ones, main, side = torch.ones(1, 8), torch.randn(3, 8, *size), torch.randn(5, 8, 1, 1).requires_grad_()
    found = []
    for forked in (False, True):
        if kind == "conv":
            y = conv_bias_relu(x, torch.eye(8)[:, :, None, None], ones[0], backend="triton")
        elif kind == "join" and training:
            y = split_bn_join(x, ones, ones, x2, ones, ones).y
        else:
            running = None if training else (torch.zeros(1, 8), ones)
            y = split_bn(x, ones, ones, x2, True, running=running, backend="triton").y
        first, second = fork(y) if forked else (y, y)
        picked = pick_pointwise(second, side)
        assert torch.equal(picked, F.conv2d(y, side, stride=2))
        loss = (first * main).sum() + (picked * picked.detach()).sum()
        leaves = (x, side) if kind == "conv" else (x, x2, side)
        found.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_pick_alone_is_whole_again():
    x, side = images(3, 8, 5, 5), torch.randn(5, 8, 1, 1)
    ones = torch.ones(1, 8)
    found = []
    for forked in (False, True):
        y = split_bn(x, ones, ones, relu=True, backend="triton").y
        second = fork(y)[1] if forked else y
        found.append(torch.autograd.grad(pick_pointwise(second, side).square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet-small", "wrn-10-1"])
def test_a_step_is_the_same_in_fewer_passes(name, monkeypatch):
    """A training forward inside a step (joined, forked, picked) and anybody's, which is none of it."""
    model = fastarat.nets.batchnorm.split_batchnorm(build_model(name, num_classes=4))
    set_kernels(model, "triton")
    model.to(memory_format=LAST).train()
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    state, found, calls = {k: v.clone() for k, v in model.state_dict().items()}, [], []
    joined = fastarat.nets.batchnorm.split_bn_join
    monkeypatch.setattr(fastarat.nets.batchnorm, "split_bn_join", lambda *a, **k: (calls.append(1), joined(*a, **k))[1])
    for through in (branch(model, "clean", "adv"), route_of(model).through("clean", "adv")):
        model.load_state_dict(state)
        with through:
            logits = model(x)
        grads = torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])
        found.append([logits, *grads, *(v for k, v in model.state_dict().items() if "running" in k)])
    assert len(calls) == (2 if name == "resnet-small" else 0)  # its two blocks with a projection, in the second forward
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-6)


def test_a_shortcuts_weight_asked_for_alone_leaves_nothing_behind():
    """Its backward hands the picked gradient to a producer that this pass does not reach; the next pass is another's."""
    x, side = images(3, 8, 5, 5), torch.randn(5, 8, 1, 1, requires_grad=True)
    ones = torch.ones(1, 8)
    first, second = fork(split_bn(x, ones, ones, relu=True, backend="triton").y)
    torch.autograd.grad(pick_pointwise(second, side).square().sum(), side, retain_graph=True)
    found = torch.autograd.grad(first.square().sum(), x)[0]
    y = split_bn(x, ones, ones, relu=True, backend="triton").y
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("defense", [fastarat.Standard(), fastarat.ARAT(), fastarat.AT()], ids=lambda d: d.name)
def test_no_two_gradients_share_memory(defense):
    """Whoever scales, clips or adds up gradients in place does it to each once."""
    model = build_model("resnet-small", num_classes=4)
    step = fastarat.TrainStep(model, defense, torch.empty(2, 3, 8, 8), num_steps=1, kernels="triton")
    step(torch.rand(4, 3, 8, 8), torch.arange(4))
    addresses = [p.grad.data_ptr() for p in step.parameters if p.grad is not None]
    assert len(addresses) > 20
    assert len(set(addresses)) == len(addresses)


def test_layers_of_somebodys_own_are_called():
    """A convolution that does more than its weight, and a norm that is no BatchNorm, in a projection shortcut."""

    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build_model("resnet-small", num_classes=4)
    old = model.layer2[0].shortcut[0]
    model.layer2[0].shortcut[0] = Doubled(old.in_channels, old.out_channels, 1, 2, bias=False)
    model.layer3[0].shortcut[1] = torch.nn.GroupNorm(4, 64)
    set_kernels(model, "triton")
    images, found = torch.rand(4, 3, 8, 8), []
    for through in (branch(model, "adv"), route_of(model).through("adv")):
        with through:
            found.append(model(images))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
