"""Winograd convolutions: the same numbers as PyTorch's, never from old weights, and only where they apply."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastarat
from fastarat.nets import winograd
from fastarat.nets.attacker import Attacker
from fastarat.nets.models import ResNet, build_model
from fastarat.nets.winograd import Conv2d, conv2d, qualifies, set_winograd

CL = torch.channels_last


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the Winograd path is taken, and forgets at each `calls()`."""
    seen = []
    monkeypatch.setattr(winograd, "conv2d", lambda *args: (seen.append(1), conv2d(*args))[1])

    def count() -> int:
        number = len(seen)
        seen.clear()
        return number

    return count


def problem(b=2, i=128, o=128, h=8, w=8, dtype=torch.float32):
    x = torch.randn(b, i, h, w, dtype=torch.float64).to(dtype, memory_format=CL).requires_grad_()
    weight = (torch.randn(o, i, 3, 3, dtype=torch.float64) / (3 * i**0.5)).to(dtype).requires_grad_()
    dy = torch.randn(b, o, h, w, dtype=torch.float64).to(dtype)
    return x, weight, dy


def layer(i=128, o=128, **options) -> Conv2d:
    return Conv2d(i, o, 3, padding=1, bias=False, **options).to(memory_format=CL)


@pytest.mark.parametrize("shape", [(2, 5, 3, 6, 4), (1, 128, 130, 2, 2), (3, 4, 4, 2, 8)])
@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
def test_equals_pytorch_in_double(shape, layout):
    x, weight, dy = problem(*shape, dtype=torch.float64)
    weight = weight.detach().contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(shape[2], dtype=torch.float64, requires_grad=True)
    y, expected = conv2d(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert y.is_contiguous(memory_format=CL)
    ours = torch.autograd.grad(y, (x, weight, bias), dy)
    for ours_, theirs in zip(ours, torch.autograd.grad(expected, (x, weight, bias), dy), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=0, atol=1e-10)
    assert ours[1].stride() == weight.stride()


def test_large_batches_go_in_pieces(monkeypatch):
    x, weight, dy = problem(5, 4, 6, 4, 4, dtype=torch.float64)
    y = conv2d(x, weight)
    whole = y, *torch.autograd.grad(y, (x, weight), dy)
    monkeypatch.setattr(winograd, "MOST_ELEMENTS", 2 * 4 * 6 * 4 * 4)
    sizes = []
    tiles = winograd._Tiles
    monkeypatch.setattr(winograd, "_Tiles", lambda x, *a: (sizes.append(len(x)), tiles(x, *a))[1])
    y = conv2d(x, weight)
    assert sizes == [2, 2, 1]
    assert y.is_contiguous(memory_format=CL)
    pieces = y, *torch.autograd.grad(y, (x, weight), dy)
    for ours, theirs in zip(pieces, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    monkeypatch.setattr(winograd, "MOST_ELEMENTS", 1)
    torch.testing.assert_close(conv2d(x, weight), whole[0], rtol=0, atol=1e-12)


def test_gradients_and_their_gradients_by_finite_differences():
    x, weight, _ = problem(2, 2, 3, 4, 2, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(conv2d, (x, weight, bias))
    torch.autograd.gradgradcheck(conv2d, (x, weight, bias))


@pytest.mark.parametrize(("channels", "size"), [(128, 16), (256, 8), (512, 4)])
def test_rounding_is_close_to_that_of_the_direct_convolution(channels, size):
    x, weight, dy = problem(4, channels, channels, size, size)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*wide, padding=1)
    exact = y, *torch.autograd.grad(y, wide, dy.double())
    errors = []
    for conv in (conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        y = conv(x, weight)
        found = y, *torch.autograd.grad(y, (x, weight), dy)
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)])
    for name, ours, theirs in zip(("y", "dx", "dw"), *errors, strict=True):
        assert ours < 4 * theirs, name
        assert ours < 2e-6, name


