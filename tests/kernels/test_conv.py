"""The fused convolution: cuDNN's on a GPU; on a CPU its backward and its place in the networks, around a stand-in."""

import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from costs import Additions
from fastarat.kernels import (
    Norm,
    conv,
    conv_bias_relu,
    conv_kinds,
    fold_batchnorm,
    why_not_conv_bias_relu,
    why_not_fold,
)
from test_attacker import assert_folding_changes_nothing, attacker_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastarat
from fastarat.nets.batchnorm import branch
from fastarat.nets.convs import FoldedConv
from fastarat.nets.models import build_model, set_kernels


def plainly(x, weight, bias, residual, stride, padding):
    y = F.conv2d(x, weight, bias, stride, padding)
    return F.relu(y if residual is None else y + residual)


@pytest.fixture
def stand_in(monkeypatch):
    """Outside a GPU: the same mathematics in place of cuDNN's call, counted."""
    calls = []
    monkeypatch.setattr(conv, "_fused", lambda *a: (calls.append(a[3] is not None), plainly(*a))[1])
    monkeypatch.setattr(fastarat.nets.attacker, "why_not_conv_bias_relu", lambda device, dtype, kind: None)
    return calls


@pytest.fixture
def no_stems(monkeypatch):
    """A cuDNN, of a GPU that is not there, whose fused call lacks an engine for three channels; every call's width."""
    calls, tried_out = [], conv._why_not.__wrapped__

    def fused(x, weight, *args):
        if weight.shape[1] == 3:
            raise RuntimeError("No valid engine configs\nmore")
        calls.append(weight.shape[1])
        return plainly(x, weight, *args)

    monkeypatch.setattr(conv, "_fused", fused)
    on_cpu = functools.cache(lambda device, dtype, kind: tried_out(torch.device("cpu"), dtype, kind))
    monkeypatch.setattr(conv, "_why_not", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ask = conv.why_not_conv_bias_relu
    monkeypatch.setattr(
        fastarat.nets.attacker, "why_not_conv_bias_relu", lambda device, dtype, kind: ask("cuda", dtype, kind)
    )
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
    for kind in (conv.ConvKind(), conv.ConvKind(1, 2, add=True), conv.ConvKind(few=True)):
        reason = tried_out(torch.device("cpu"), torch.float32, kind)
        assert ("NOT_SUPPORTED" if isinstance(broken, RuntimeError) else "off by") in reason
        assert "more" not in reason
    monkeypatch.setattr(conv, "_fused", plainly)
    assert tried_out(torch.device("cpu"), torch.float32, kind) is None


def test_kinds_are_told_apart(no_stems):
    few = "3x3, few channels in"
    kinds = conv_kinds("cuda", torch.float32)
    assert list(kinds) == ["3x3", "3x3, residual", "3x3, stride 2", few]
    assert {kind for kind, reason in kinds.items() if reason is not None} == {few}
    assert "No valid engine" in kinds[few]
    assert why_not_fold("cuda", torch.float32) is None


@pytest.mark.parametrize("kind", [conv.ConvKind(), conv.ConvKind(add=True), conv.ConvKind(stride=2)], ids=str)
def test_nothing_is_folded_where_a_general_kind_fails(monkeypatch, no_stems, kind):
    ask = conv._why_not
    monkeypatch.setattr(conv, "_why_not", lambda *a: "broken" if a[2] == kind else ask(*a))
    assert why_not_fold("cuda", torch.float32) == "broken"


@pytest.mark.parametrize(("layer", "kind"), [
    (nn.Conv2d(15, 4, 3, 1, 1), conv.ConvKind(few=True, add=True)), (nn.Conv2d(16, 4, 1, 2), conv.ConvKind(1, 2, add=True)),
    (nn.Conv2d(16, 4, 3), None), (nn.Conv2d(16, 4, (3, 1), 1, (1, 0)), None), (nn.Conv2d(16, 4, 3, (1, 2), 1), None),
    (nn.Conv2d(16, 4, 3, 1, "same"), None), (nn.Conv2d(16, 4, 3, 1, 1, groups=2), None),
    (nn.Conv2d(16, 4, 3, 1, 1, dilation=2), None), (nn.Conv2d(16, 4, 3, 1, 1, padding_mode="circular"), None),
])  # fmt: skip
def test_the_kind_of_a_layer(layer, kind):
    assert conv.kind_of(layer, True) == kind


def test_where_a_stem_is_not_fused_the_rest_is(no_stems):
    model = build_model("resnet18", num_classes=4).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    model(x)
    model.eval()
    no_stems.clear()
    assert_folding_changes_nothing(model, x)
    assert len(no_stems) == 16 + 3  # each kind is tried out once
    folded = [m for m in attacker_of(model, fold=True).network.modules() if isinstance(m, FoldedConv)]
    assert [m.in_channels for m in folded if not m.fused and m.kernel_size == (3, 3)] == [3]


def test_a_stem_that_is_not_fused_keeps_its_kernel(device, no_stems):
    """Its images' gradient is float32, from the stem's own kernel, in the order of a bias and a ReLU around it."""
    model = build_model("resnet-small", num_classes=4).to(device, memory_format=torch.channels_last).eval()
    set_kernels(model.requires_grad_(False), "triton")
    with torch.no_grad():
        model.bn1.bias.uniform_(-1, 1)
    images = torch.rand(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    stem = attacker_of(model, fold=True, precision="bf16").network.conv1
    dy = torch.randn(2, 16, 8, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16), Calls() as calls:
        y = stem(images, relu=True)
        (found,) = torch.autograd.grad(y, images, dy.bfloat16())
    assert calls["fastarat::stem_input_grad"] == 1
    assert calls["aten::convolution_backward"] == 0
    wanted = F.relu(F.conv2d(images.bfloat16().float(), stem.weight.float(), stem.bias.float(), padding=1))
    torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
    dz = torch.where(y > 0, dy.bfloat16(), 0).double()
    torch.testing.assert_close(
        found.double(),
        torch.nn.grad.conv2d_input(images.shape, stem.weight.double(), dz, padding=1),
        rtol=1e-5,
        atol=1e-5,
    )


def norm_of(channels, device, dtype=torch.float32):
    made = torch.randn(3, channels, device=device)
    return Norm(*made.to(dtype), (0.1 + torch.rand(channels, device=device)).to(dtype), 1e-5)


def folded_by_hand(weight, norm, shortcut):
    """In float64 and with a division, as BatchNorm's definition has it."""
    std, side_std = ((n.var.double() + n.eps).sqrt() for n in (norm, shortcut))
    bias = norm.bias.double() - norm.mean.double() * norm.weight.double() / std
    side = shortcut.bias.double() - shortcut.mean.double() * shortcut.weight.double() / side_std
    return weight.double() * (norm.weight.double() / std)[:, None, None, None], bias, side


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "outputs innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "outputs in the middle": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "not dense": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("backend", ["triton", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (6, 3, 3, 3), (5, 130, 3, 3), (16, 8, 1, 1)], ids=str)
def test_folding_against_float64(backend, layout, of, shape, device):
    weight = LAYOUTS[layout](torch.randn(shape, device=device).to(of))
    norm, shortcut = (norm_of(shape[0], device, of) for _ in range(2))
    exact, bias, side = folded_by_hand(weight, norm, shortcut)
    for dtypes in ((torch.float32,), (torch.bfloat16,), (torch.float16, torch.float32)):
        for with_bias, with_shortcut in ((True, False), (True, True), (False, False)):
            into = [
                (
                    torch.empty_like(weight, dtype=d),
                    torch.empty(shape[0], dtype=d, device=device) if with_bias else None,
                )
                for d in dtypes
            ]
            fold_batchnorm(weight, norm, into, shortcut=shortcut if with_shortcut else None, backend=backend)
            for found, found_bias in into:
                eps = 4 * max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
                torch.testing.assert_close(found.double(), exact, rtol=eps, atol=1e-7 if eps < 1e-5 else 1e-5)
                if found_bias is not None:
                    wanted = bias + side if with_shortcut else bias
                    torch.testing.assert_close(found_bias.double(), wanted, rtol=eps, atol=10 * eps)


@pytest.mark.parametrize("backend", ["triton", "plain"])
def test_folding_minds_the_memory_format(backend, device):
    """A model may have changed its layout since room was made."""
    weight, norm = torch.randn(4, 5, 3, 3, device=device), norm_of(4, device)
    into = torch.empty_like(weight, memory_format=torch.channels_last), None
    fold_batchnorm(weight, norm, [into], backend=backend)
    torch.testing.assert_close(into[0].double(), folded_by_hand(weight, norm, norm)[0], rtol=1e-6, atol=1e-7)


def test_what_folding_refuses():
    weight, norm = torch.randn(4, 5, 3, 3).double(), norm_of(4, "cpu", torch.float64)
    pair = torch.empty_like(weight), torch.empty(4).double()
    with pytest.raises(TypeError, match=r"weight is torch.float64.*'plain'"):
        fold_batchnorm(weight, norm, [pair], backend="triton")
    with pytest.raises(ValueError, match="3 pairs"):
        fold_batchnorm(weight, norm, [pair] * 3)


class Calls(TorchDispatchMode):
    """Counts every operation that is more than a view, by its name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __getitem__(self, name):
        return self.counts[name]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_a_fold_is_one_launch_a_convolution(monkeypatch, device):
    """Both twins' weights, in place: a captured step reads them by address."""
    monkeypatch.setattr(fastarat.nets.attacker, "why_not_fold", lambda device, dtype: None)
    model = fastarat.split_batchnorm(build_model("resnet-small", num_classes=4)).eval().to(device)
    set_kernels(model, "triton")
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-1, 1)
                m.running_var.uniform_(0.5, 2)
                m.bias.uniform_(-1, 1)
    attacker = attacker_of(model, fold=True, precision="bf16", exact=True)

    def tensors():
        networks = attacker.network, attacker.exact_network
        return [t for n in networks for m in n.modules() if isinstance(m, FoldedConv) for t in m.parameters()]

    before, count = [t.data_ptr() for t in tensors()], len(list(model.foldable()))
    with Calls() as calls:
        attacker.refresh()
    assert calls.counts == {"fastarat::fold_batchnorm": count, "aten::_foreach_copy_": 1}
    assert [t.data_ptr() for t in tensors()] == before
    found = [t.clone() for t in tensors()]
    set_kernels(model, "plain")
    for m in attacker._folded.values():
        m.backend = "plain"
    with Calls() as calls:
        attacker.refresh()
    assert not calls["fastarat::fold_batchnorm"]
    for ours, plain in zip(found, tensors(), strict=True):
        low = ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, plain, rtol=0.01 if low else 1e-5, atol=0.01 if low else 1e-6)


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
