"""split_bn, both backends, against the definition worked out in float64."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
import triton  # noqa: F401 - missing Triton must fail here, not skip
from fastarat.kernels import split_bn, why_not_triton

BACKENDS = ("triton", "plain")
EPS = 1e-5


@pytest.fixture(autouse=True)
def _scratch_is_nan():
    """Memory nobody wrote reads as NaN, so a kernel that skips an element is caught."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels():
    from fastarat.kernels import split_bn_triton

    return split_bn_triton


def reference(x, weight, bias, residual, relu, running):
    """The formula of split_bn's docstring, group by group; written for the eye, run in float64."""
    groups = weight.shape[0]
    outputs, means, variances = [], [], []
    for g, part in enumerate(x.reshape(groups, -1, *x.shape[1:])):
        if running is None:
            mean = part.sum((0, 2, 3)) / (part.numel() / part.shape[1])
            var = ((part - mean[:, None, None]) ** 2).mean((0, 2, 3))
        else:
            mean, var = running[0][g], running[1][g]
        xhat = (part - mean[:, None, None]) / torch.sqrt(var + EPS)[:, None, None]
        outputs.append(xhat * weight[g][:, None, None] + bias[g][:, None, None])
        means.append(mean)
        variances.append(var)
    z = torch.cat(outputs)
    if residual is not None:
        z = z + residual
    return z, z * (z > 0) if relu else z, torch.stack(means), torch.stack(variances)


def torch_own(x, weight, bias, residual, relu, running):
    """What a user writes today, in the dtype under test: the yardstick of the error."""
    training = running is None
    # With momentum 1 the running mean becomes the mean of the batch.
    means, variances = (torch.zeros_like(weight), torch.ones_like(weight)) if training else running
    parts = []
    for g, part in enumerate(x.chunk(weight.shape[0])):
        parts.append(F.batch_norm(part, means[g], variances[g], weight[g], bias[g], training, 1.0, EPS))
    y = torch.cat(parts)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y, means


def make_case(device, dtype, groups, batch, channels, height, width, *, residual, training, mean=0.5, std=1.5):
    x = (torch.randn(groups * batch, channels, height, width) * std + mean).to(dtype)
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    weight = (torch.rand(groups, channels) + 0.5).to(device)
    bias = torch.randn(groups, channels).to(device)
    extra = torch.randn(x.shape).to(dtype).to(device).contiguous(memory_format=torch.channels_last)
    running = ((torch.randn(groups, channels) + mean).to(device), (torch.rand(groups, channels) + 0.5).to(device))
    return x, weight, bias, extra if residual else None, None if training else running


def errors(got, expected):
    return [(a.double() - b).abs().max().item() for a, b in zip(got, expected, strict=True)]