def test_only_what_is_asked_for_is_computed(monkeypatch):
    x, weight, dy = problem()
    made = []
    gradient = winograd._weight_gradient
    monkeypatch.setattr(winograd, "_weight_gradient", lambda *args: (made.append(1), gradient(*args))[1])
    y = conv2d(x, weight.detach())
    assert y.grad_fn.saved_tensors[0] is None  # an attack keeps no activations
    torch.autograd.grad(y, x, dy)
    assert not made
    y = conv2d(x.detach(), weight)
    untile = winograd._untile
    monkeypatch.setattr(winograd, "_untile", lambda *args, **k: (made.append("dx"), untile(*args, **k))[1])
    torch.autograd.grad(y, weight, dy)
    assert made == [1]


@pytest.mark.parametrize(
    ("conv", "shape", "taken"),
    [
        (lambda: layer(), (2, 128, 8, 8), True),
        (lambda: layer(), (1, 128, 16, 16), True),
        (lambda: layer(128, 144), (2, 128, 8, 8), True),
        (lambda: layer(), (1, 128, 8, 8), False),
        (lambda: layer(), (4, 128, 7, 8), False),
        (lambda: layer(), (4, 128, 8, 7), False),
        (lambda: layer(127, 128), (2, 127, 8, 8), False),
        (lambda: layer(128, 127), (2, 128, 8, 8), False),
        (lambda: layer(stride=2), (2, 128, 16, 16), False),
        (lambda: layer(groups=2), (2, 128, 8, 8), False),
        (lambda: layer(padding_mode="circular"), (2, 128, 8, 8), False),
        (lambda: layer(dilation=2), (2, 128, 10, 10), False),
        (lambda: Conv2d(128, 128, 1).to(memory_format=CL), (2, 128, 8, 8), False),
        (lambda: Conv2d(128, 128, 3).to(memory_format=CL), (4, 128, 8, 8), False),
        (lambda: Conv2d(128, 128, 3, padding="same").to(memory_format=CL), (2, 128, 8, 8), False),
        (lambda: layer().double(), (2, 128, 8, 8), False),
    ],
)
def test_where_it_applies(conv, shape, taken, calls):
    conv = conv()
    x = torch.randn(shape, dtype=conv.weight.dtype).to(memory_format=CL)
    y = conv(x)
    assert calls() == taken
    plain = nn.Conv2d.forward(conv, x)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    assert y.shape == plain.shape
    set_winograd(conv, False)
    torch.testing.assert_close(conv(x), plain, rtol=0, atol=0)
    assert not calls()


