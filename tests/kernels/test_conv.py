"""The fused convolution: cuDNN's on a GPU; on a CPU its backward and its place in the networks, around a stand-in."""

import pytest
import torch
import torch.nn.functional as F
from costs import Additions
from fastarat.kernels import conv, conv_bias_relu, why_not_conv_bias_relu
from test_attacker import assert_folding_changes_nothing, attacker_of

import fastarat
from fastarat.nets.batchnorm import branch
from fastarat.nets.models import FoldedConv, build_model, set_kernels


def plainly(x, weight, bias, residual, stride, padding):
    y = F.conv2d(x, weight, bias, stride, padding)
    return F.relu(y if residual is None else y + residual)


@pytest.fixture
def stand_in(monkeypatch):
    """Outside a GPU: the same mathematics in place of cuDNN's call, counted."""
    calls = []
    monkeypatch.setattr(conv, "_fused", lambda *a: (calls.append(a[3] is not None), plainly(*a))[1])
    monkeypatch.setattr(fastarat.nets.attacker, "why_not_conv_bias_relu", lambda device, dtype: None)
    return calls


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 1, 3), (2, 1, 3), (2, 0, 1)])
def test_gradients_are_those_of_the_parts(stand_in, add, stride, padding, kernel):
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    side = 8 // stride
    z = torch.randn(3, 6, side, side, dtype=torch.float64, requires_grad=True) if add else None
    sizes = {"stride": (stride, stride), "padding": (padding, padding)}
    found = conv_bias_relu(x, weight, bias, z, **sizes)
    wanted = plainly(x, weight, bias, z, *sizes.values())
    assert torch.equal(found, wanted)
    assert 0.2 < (wanted == 0).double().mean() < 0.8
    inputs = (x, z) if add else (x,)
    dy = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "plain", "added"), [("resnet18", 9, 8), ("preactresnet18", 8, 0), ("wrn-10-1", 3, 0)])
def test_a_folded_network_takes_it_everywhere_it_fits(stand_in, name, plain, added):
    model = build_model(name, num_classes=4).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model(x)
    model.eval()
    assert_folding_changes_nothing(model, x)
    assert (stand_in.count(False), stand_in.count(True)) == (plain, added)


def test_a_shortcut_has_no_bias_of_its_own():
    model = build_model("resnet18", num_classes=4).eval()
    network = attacker_of(model, fold=True).network
    biases = [m.bias is not None for m in network.modules() if isinstance(m, FoldedConv)]
    assert (biases.count(True), biases.count(False)) == (17, 3)


def test_where_it_cannot_be_had(monkeypatch):
    assert "cpu" in why_not_conv_bias_relu("cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert "deterministic" in why_not_conv_bias_relu("cuda", torch.bfloat16)


@pytest.mark.parametrize("broken", [RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nmore"), 1.1])
def test_an_answer_that_is_wrong_or_none_is_noticed(monkeypatch, broken):
    def fused(*args):
        if isinstance(broken, RuntimeError):
            raise broken
        return broken * plainly(*args)

    monkeypatch.setattr(conv, "_fused", fused)
    tried_out = conv._why_not.__wrapped__
    reason = tried_out(torch.device("cpu"), torch.float32)
    assert ("NOT_SUPPORTED" if isinstance(broken, RuntimeError) else "off by") in reason
    assert "more" not in reason
    monkeypatch.setattr(conv, "_fused", plainly)
    assert tried_out(torch.device("cpu"), torch.float32) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    if (reason := why_not_conv_bias_relu("cuda", dtype)) is not None:
        pytest.fail(f"attacks in eval mode do without it: {reason}")
    model = build_model("resnet18", num_classes=10).cuda().to(memory_format=torch.channels_last)
    images = torch.rand(8, 3, 32, 32, device="cuda")
    labels = torch.arange(8, device="cuda")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    crafted = []
    for fold in (False, True):
        step = fastarat.TrainStep(
            model, fastarat.AT(), images, precision=precision, num_steps=1, attack_bn="eval", fold=fold, capture=False
        )
        assert step.attacker.folds == fold
        crafted.append(step.attack(images, labels).images)
    differ = ((crafted[0] - crafted[1]).abs() > 1e-5).float().mean().item()
    assert differ < (0.02 if dtype == torch.float32 else 0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_captured_on_a_gpu():
    losses = []
    for fold in (False, True):
        torch.manual_seed(0)
        model = build_model("resnet18", num_classes=10).cuda()
        step = fastarat.TrainStep(
            model, fastarat.TRADES(), torch.empty(8, 3, 32, 32), precision="bf16", num_steps=3, fold=fold, capture=True,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
        )  # fmt: skip
        assert step.attacker.folds == fold
        generator = torch.Generator("cuda").manual_seed(0)
        for _ in range(3):
            images = torch.rand(8, 3, 32, 32, device="cuda", generator=generator)
            losses.append(sum(v.item() for v in step(images, torch.arange(8, device="cuda")).values()))
        assert step.meter.bad() is None
    assert losses[:3] == pytest.approx(losses[3:], rel=0.1)


def test_a_folded_network_adds_no_gradients(stand_in):
    model = build_model("resnet-small", num_classes=4).to(memory_format=torch.channels_last).eval()
    set_kernels(model.requires_grad_(False), "triton")
    attacker = attacker_of(model, fold=True)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for through, wanted in ((attacker.route.through("adv"), 0), (branch(model, "adv"), 3)):
        with through:
            loss = attacker(images).square().sum()
        with Additions() as additions:
            found.append(torch.autograd.grad(loss, images)[0])
        assert additions.count == wanted
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