def check_against_reference(backend, x, weight, bias, residual, relu, running, *, error_factor=2.0):
    """Forward and every gradient: at most twice the error of torch's own op, plus a floor for rounding."""
    inputs = [t for t in (x, weight, bias, residual) if t is not None]

    def fresh(cast):
        leaves = [cast(t).detach().clone().requires_grad_() for t in inputs]
        return leaves, leaves[3] if residual is not None else None

    exact, exact_residual = fresh(lambda t: t.double())
    exact_running = None if running is None else [r.double() for r in running]
    z, y, mean, var = reference(*exact[:3], exact_residual, relu, exact_running)
    # Where z is within rounding of 0 the ReLU's gradient is a coin toss; no gradient is sent through there.
    eps = torch.finfo(x.dtype).eps
    dy = torch.randn(x.shape, dtype=torch.float64).to(x.device)
    spread = (mean.abs() / torch.sqrt(var + EPS)).max().item() + 1
    eps32 = torch.finfo(torch.float32).eps
    if relu:
        dy = torch.where(z.abs() < 4 * eps * z.abs().max() + 8 * eps32 * spread, 0.0, dy)
    dy = dy.to(x.dtype).double()
    expected = [y, *torch.autograd.grad(y, exact, dy)]

    own_leaves, own_residual = fresh(lambda t: t)
    own, own_mean = torch_own(*own_leaves[:3], own_residual, relu, running)
    own = [own, *torch.autograd.grad(own, own_leaves, dy.to(x.dtype))]

    leaves, leaf_residual = fresh(lambda t: t)
    out = split_bn(*leaves[:3], leaf_residual, relu, running=running, backend=backend)
    got = [out.y, *torch.autograd.grad(out.y, leaves, dy.to(x.dtype))]

    # Floors: two roundings to the dtype of the result; and float32 arithmetic, four roundings of the largest
    # term, where taking the mean off multiplies rounding by |mean| / std and a sum adds up its terms.
    largest = [t.abs().max().item() for t in expected]
    terms = dy.abs().sum((0, 2, 3)).max().item()
    scales = [largest[0], largest[1], terms, terms, *largest[4:]]
    narrow = [eps, eps, eps32, eps32, eps]
    names = ("y", "dx", "dweight", "dbias", "dresidual")
    for name, error, own_error, size, scale, rounding in zip(
        names, errors(got, expected), errors(own, expected), largest, scales, narrow, strict=False
    ):
        floor = 2 * rounding * size + 4 * eps32 * spread * scale
        assert error <= error_factor * own_error + floor, (name, error, own_error, floor)
    for tensor, like in zip(got, [x, *inputs], strict=True):
        assert tensor.dtype == like.dtype
        assert tensor.shape == like.shape
    if running is None:
        assert out.mean.dtype == out.var.dtype == torch.float32
        floor = 4 * eps32 * (mean.abs().max() + var.sqrt().max())
        assert (out.mean - mean).abs().max() <= error_factor * (own_mean - mean).abs().max() + floor
        assert ((out.var - var).abs() <= 8 * eps32 * (var + EPS) * spread).all()
        assert not out.mean.requires_grad
        assert not out.var.requires_grad
    else:
        assert out.mean is running[0]
        assert out.var is running[1]


SHAPES = [  # groups, batch per group, channels, height, width
    (1, 3, 1, 3, 5),
    (1, 4, 64, 5, 5),
    (1, 7, 65, 1, 1),
    (2, 1, 7, 1, 9),
    (2, 2, 63, 3, 5),
    (3, 2, 16, 3, 3),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_matches_float64(backend, dtype, shape, training, relu, residual, device):
    x, weight, bias, extra, running = make_case(device, dtype, *shape, residual=residual, training=training)
    check_against_reference(backend, x, weight, bias, extra, relu, running)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 4, 64, 5, 5), (2, 2, 63, 3, 5), (2, 20, 9, 9, 9), (1, 7, 65, 1, 1)], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_cooperative_matches_float64(dtype, shape, relu, residual, device, kernels, monkeypatch):
    from fastarat.kernels import split_bn_cooperative as together

    def never(*args, **options):
        raise AssertionError("a two-pass kernel was launched")

    calls = []
    for name in ("forward", "backward"):
        whole = getattr(together, name)
        monkeypatch.setattr(together, name, lambda *a, name=name, whole=whole: (calls.append(name), whole(*a))[1])
    monkeypatch.setattr(kernels, "statistics", never)
    monkeypatch.setattr(kernels, "backward", never)
    x, weight, bias, extra, _ = make_case(device, dtype, *shape, residual=residual, training=True, mean=3.0)
    check_against_reference("cooperative", x, weight, bias, extra, relu, None)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("forked", [True, False])