def test_who_is_looking(calls):
    conv, x = layer(), torch.randn(2, 128, 8, 8).to(memory_format=CL)
    expected = F.conv2d(x, conv.weight, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    conv(x.contiguous())
    torch.jit.trace(conv, x, check_trace=False)
    torch.testing.assert_close(torch.compile(conv, backend="eager", fullgraph=True)(x), expected)
    exported = torch.export.export(conv, (x,)).graph
    assert any("conv2d" in str(n.target) for n in exported.nodes)
    grads = torch.func.vmap(torch.func.grad(lambda x: conv(x).square().sum()))(x[:, None])
    assert grads.shape == (2, 1, 128, 8, 8)
    assert not calls()


def test_networks_are_the_ones_they_were():
    """Same names, and same weights from the same seed, as with nn.Conv2d."""
    torch.manual_seed(5)
    conv = Conv2d(128, 128, 3, padding=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    plain = nn.Conv2d(128, 128, 3, padding=1)
    assert torch.equal(after, torch.rand(1))
    assert conv.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(conv.state_dict()[key], value)
    with torch.device("meta"):
        counts = {n: sum(map(qualifies, build_model(n, num_classes=10).modules())) for n in ("resnet18", "wrn-34-10")}
    # Three in each stage of 128, 256 and 512; nine in each of 160, 320 and 640, whose first has few inputs or a stride.
    assert counts == {"resnet18": 9, "wrn-34-10": 27}


def _replace(conv):
    conv.weight.data = torch.randn_like(conv.weight) / 30


def _in_place(conv):
    with torch.no_grad():
        conv.weight.mul_(-0.5)


def _through_data(conv):
    conv.weight.data.mul_(3)


def _load(conv):
    conv.load_state_dict({k: torch.randn_like(v) / 30 for k, v in conv.state_dict().items()})


def _fused(conv):
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0, momentum=0.9, fused=True)
    for _ in range(2):
        conv.weight.grad = torch.randn_like(conv.weight) / 30
        optimizer.step()


@pytest.mark.parametrize("change", [_replace, _in_place, _through_data, _load, _fused])
def test_new_weights_give_new_numbers(change, calls):
    conv, x = layer(), torch.randn(2, 128, 8, 8).to(memory_format=CL)
    for _ in range(2):
        before = conv(x)
        conv(x)
        point = x.clone(memory_format=torch.preserve_format).requires_grad_()
        change(conv)
        y, expected = conv(point), F.conv2d(point, conv.weight, padding=1)
        assert (y - before).norm() > 0.1 * before.norm()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(v.square().sum(), point)[0] for v in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert calls() == 6


def test_a_weight_written_between_forward_and_backward_is_noticed():
    conv, x = layer(), torch.randn(2, 128, 8, 8).to(memory_format=CL)
    y = conv(x)
    _in_place(conv)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def wide_network() -> ResNet:
    torch.manual_seed(0)
    return ResNet((128, 128), 1, (1, 1), num_classes=4)


def test_folded_networks_take_it_too(calls):
    model = wide_network().eval().to(memory_format=CL)
    x = torch.rand(2, 3, 8, 8).to(memory_format=CL)
    for _ in range(2):
        with torch.no_grad():
            for m in model.modules():
                if hasattr(m, "running_mean"):
                    m.running_mean.uniform_(-0.2, 0.2)
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.uniform_(-0.5, 0.5)
        results = []
        for on in (True, False):
            set_winograd(model, on)
            point = x.clone(memory_format=torch.preserve_format).requires_grad_()
            attacker = Attacker(model, fold=True)
            attacker.refresh()
            logits = attacker(point)
            results.append((logits, torch.autograd.grad(logits.square().sum(), point)[0]))
            assert calls() == 4 * on
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_training_step_is_the_same(mode, monkeypatch, calls):
    """On equal adversarial images; the attack itself takes signs of gradients, which rounding can turn."""
    images, labels = torch.rand(4, 3, 8, 8), torch.randint(4, (4,))
    steps, crafted = [], []
    for on in (True, False):
        step = fastarat.TrainStep(wide_network(), fastarat.ARAT(), images, num_steps=2, attack_bn=mode, winograd=on)
        calls()
        crafted.append(step.attack(images, labels))
        assert calls() == 8 * on  # four layers, two attack steps
        monkeypatch.setattr(step, "attack", lambda *_: crafted[0])
        terms = step(images, labels)
        assert calls() == 4 * on
        steps.append((step.model.state_dict(), terms))
    turned = (crafted[0].images - crafted[1].images).abs() > 1e-6
    assert turned.float().mean() < 0.02
    (ours, terms), (theirs, others) = steps
    torch.testing.assert_close(terms, others, rtol=1e-4, atol=1e-5)
    start = fastarat.split_batchnorm(wide_network()).state_dict()
    for key, value in theirs.items():
        if value.is_floating_point():
            moved = (value - start[key]).norm()
            assert (ours[key] - value).norm() <= 1e-3 * moved + 1e-6, key


def test_a_training_forward_keeps_no_transformed_weights():
    x, weight, _ = problem(4, 8, 8, 8, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        conv2d(x, weight)
        assert sum(t.numel() for t in kept) == x.numel() + weight.numel()
        kept.clear()
        conv2d(x, weight.detach())  # as in an attack
        assert x.shape not in [t.shape for t in kept]
