"""The stem's input gradient against float64, and its place in an attack."""

import pytest
import torch
import torch.nn.functional as F
from fastarat.kernels import stem, stem_applies, stem_conv, stem_input_grad

import fastarat
from fastarat.nets.convs import Stem
from fastarat.nets.models import build_model, set_kernels

LAST = torch.channels_last


def exact(dy, weight):
    shape = (dy.shape[0], weight.shape[1], *dy.shape[2:])
    return torch.nn.grad.conv2d_input(shape, weight.double(), dy.double(), padding=1)


@pytest.mark.parametrize("backend", ["triton", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [(2, 3, 64, 8, 8), (1, 1, 16, 1, 1), (3, 3, 16, 5, 7), (1, 4, 160, 9, 3), (5, 16, 48, 2, 6), (1, 2, 80, 1, 9)],
)
def test_matches_float64(backend, dtype, batch, channels, out, height, width, device):
    dy = torch.randn(batch, out, height, width, device=device).to(dtype)
    weight = torch.randn(out, channels, 3, 3, device=device).to(dtype)
    wanted = exact(dy, weight)
    for layout in (LAST, torch.contiguous_format):
        found = stem_input_grad(
            dy.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), backend=backend
        )
        assert found.dtype == torch.float32
        # Products of half-precision numbers are exact in float32; the plain form rounds the result once more.
        eps = 1e-5 if backend == "triton" else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=eps * wanted.abs().max().item())


@pytest.mark.parametrize("backend", ["triton", "plain"])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
def test_the_convolution_and_both_gradients(backend, of, device):
    x = torch.rand(2, 3, 6, 6, device=device).to(of).requires_grad_()
    weight = torch.randn(16, 3, 3, 3, device=device).bfloat16().requires_grad_()
    y = stem_conv(x, weight, backend)
    assert torch.equal(y, F.conv2d(x.bfloat16(), weight, padding=1))
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    assert (dx.dtype, dw.dtype) == (of, torch.bfloat16)
    torch.testing.assert_close(dx.double(), exact(dy, weight), rtol=0.02, atol=0.15)
    torch.testing.assert_close(
        dw.double(),
        torch.nn.grad.conv2d_weight(x.detach().bfloat16().double(), weight.shape, dy.double(), padding=1),
        rtol=0.02,
        atol=0.1,
    )


def test_what_it_leaves_to_others(device):
    def applies(out=16, channels=3, kernel=3, dtype=torch.bfloat16, backend="triton"):
        x = torch.zeros(2, channels, 8, 8, device=device)
        return stem_applies(x, torch.zeros(out, channels, kernel, kernel, dtype=dtype, device=device), backend)

    assert applies()
    assert applies(dtype=torch.float16, out=160, channels=16)
    assert not applies(out=24)
    assert not applies(channels=17)
    assert not applies(kernel=5)
    assert not applies(dtype=torch.float32)
    assert not applies(backend="plain")
    assert applies(backend="auto") == (device.type == "cuda")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    op = stem._stem_input_grad_op
    monkeypatch.setattr(stem, "_stem_input_grad_op", lambda *a: (seen.append(a[0].dtype), op(*a))[1])
    return seen


@pytest.mark.parametrize("name", ["resnet-small", "wrn-10-1"])
def test_an_attack_takes_it_and_is_the_plain_one(name, calls, device):
    images, labels = torch.rand(4, 3, 8, 8, device=device), torch.arange(4, device=device)
    made = []
    for backend in ("plain", "triton"):
        torch.manual_seed(0)
        model = build_model(name, num_classes=4, image_size=8).to(device)
        step = fastarat.TrainStep(
            model, fastarat.AT(), images, kernels="triton", precision="bf16", num_steps=1, epsilon=0.1, capture=False
        )
        assert step.model.conv1.backend == "triton"
        step.model.conv1.backend = backend
        made.append(step.attack(images, labels).images)
    assert calls == [torch.bfloat16]
    step(images, labels)
    assert len(calls) == 2  # the attack's again, and none for the training pass
    # Where rounding makes the gradient zero or turns its sign, a pixel moves by the whole step.
    assert ((made[0] - made[1]).abs() > 1e-3).float().mean() < 0.05
    assert (made[0] - images).abs().max() > 0.05


def test_float32_and_other_forwards_are_pytorchs(calls, device):
    layer = Stem(3, 16).to(device)
    layer.backend = "triton"
    x = torch.rand(2, 3, 8, 8, device=device)
    torch.autograd.grad(layer(x.clone().requires_grad_()).sum(), layer.weight)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(layer(x), F.conv2d(x.bfloat16(), layer.weight.bfloat16(), padding=1))
        with torch.no_grad():
            layer(x.clone().requires_grad_())
        point = x.clone().requires_grad_()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        (wanted,) = torch.autograd.grad(compiled(point).float().square().sum(), point)
        assert not calls
        (found,) = torch.autograd.grad(layer(point).float().square().sum(), point)
        assert len(calls) == 1
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.05)


def test_weights_keep_their_names_and_draws():
    torch.manual_seed(0)
    ours = Stem(3, 64)
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    assert torch.equal(ours.weight, theirs.weight)
    assert list(ours.state_dict()) == ["weight"]
    model = build_model("resnet18", num_classes=10)
    set_kernels(model, "plain")
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"plain"}


def test_opcheck(device):
    dy = torch.randn(2, 16, 4, 4, device=device).bfloat16().contiguous(memory_format=LAST)
    weight = torch.randn(16, 3, 3, 3, device=device).bfloat16()
    torch.library.opcheck(torch.ops.fastarat.stem_input_grad.default, (dy, weight))