def test_cooperative_reads_again_what_it_cannot_keep(residual, forked, device, monkeypatch):
    from fastarat.kernels import fork, split_bn_cooperative as together

    case = make_case(device, torch.float32, 2, 6, 12, 9, 9, residual=residual, training=True)
    leaves = [t.requires_grad_() for t in case[:4] if t is not None]
    weights = torch.randn(2, *case[0].shape, device=device)
    found = []
    for kept in (2048, 2048, 512):
        monkeypatch.setattr(together, "KEPT", kept)
        plan = together.plan(case[0], 2, together.BACKWARD_CHUNK)
        assert plan is not None
        assert (2 * plan.kept > kept) == (kept == 512)
        out = split_bn(*case[:4], True, backend="cooperative")
        first, second = fork(out.y) if forked else (out.y, out.y)
        loss = (first * weights[0]).sum() + (second * weights[1]).sum()
        found.append([*out, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    for ours, theirs in zip(found[2], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_cooperative_plans(device):
    from fastarat.kernels import split_bn_cooperative as together

    for rows, channels, groups in product((1, 9, 1000, 1024, 1025, 4096), (1, 64, 65, 200), (1, 2)):
        x = torch.empty(groups, channels, rows, 1, dtype=torch.bfloat16, device=device)
        plan = together.plan(x, groups, 128)
        if plan is None:
            blocks = -(-channels // 64)
            assert blocks > 4 or rows / (together.multiprocessors(x.device) // blocks) > 896
            continue
        assert (plan.parts - 1) * plan.share < rows <= plan.parts * plan.share
        assert plan.parts * plan.channel_blocks <= together.multiprocessors(x.device)
        assert plan.share <= plan.chunks * plan.chunk
        assert plan.channel_blocks * plan.block_channels >= channels


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend, device):
    case = make_case(device, torch.float16, 2, 2, 9, 4, 3, residual=True, training=True)
    check_against_reference(backend, *case[:4], True, case[4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("programs", [1024, 6])
def test_mean_far_from_zero(backend, programs, device, kernels, monkeypatch):
    """E[x^2] - E[x]^2 in float32 is off by a large part of the variance here."""
    monkeypatch.setattr(kernels, "REDUCE_PROGRAMS", programs)
    case = make_case(device, torch.float32, 2, 3, 33, 7, 9, residual=True, training=True, mean=1000.0, std=1.0)
    check_against_reference(backend, *case[:4], True, case[4])


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_programs_that_walk_many_tiles(dtype, residual, device, kernels, monkeypatch):
    """Small inputs give every program one tile; few programs make them loop, as large inputs do."""
    monkeypatch.setattr(kernels, "REDUCE_PROGRAMS", 4)
    x, *rest = make_case(device, dtype, 2, 3, 33, 7, 9, residual=residual, training=True)
    size = x.element_size()
    assert kernels.launch_shape(3 * 7 * 9, 33, 2, size, tile_bytes=kernels.SUMS_TILE, reduce=True).num_tiles > 2
    check_against_reference("triton", x, *rest[:3], True, rest[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "sliced", "transposed"])
def test_any_layout(backend, layout, device):
    x, weight, bias, residual, _ = make_case(device, torch.float32, 2, 2, 6, 4, 4, residual=True, training=True)
    if layout == "nchw":
        x, residual = x.contiguous(), residual.contiguous()
    elif layout == "sliced":
        x, residual = torch.randn(4, 9, 8, 4, device=device)[:, 1:7, ::2], residual.expand(4, -1, -1, -1)
    else:
        x = x.transpose(2, 3)
    check_against_reference(backend, x, weight, bias, residual, True, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_stays_channels_last(backend, device):
    x, weight, bias, residual, _ = make_case(device, torch.float32, 2, 2, 6, 4, 4, residual=True, training=True)
    x.requires_grad_()
    y = split_bn(x, weight, bias, residual, True, backend=backend).y
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The gradient of a sum is one number with strides of 0.
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_do_not_see_each_other(backend, device):
    x, weight, bias, _, _ = make_case(device, torch.float32, 2, 2, 5, 4, 4, residual=False, training=True)
    both = split_bn(x, weight, bias, backend=backend)
    for g, half in enumerate(x.chunk(2)):
        alone = split_bn(half, weight[g : g + 1], bias[g : g + 1], backend=backend)
        assert torch.equal(both.y.chunk(2)[g], alone.y)
        assert torch.equal(both.mean[g], alone.mean[0])
        assert torch.equal(both.var[g], alone.var[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written(backend, device):
    x, weight, bias, residual, _ = make_case(device, torch.float32, 2, 2, 5, 4, 4, residual=True, training=True)
    before = [t.clone() for t in (x, weight, bias, residual)]
    split_bn(x, weight, bias, residual, True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias, residual), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_nan_is_not_hidden_by_relu(backend, training, device):
    x, weight, bias, residual, running = make_case(
        device, torch.float32, 1, 2, 3, 4, 4, residual=True, training=training
    )
    x[1, 2, 3, 3] = float("nan")
    y = split_bn(x, weight, bias, residual, True, running=running, backend=backend).y
    assert y[1, 2, 3, 3].isnan()
    assert torch.isfinite(y[:, :2]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channel(backend, device):
    """Variance exactly 0: the output is the bias, the gradient finite, the variance not negative."""
    x = torch.full((2, 3, 4, 4), 3.0, device=device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight, bias = torch.ones(1, 3, device=device), torch.arange(3.0, device=device)[None]
    out = split_bn(x, weight, bias, backend=backend)
    # A mean that is off by its rounding is multiplied by 1 / sqrt(eps), about 316.
    torch.testing.assert_close(out.y, bias[0][None, :, None, None].expand_as(out.y), rtol=0, atol=3e-4)
    assert (out.var >= 0).all()
    assert (out.var < 1e-9).all()
    out.y.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_two_runs_give_the_same_bits(device):
    x, weight, bias, residual, _ = make_case(device, torch.bfloat16, 2, 3, 40, 7, 7, residual=True, training=True)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        out = split_bn(*leaves, True, backend="triton")
        runs.append([*out, *torch.autograd.grad(out.y, leaves, torch.ones_like(out.y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which chooses the order")
@pytest.mark.parametrize("order", ["backwards", "shuffled"])
@pytest.mark.parametrize("fan", [4, 32], ids=["two levels", "one level"])
def test_whoever_comes_last_the_bits_are_the_same(fan, order, kernels, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(kernels, "FAN", fan)
    monkeypatch.setattr(kernels, "REDUCE_PROGRAMS", 28)
    x, weight, bias, residual, _ = make_case(
        "cpu", torch.float32, 2, 3, 72, 9, 9, residual=True, training=True, mean=100.0
    )
    launch = kernels.launch_shape(3 * 81, 72, 2, 4, tile_bytes=kernels.SUMS_TILE, reduce=True)
    assert (launch.families > 1) == (fan == 4)
    assert launch.num_parts % 4

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        out = split_bn(*leaves, True, backend="triton")
        return [*out, *torch.autograd.grad(out.y.square().sum(), leaves)]

    in_order = run()
    check_against_reference("triton", x, weight, bias, residual, True, None)
    place = interpreter_builder.set_grid_idx
    turn = torch.randperm(launch.grid[0], generator=torch.Generator().manual_seed(3)).tolist()

    def elsewhere(x, y, z):
        """The interpreter runs programs one after another, in the order of their numbers: give them other numbers."""
        count = interpreter_builder.grid_dim[0]
        seen.add(count)
        place(count - 1 - x if order == "backwards" or count != len(turn) else turn[x], y, z)

    seen: set[int] = set()
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", elsewhere)
    assert all(torch.equal(a, b) for a, b in zip(in_order, run(), strict=True))
    assert launch.grid[0] in seen


def test_counters_are_zero_again_and_apart_where_asked(device, kernels, monkeypatch):
    from fastarat.kernels import backend, own_arrivals

    x, weight, bias, _, _ = make_case(device, torch.float32, 2, 2, 9, 4, 4, residual=False, training=True)
    with own_arrivals() as counters:
        split_bn(x, weight, bias, backend="triton")
    assert [int(c.abs().sum()) for c in counters.values()] == [0]
    (own,) = counters.values()
    assert all(own.data_ptr() != c.data_ptr() for c in backend._counters.values())


def test_only_needed_gradients_are_computed(device, kernels, monkeypatch):
    x, weight, bias, residual, running = make_case(device, torch.float32, 1, 2, 4, 3, 3, residual=True, training=False)

    class NeverLaunched:
        def __getitem__(self, grid):
            raise AssertionError("a reduction was launched")

    monkeypatch.setattr(kernels, "_backward_sums_kernel", NeverLaunched())
    for leaves in ((x,), (residual,), (x, residual)):
        for leaf in (x, residual):
            leaf.requires_grad_(any(leaf is chosen for chosen in leaves))
        y = split_bn(x, weight, bias, residual, True, running=running, backend="triton").y
        got = torch.autograd.grad(y.sum(), leaves)
        plain = split_bn(x, weight, bias, residual, True, running=running, backend="plain").y
        for a, b in zip(got, torch.autograd.grad(plain.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b)
    y = split_bn(x, weight, bias, residual, True, backend="triton").y
    with pytest.raises(AssertionError, match="a reduction was launched"):
        torch.autograd.grad(y.sum(), x)


def test_residual_alone_in_training(device):
    x, weight, bias, residual, _ = make_case(device, torch.float32, 1, 2, 4, 3, 3, residual=True, training=True)
    residual.requires_grad_()
    got, plain = (
        torch.autograd.grad(split_bn(x, weight, bias, residual, True, backend=b).y.sum(), residual)[0] for b in BACKENDS
    )
    assert torch.equal(got, plain)


def test_plain_gradients_in_float64():
    case = make_case("cpu", torch.float64, 2, 2, 3, 2, 2, residual=True, training=True)
    leaves = [t.double().requires_grad_() for t in case[:4]]
    out = split_bn(*leaves)
    assert out.mean.dtype == out.var.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *t: split_bn(*t).y, leaves)


def test_shared_affine(device):
    """One [C] affine for all groups is an expand away, and its gradient is the sum over the groups."""
    x, weight, bias, _, _ = make_case(device, torch.float32, 2, 2, 5, 3, 3, residual=False, training=True)
    shared, offset = weight[0].clone().requires_grad_(), bias[0].clone().requires_grad_()
    grads = []
    for backend in BACKENDS:
        y = split_bn(x, shared.expand(2, 5), offset.expand(2, 5), relu=True, backend=backend).y
        grads.append(torch.autograd.grad(y.square().sum(), (shared, offset)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "residual"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_opcheck(dtype, residual, device):
    ops = torch.ops.fastarat
    x, weight, bias, extra, running = make_case(device, dtype, 2, 2, 5, 3, 3, residual=residual, training=False)
    for leaf in (x, weight, bias, *([extra] if residual else [])):
        leaf.requires_grad_()
    torch.library.opcheck(ops.split_bn_train.default, (x, weight, bias, extra, True, EPS, residual, False))
    torch.library.opcheck(ops.split_bn_eval.default, (x, weight, bias, *running, extra, True, EPS, residual))
    bits = torch.randint(256, (36, 1), dtype=torch.uint8, device=device) if residual else None
    detached = [None if t is None else t.detach() for t in (x, extra, x, bits, weight, bias)]
    for need_x, need_affine, training in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(
            ops.split_bn_backward.default,
            (*detached, *running, training, True, need_x, need_affine, residual, EPS, False),
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_as_one_graph(backend, training, device):
    case = make_case(device, torch.float32, 2, 2, 5, 3, 3, residual=True, training=training)
    leaves = [t.requires_grad_() for t in case[:4]]

    def loss(*tensors):
        out = split_bn(*tensors, True, running=case[4], backend=backend)
        return out.y.square().sum(), out.mean

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, expected = (f(*leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(r[0], leaves) for r in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_launch_shapes_cover_the_rows(kernels):
    """Every row belongs to one part, no part is empty, and stage two fits all parts in one tile."""
    many_rows, many_channels = (1, 2, 9, 63, 1000, 2048, 131072, 131073, 7_000_001), (1, 3, 63, 64, 65, 512, 2048)
    for case in product(many_rows, many_channels, (1, 2, 3), (2, 4), (True, False)):
        rows, channels, groups, itemsize, reduce = case
        tile_bytes = kernels.SUMS_TILE if reduce else kernels.APPLY_TILE
        launch = kernels.launch_shape(rows, channels, groups, itemsize, tile_bytes=tile_bytes, reduce=reduce)
        per_part = launch.num_tiles * launch.block_rows
        assert (launch.num_parts - 1) * per_part < rows <= launch.num_parts * per_part, case
        assert launch.channel_blocks * launch.block_channels >= channels, case
        for size in (launch.block_rows, launch.block_channels):
            assert size & (size - 1) == 0, case
        assert launch.num_parts <= kernels.REDUCE_PROGRAMS if reduce else launch.num_tiles == 1, case


@pytest.mark.parametrize("images", [128, 256, 512])
@pytest.mark.parametrize(("rows", "channels"), [(1024, 64), (256, 128), (64, 256), (16, 512)])
def test_resnet18_stages_fill_a_large_gpu(images, rows, channels, kernels):
    """At least twelve warps for each of the 132 multiprocessors of an H200, in both kinds of pass."""
    for tile_bytes in (kernels.APPLY_TILE, kernels.STATS_TILE, kernels.SUMS_TILE):
        reduce = tile_bytes != kernels.APPLY_TILE
        launch = kernels.launch_shape(images * rows, channels, 1, 2, tile_bytes=tile_bytes, reduce=reduce)
        warps = (kernels.reducing if reduce else kernels.streaming)(launch)["num_warps"]
        assert launch.grid[0] * launch.grid[1] * warps >= 12 * 132
        assert launch.block_channels == 64


GOOD = {"x": torch.ones(4, 3, 2, 2), "weight": torch.ones(2, 3), "bias": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(0, 3, 2, 2)}, ValueError, "empty batch"),
        ({"x": torch.ones(4, 3)}, ValueError, r"expected \[G\*B, C, H, W\]"),
        ({"x": torch.ones(3, 3, 2, 2)}, ValueError, "3 images does not divide into 2"),
        ({"x": torch.ones(2, 3, 1, 1)}, ValueError, "one value per channel"),
        ({"x": torch.ones(4, 3, 2, 2, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \[3\].*unsqueeze"),
        ({"weight": torch.ones(2, 4)}, ValueError, r"weight has shape \[2, 4\]: expected \[G, 3\]"),
        ({"bias": torch.ones(1, 3)}, ValueError, r"bias has shape \[1, 3\]: expected \[2, 3\]"),
        ({"residual": torch.ones(4, 3, 2, 1)}, ValueError, "residual has shape"),
        ({"residual": torch.ones(4, 3, 2, 2).bfloat16()}, TypeError, "residual is torch.bfloat16"),
        ({"running": (torch.ones(2, 3), torch.ones(3))}, ValueError, r"running\[1\] has shape \[3\]"),
        ({"backend": "tritn"}, ValueError, "'auto', 'triton' or 'plain'"),
        ({"x": torch.ones(4, 3, 2, 2).double(), "backend": "triton"}, TypeError, "backend='plain'"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        split_bn(**{**GOOD, **change})


def test_one_value_per_channel_is_fine_in_evaluation():
    running = (torch.zeros(2, 3), torch.ones(2, 3))
    y = split_bn(torch.ones(2, 3, 1, 1), torch.ones(2, 3), torch.ones(2, 3), running=running).y
    torch.testing.assert_close(y, torch.full((2, 3, 1, 1), 2.0))


def test_the_cpu_takes_the_plain_path(kernels, monkeypatch):
    assert "NVIDIA" in why_not_triton("cpu")

    def never(*args):
        raise AssertionError("a Triton kernel served a CPU tensor")

    monkeypatch.setattr(kernels, "statistics", never)
    split_bn(**GOOD)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        split_bn(**GOOD, backend="triton")
