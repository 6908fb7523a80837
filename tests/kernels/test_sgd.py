"""`sgd_update` against torch.optim.SGD, in both forms."""

import pytest
import torch
from fastarat.kernels import interpreting, sgd_triton, sgd_update

BACKENDS = ["plain", "triton"]
LAST = torch.channels_last


def tensors(device, shapes=((8, 5, 3, 3), (10, 7), (40, 30, 3, 3), (1, 1), (6, 4, 1, 1))):
    made = [torch.randn(shape, device=device) for shape in shapes]
    return [t.contiguous(memory_format=LAST) if t.dim() == 4 else t for t in made]


def rounded(copy, weight):
    """Whether copy is weight, rounded: on a GPU to the nearest; Triton's interpreter cuts off."""
    if not interpreting():
        return torch.equal(copy, weight.to(copy.dtype))
    return ((copy.float() - weight).abs() <= weight.abs() * torch.finfo(copy.dtype).eps + 1e-30).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_three_steps_are_those_of_pytorch(backend, nesterov, dtype, tensor_lr, device, monkeypatch):
    monkeypatch.setattr(sgd_triton, "MAX_TENSORS", 2)  # three launches
    weights = tensors(device)
    theirs = [w.double().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(theirs, lr=0.3, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    buffers, copies = [torch.zeros_like(w) for w in weights], [w.to(dtype) for w in weights]
    before = [w.clone() for w in weights]
    for step in range(3):
        grads = tensors(device)
        for w, g in zip(theirs, grads, strict=True):
            w.grad = g.double()
        optimizer.step()
        if step == 1:  # of another layout than the weights
            grads = [g.contiguous() for g in grads]
        lr = torch.tensor(0.3, device=device) if tensor_lr else 0.3
        sgd_update(
            weights, grads, buffers, copies, lr=lr, momentum=0.9, weight_decay=0.01, nesterov=nesterov, backend=backend
        )
        for w, b, c, t in zip(weights, buffers, copies, theirs, strict=True):
            torch.testing.assert_close(w.double(), t.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(b.double(), optimizer.state[t]["momentum_buffer"], rtol=1e-5, atol=1e-5)
            assert torch.equal(c, w.to(dtype)) if backend == "plain" else rounded(c, w)
    assert all((w - b).abs().max() > 0.5 for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_gradients_show(backend, device):
    weights = tensors(device, [(4, 4)])
    grads = [torch.full_like(weights[0], float("nan"))]
    buffers, copies = [torch.zeros_like(weights[0])], [weights[0].bfloat16()]
    sgd_update(weights, grads, buffers, copies, lr=0.1, momentum=0.9, weight_decay=0.0, backend=backend)
    assert all(t.isnan().all() for t in (*weights, *buffers, *copies))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensors_are_no_work(backend):
    sgd_update([], [], [], [], lr=0.1, momentum=0.9, weight_decay=0.0, backend=backend)


def test_a_write_is_noticed_by_autograd(device):
    weight = torch.randn(4, 4, device=device, requires_grad=True)
    loss = (weight * weight).sum()
    other = torch.zeros(4, 4, device=device)
    sgd_update([weight], [other], [other.clone()], [other.bfloat16()], lr=0.1, momentum=0.9, weight_decay=0.1,
               backend="triton")  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck(device):
    w = tensors(device, [(4, 4), (2, 3)])
    lists = w, [t.clone() for t in w], [t.clone() for t in w], [t.bfloat16() for t in w]
    op = torch.ops.fastarat.sgd_update.default
    torch.library.opcheck(op, (*lists, 0.1, None, 0.9, 0.0, False))
    torch.library.opcheck(op, (*lists, 0.0, torch.tensor(0.1, device=device), 0.9, 0.0, True))


def test_mistakes_are_named():
    w = torch.zeros(2, 3, 4, 4)
    half = w.bfloat16()

    def call(weights=(w,), grads=(w,), buffers=(w,), copies=(half,)):
        sgd_update(weights, grads, buffers, copies, lr=0.1, momentum=0.9, weight_decay=0.0, backend="plain")

    for wrong, error, part in (
        ({"copies": ()}, ValueError, "0 copies: expected equally many"),
        ({"weights": (w.double(),)}, TypeError, "weight 0 is torch.float64"),
        ({"grads": (half,)}, TypeError, "gradient 0 is torch.bfloat16"),
        ({"grads": (w[:1],)}, ValueError, r"gradient 0 has shape \[1, 3, 4, 4\]: expected \[2, 3, 4, 4\]"),
        ({"buffers": (w.contiguous(memory_format=LAST),)}, ValueError, "buffer 0 has strides"),
        ({"copies": (half.contiguous(memory_format=LAST),)}, ValueError, "copy 0 has strides"),
    ):
        with pytest.raises(error, match=part):
            call(**wrong)
    gaps = torch.zeros(2, 6)[:, ::2]
    with pytest.raises(ValueError, match="expected a contiguous or channels-last"):
        call((gaps,), (gaps,), (gaps,), (torch.zeros(2, 6).bfloat16()[:, ::2],))
