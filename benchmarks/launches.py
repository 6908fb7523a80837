"""What a CUDA device would launch for one operation, and the bytes that each launch moves. Nothing runs here.

How kernels and bytes are counted, and what is assumed of torch, is `HOW`, which the tables print.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

HOW = """\
A step runs on fake CUDA tensors: each operation is seen as torch dispatches it, with shapes, strides and dtypes, and \
nothing is computed. It is a step as a CUDA graph would hold it, in bf16 with ten attack steps, the fused SGD and the \
kernels on, its optimiser's buffers there; cuDNN's fused convolution is taken to be available. Our own operations run \
their Python body, in which every launch of a Triton kernel is caught with its arguments; a table says which of them a \
kernel reads and writes. An operation of torch's is one kernel, except: views and allocations are none; a \
convolution's backward is one per gradient; a convolution with a bias is two; a multi-tensor operation is as many as \
torch's multi_tensor_apply makes of it (in builds for CUDA 13: chunks of 65,536 elements, 2,240 of them and 770, 448, \
336, 252 or 210 tensors a launch, by the number of lists), or one per tensor where the strides of its lists differ; \
BatchNorm of torch's own is three, its backward two, the backward of the negative log-likelihood two (it zeroes its \
result first). A sort or a topk counts as one, and is several. A copy and a fill are kernels, too. Bytes: what a \
kernel is given and what it leaves, once each, all from and to memory, nothing found in a cache; an expanded tensor \
has the bytes that are stored. cuDNN and cuBLAS are assumed to launch one kernel a call, to transpose nothing and not \
to read an addend times 0. FLOP: those of convolutions and matrix products. Milliseconds: the sum over kernels of \
bytes / bandwidth or FLOP / peak, whichever is larger (float32 at the peak of bf16, too): a bound from below, without \
the gaps between launches. Layouts: results of 65,536 elements and more, [B, C, H, W], that are not channels-last."""


class Launch(NamedTuple):
    """One kernel: bytes read and written, floating point operations of matrix products."""

    name: str
    read: int = 0
    written: int = 0
    flop: float = 0.0


class Kernel(NamedTuple):
    """Of a Triton kernel: pointers read and written, by parameter name; one that is None is no memory.

    unless: pointers that a launch with these arguments (by name) is given but leaves alone. flop: of its products.
    """

    reads: str
    writes: str
    unless: dict[str, Callable[[dict[str, Any]], bool]] = {}
    flop: Callable[[dict[str, Any]], float] = lambda given: 0.0


_AFFINE, _AFFINE2 = "weight_ptr bias_ptr mean_ptr var_ptr", "weight2_ptr bias2_ptr mean2_ptr var2_ptr"
_DY = "dy_ptr dy2_ptr bits_ptr"
# Partial results, which a reduction's programs write and its last ones read.
_TOTALS = "dbias_ptr dweight_ptr"
_AGAIN = "x_again_ptr dy_again_ptr dy2_again_ptr bits_again_ptr"
_SUMS, _SUMS2 = "part_dy_ptr part_dyx_ptr", "part_again_ptr part_dyx2_ptr"
_STATISTICS = "weight", "bias", "mean", "var"
# One line for each kernel in kernels/*_triton.py; a launch of another is an error.
TRITON: dict[str, Kernel] = {
    "_stats_kernel": Kernel("x_ptr part_mean_ptr part_m2_ptr", "part_mean_ptr part_m2_ptr mean_ptr var_ptr count_ptr"),
    "_apply_kernel": Kernel(f"x_ptr residual_ptr {_AFFINE}", "y_ptr bits_ptr"),
    "_backward_sums_kernel": Kernel(f"{_DY} x_ptr {_SUMS} {_AFFINE}", f"dresidual_ptr {_SUMS} {_TOTALS} count_ptr"),
    "_backward_apply_kernel": Kernel(
        f"{_DY} x_ptr {_AFFINE} {_TOTALS}",
        "dx_ptr dresidual_ptr",
        # Constant statistics need x only to find where the ReLU let dy pass, and not even then if there are bits.
        {"x_ptr": lambda a: a["dweight_ptr"] is None and (a["bits_ptr"] is not None or not a["RELU"])},
    ),
    "_join_apply_kernel": Kernel(f"x_ptr x2_ptr {_AFFINE} {_AFFINE2}", "y_ptr bits_ptr"),
    "_join_sums_kernel": Kernel(
        f"{_DY} x_ptr x2_ptr mean_ptr var_ptr mean2_ptr var2_ptr {_SUMS} {_SUMS2}",
        f"{_SUMS} {_SUMS2} {_TOTALS} dbias2_ptr dweight2_ptr count_ptr count2_ptr",
    ),
    "_join_backward_kernel": Kernel(
        f"{_DY} x_ptr x2_ptr weight_ptr mean_ptr var_ptr weight2_ptr mean2_ptr var2_ptr {_TOTALS} dweight2_ptr",
        "dx_ptr dx2_ptr",
    ),
    "_cooperative_forward_kernel": Kernel(
        "x_ptr residual_ptr weight_ptr bias_ptr part_mean_ptr part_m2_ptr zero_ptr",
        "y_ptr bits_ptr mean_ptr var_ptr part_mean_ptr part_m2_ptr count_ptr",
    ),
    "_cooperative_backward_kernel": Kernel(
        f"{_DY} x_ptr {_AGAIN} weight_ptr mean_ptr var_ptr {_SUMS} zero_ptr",
        f"dx_ptr dresidual_ptr {_SUMS} {_TOTALS} count_ptr",
    ),
    "_masked_sum_kernel": Kernel("dy_ptr dy2_ptr y_ptr", "out_ptr"),
    "_fold_kernel": Kernel(
        " ".join(["weight_ptr", *(f"{of}_{what}_ptr" for of in ("norm", "side") for what in _STATISTICS)]),
        "out_ptr out_bias_ptr wide_ptr wide_bias_ptr",
    ),
    "_pgd_update_kernel": Kernel("images_ptr grad_ptr center_ptr epsilon_ptr step_size_ptr", "out_ptr"),
    "_stem_input_grad_kernel": Kernel(
        "dy_ptr weight_ptr", "dx_ptr", flop=lambda a: 2.0 * a["dy_ptr"].numel() * math.prod(a["weight_ptr"].shape[1:])
    ),
}


class Unpriced(Exception):
    """A kernel or an operation that no table here knows."""


def triton_launch(kernel: Any, args: Sequence[Any], options: dict[str, Any]) -> Launch:
    """Price one launch of a `triton.jit` function. Raises: Unpriced naming what the table lacks."""
    name, parameters = kernel.fn.__name__, inspect.signature(kernel.fn).parameters
    if name not in TRITON:
        raise Unpriced(f"{name} is not in benchmarks.launches.TRITON: say which pointers it reads and writes")
    priced = TRITON[name]
    given = dict(zip(parameters, args, strict=False)) | {k: v for k, v in options.items() if k in parameters}
    reads, writes = priced.reads.split(), priced.writes.split()
    pointers = {k for k, v in given.items() if isinstance(v, Tensor)}
    if unsaid := pointers - {*reads, *writes}:
        raise Unpriced(f"benchmarks.launches.TRITON[{name!r}] does not say what is done to {', '.join(sorted(unsaid))}")
    if gone := {*reads, *writes, *priced.unless} - {*parameters}:
        raise Unpriced(f"benchmarks.launches.TRITON[{name!r}] names {', '.join(sorted(gone))}, which it does not have")
    read = [given.get(n) for n in reads if n not in priced.unless or not priced.unless[n](given)]
    return Launch(name, _bytes(read), _bytes([given.get(n) for n in writes]), priced.flop(given))


# Neither views nor kernels, though torch does not tag them so.
_NOTHING = {
    "_reshape_alias", "_unsafe_view", "alias", "detach", "device", "empty", "empty_like", "empty_strided", "is_pinned",
    "lift", "lift_fresh", "new_empty", "new_empty_strided", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip
FILLS = {"fill_", "full", "full_like", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor",
         "zero_", "zeros", "zeros_like"}  # fmt: skip
CASTS = {"_to_copy", "copy_", "_foreach_copy_"}
_DRAWS = {"bernoulli_", "normal_", "rand", "rand_like", "randn", "uniform_"}
# What is written without being read first, though the schema says that it changes.
_OVERWRITES = {*FILLS, *_DRAWS, "copy_", "_foreach_copy_", "_foreach_zero_"}
# One kernel, though not tagged as one that goes element by element.
_ONE = {
    *CASTS, *FILLS, *_DRAWS, "_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "all",
    "amax", "amin", "aminmax", "any", "arange", "argmax", "argmin", "cat", "clone", "gather", "index_select",
    "linalg_vector_norm", "masked_fill", "masked_fill_", "max", "mean", "min", "mse_loss", "mse_loss_backward",
    "nll_loss_forward", "scatter", "scatter_", "scatter_add", "scatter_add_", "sort", "stack", "std", "sum", "topk",
    "var",
}  # fmt: skip
_SEVERAL = {"native_batch_norm": 3, "native_batch_norm_backward": 2, "nll_loss_backward": 2}


def base_name(func: Any) -> str:
    """Name of an operation without its namespace and overload."""
    return func.name().split("::")[1].split(".")[0]


def works(func: Any) -> bool:
    """Whether an operation does anything on the device: a view and an allocation do not."""
    return not (func.is_view or base_name(func) in _NOTHING or func.name().startswith("prim::"))


def aten_launches(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Launch]:
    """Price an operation of torch's that `works`. Raises: Unpriced where no table knows it."""
    name = base_name(func)
    if name in _PRICED:
        return _PRICED[name](args, out)
    reads, writes = _touched(func, args, kwargs, out)
    if name.startswith(("_foreach_", "_fused_")):
        return _multi_tensor(name, func, args, kwargs, out, _bytes(reads), _bytes(writes))
    several = _SEVERAL.get(name, 1)
    if several == 1 and name not in _ONE and torch.Tag.pointwise not in func.tags:
        raise Unpriced(f"{func.name()} is in no table of benchmarks.launches: say how many kernels it launches")
    return [Launch(name, _bytes(reads), _bytes(writes)), *[Launch(name)] * (several - 1)]


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes that are stored: along an expanded dimension once."""
    total = 0
    for t in tensors:
        if isinstance(t, Tensor):
            sizes = zip(t.shape, t.stride(), strict=True)
            total += math.prod(n for n, stride in sizes if stride or n == 0) * t.element_size()
    return total


@functools.cache
def _schema(name: str) -> Any:
    return torch._C._get_schema(*(name.split(".") if "." in name else (name, "")))


def _touched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operation reads and those that it writes, each once."""
    name, arguments = base_name(func), _schema(func.name()).arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    for a in arguments:
        found = {id(t): t for t in _tensors(given.get(a.name))}
        changes = a.alias_info is not None and a.alias_info.is_write
        written |= found if changes else {}
        read |= {} if name in FILLS | _DRAWS or (changes and (a.is_out or name in _OVERWRITES)) else found
    return [*read.values()], [*written.values()] or _tensors(out)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


