"""pgd_update, both backends, against its formula; the two must agree bit for bit."""

import pytest
import torch
import triton  # noqa: F401 - missing Triton must fail here, not skip
from fastarat.kernels import pgd_update

BACKENDS = ("triton", "plain")
EPSILON, STEP = 8 / 255, 2 / 255


def make_case(device, shape=(3, 3, 7, 5)):
    """Images inside the ball around center, gradients with exact zeros of both signs."""
    center = torch.rand(shape)
    images = (center + (torch.rand(shape) * 2 - 1) * EPSILON).clamp(0, 1)
    grad = torch.randn(shape) * 1e-6
    grad[..., 0], grad[..., 1] = 0.0, -0.0
    return images.to(device), grad.to(device), center.to(device)


def reference(images, grad, center, epsilon, step_size):
    """Elementwise Python floats: no torch operation that the op itself could share."""
    out = []
    for x, g, c in zip(*(t.double().flatten().tolist() for t in (images, grad, center)), strict=True):
        x += step_size * ((g > 0) - (g < 0))
        x = min(max(x, c - epsilon), c + epsilon)
        out.append(min(max(x, 0.0), 1.0))
    return torch.tensor(out, dtype=torch.float64).reshape(images.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 3, 7, 5), (5, 3, 16, 9)], ids=str)
def test_matches_the_formula(backend, dtype, shape, device):
    images, grad, center = make_case(device, (*shape[:3], shape[3] + 1))
    grad = (grad * 1e6).to(dtype)
    out = pgd_update(images, grad, center, epsilon=EPSILON, step_size=STEP, backend=backend)
    expected = reference(images.cpu(), grad.cpu(), center.cpu(), EPSILON, STEP)
    # Two float32 roundings of numbers up to 1.
    assert (out.cpu().double() - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps
    assert out.dtype == torch.float32


@pytest.mark.parametrize("scalar", [float, torch.tensor], ids=["number", "tensor"])
def test_backends_agree_bit_for_bit(scalar, device):
    case = make_case(device, (4, 3, 16, 16))
    epsilon, step_size = scalar(EPSILON), scalar(STEP)
    if isinstance(epsilon, torch.Tensor):
        epsilon, step_size = epsilon.to(device), step_size.to(device)
    outs = [pgd_update(*case, epsilon=epsilon, step_size=step_size, backend=b) for b in BACKENDS]
    number = pgd_update(*case, epsilon=EPSILON, step_size=STEP, backend="plain")
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], number)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_epsilon_is_read_at_the_call(backend, device):
    images, grad, center = make_case(device)
    epsilon = torch.tensor(0.0, device=device)
    args = {"epsilon": epsilon, "step_size": STEP, "backend": backend}
    torch.testing.assert_close(pgd_update(images, grad, center, **args), center, rtol=0, atol=0)
    epsilon.fill_(EPSILON)
    moved = pgd_update(images, grad, center, **args)
    assert torch.equal(moved, pgd_update(images, grad, center, epsilon=EPSILON, step_size=STEP, backend="plain"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_may_differ(backend, device):
    images, grad, center = make_case(device)
    expected = pgd_update(images, grad, center, epsilon=EPSILON, step_size=STEP, backend="plain")
    last = torch.channels_last
    layouts = {
        "channels-last": lambda t: t.contiguous(memory_format=last),
        "nchw": lambda t: t.contiguous(),
        "sliced": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    }
    for name, change in layouts.items():
        for other, change_other in layouts.items():
            case = change(images), change_other(grad), change(center)
            out = pgd_update(*case, epsilon=EPSILON, step_size=STEP, backend=backend)
            assert torch.equal(out, expected), (name, other)
            if name == "channels-last":
                assert out.is_contiguous(memory_format=last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written_and_nothing_is_recorded(backend, device):
    case = make_case(device)
    before = [t.clone() for t in case]
    case[0].requires_grad_()
    out = pgd_update(*case, epsilon=EPSILON, step_size=STEP, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))
    assert not out.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan(backend, dtype, device):
    """A NaN gradient leaves the pixel where it is, as torch.sign does; a NaN pixel stays NaN."""
    images, grad, center = make_case(device, (2, 3, 8, 8))
    grad = torch.full_like(grad, float("nan")).to(dtype)
    out = pgd_update(images, grad, images, epsilon=EPSILON, step_size=STEP, backend=backend)
    assert torch.equal(out, images)
    images[0, 0, 0, 0] = center[1, 1, 1, 1] = float("nan")
    out = pgd_update(images, grad, center, epsilon=EPSILON, step_size=STEP, backend=backend)
    assert out[0, 0, 0, 0].isnan()
    assert out[1, 1, 1, 1].isnan()
    assert out.isnan().sum() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_linear_loss_reaches_the_corner_of_the_box(backend, device):
    """Steps of epsilon / 4 up a linear loss: after four, every pixel is epsilon away or at the edge of [0, 1]."""
    _, _, center = make_case(device)
    slope = torch.randn(center.shape, device=device)
    images = center.clone()
    for _ in range(5):
        images = pgd_update(images, slope, center, epsilon=0.3, step_size=0.075, backend=backend)
    torch.testing.assert_close(images, (center + 0.3 * slope.sign()).clamp(0, 1))


def test_opcheck(device):
    images, grad, center = make_case(device)
    scalar = torch.tensor(EPSILON, device=device)
    op = torch.ops.fastarat.pgd_update.default
    torch.library.opcheck(op, (images, grad, center, EPSILON, None, STEP, None))
    torch.library.opcheck(op, (images, grad.bfloat16(), center, 0.0, scalar, 0.0, scalar))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, device):
    case = make_case(device)

    def update(images, grad, center):
        return pgd_update(images, grad, center, epsilon=EPSILON, step_size=STEP, backend=backend)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), update(*case))
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in case]
    assert torch.equal(compiled(*channels_last), update(*case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(2, 3).bfloat16()}, TypeError, "must be float32"),
        ({"center": torch.rand(2, 3).double()}, TypeError, "must be float32"),
        ({"grad": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "grad is torch.int64"),
        ({"grad": torch.ones(3, 2)}, ValueError, r"grad has shape \[3, 2\]: expected \[2, 3\]"),
        ({"center": torch.ones(1, 3)}, ValueError, "center has shape"),
        ({"epsilon": -0.1}, ValueError, "epsilon=-0.1"),
        ({"step_size": float("nan")}, ValueError, "step_size=nan"),
        ({"epsilon": torch.ones(3)}, ValueError, r"shape \[3\]"),
        ({"step_size": torch.tensor(1.0, dtype=torch.float64)}, ValueError, "torch.float64"),
        ({"backend": "cuda"}, ValueError, "'auto', 'triton' or 'plain'"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    good = {"images": torch.rand(2, 3), "grad": torch.rand(2, 3), "center": torch.rand(2, 3)}
    with pytest.raises(error, match=message):
        pgd_update(**{**good, "epsilon": EPSILON, "step_size": STEP, **change})