# Limits of MultiTensorApply.cuh in a build for CUDA 13, by the number of lists.
_CHUNK, _MOST_CHUNKS, _MOST_TENSORS = 65_536, 2_240, (770, 448, 336, 252, 210)


def _multi_tensor(
    name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, read: int, written: int
) -> list[Launch]:
    lists = [_tensors(a) for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)) and _tensors(a)]
    if not func.name().split(".")[0].endswith("_"):
        lists.append(_tensors(out))
    lists = [found for found in lists if len(found) == len(lists[0])]
    alike = all(len({t.stride() for t in each}) == 1 for each in zip(*lists, strict=True))
    one_type = all(len({t.dtype for t in found}) == 1 for found in lists)
    launches = mta_launches([t.numel() for t in lists[0]], len(lists)) if alike and one_type else len(lists[0])
    return [Launch(name, read, written), *[Launch(name)] * (launches - 1)]


def mta_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches that multi_tensor_apply makes of tensors with so many elements, `depth` lists of them."""
    launches = chunks = tensors = 0
    for size in sizes:
        tensors += size > 0
        last = math.ceil(size / _CHUNK) - 1
        for chunk in range(last + 1):
            chunks += 1
            full = chunks == _MOST_CHUNKS or (tensors == _MOST_TENSORS[depth - 1] and chunk == last)
            if full:
                launches, chunks, tensors = launches + 1, 0, int(chunk < last)
    return launches + (chunks > 0)


def _convolution(args: tuple[Any, ...], out: Tensor) -> list[Launch]:
    x, weight, bias = args[:3]
    flop = 2.0 * out.numel() * weight[0].numel()
    launches = [Launch("convolution", _bytes([x, weight]), _bytes([out]), flop)]
    if bias is not None:
        launches.append(Launch("convolution.bias", _bytes([out, bias]), _bytes([out])))
    return launches


def _convolution_backward(args: tuple[Any, ...], out: Sequence[Any]) -> list[Launch]:
    dy, x, weight = args[:3]
    flop, launches = 2.0 * dy.numel() * weight[0].numel(), []
    for name, needed, other, made, work in zip(
        ("input", "weight", "bias"), args[-1], (weight, x, None), out, (flop, flop, 0.0), strict=True
    ):
        if needed:
            launches.append(Launch(f"convolution_backward.{name}", _bytes([dy, other]), _bytes([made]), work))
    return launches


def _fused_convolution(args: tuple[Any, ...], out: Tensor) -> list[Launch]:
    read = [a for a in args if isinstance(a, Tensor)]
    return [Launch("cudnn_convolution_relu", _bytes(read), _bytes([out]), 2.0 * out.numel() * args[1][0].numel())]


def _product(args: tuple[Any, ...], out: Tensor) -> list[Launch]:
    flop = 2.0 * out.numel() * args[-1].shape[-2]
    return [Launch("matmul", _bytes(args), _bytes([out]), flop)]


_PRICED: dict[str, Callable[[tuple[Any, ...], Any], list[Launch]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "cudnn_convolution_relu": _fused_convolution,
    "cudnn_convolution_add_relu": _fused_convolution,
    "mm": _product,
    "addmm": _product,
    "bmm": _product,
}
