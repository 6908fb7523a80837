"""SGD that keeps low-precision copies of the weights up to date in the pass that updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastarat.kernels import interpreting, sgd_update, why_not_triton


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum, as loaded, the strides of its weight.

    A checkpoint may come from a run in another memory format, and PyTorch's fused steps go by address: they pair the
    elements of a channels-last weight with the wrong ones of a contiguous buffer, without a word (seen in 2.13).
    """
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _dense(p: Tensor) -> bool:
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


class SGD(torch.optim.SGD):
    """torch.optim.SGD, fused, whose step can also write copies of weights: same numbers, state and checkpoints.

    Where Triton serves the weights (float32, on a GPU), weights with copies are updated and rounded in one pass;
    everything else takes PyTorch's fused step, and a copy is made after it.

    Args:
        params, lr, momentum, weight_decay, nesterov: of torch.optim.SGD.
        backend: of the kernel: "auto", "triton", "plain".
    Source: torch.optim.SGD; Sutskever et al., ICML 2013, for nesterov.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        backend: str = "auto",
    ) -> None:
        self.backend = backend
        self.copies: dict[nn.Parameter, Tensor] = {}
        super().__init__(params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)

    def keep_copies(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Write each step's new weights to `copies`, too: parameter -> tensor of its shape and strides.

        They hold the weights as the last step left them: what changes a weight otherwise must call `refresh`.
        """
        self.copies = dict(copies)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copies anew from the weights."""
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        parts = self._one_pass()
        if closure is not None or parts is None:
            loss = super().step(closure)
            self.refresh()
            return loss
        grads = {p: p.grad for _, params in parts for p in params}
        try:
            for p in grads:  # hidden from PyTorch's step, which skips a weight without a gradient
                p.grad = None
            super().step()
        finally:
            for p, grad in grads.items():
                p.grad = grad
        for group, params in parts:
            sgd_update(
                params,
                [grads[p] for p in params],
                [self._buffer(p) for p in params],
                [self.copies[p] for p in params],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                backend=self.backend,
            )
        return None

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        lay_out_state(self)

    def _buffer(self, p: nn.Parameter) -> Tensor:
        buffer = self.state[p].get("momentum_buffer")
        if buffer is None:
            buffer = self.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
        return buffer

    def _one_pass(self) -> list[tuple[dict, list[nn.Parameter]]] | None:
        """The weights that the kernel updates, by group, or None where PyTorch's step must do it all."""
        # Gradients that fp16 has scaled, or steps it may skip, are told to PyTorch's fused step by these.
        scaled = getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None
        if self.backend == "plain" or scaled or not self.copies:
            return None
        device = next(iter(self.copies)).device
        if why_not_triton(device) is not None and not (self.backend == "triton" and interpreting()):
            return None
        parts = []
        for group in self.param_groups:
            if not group["momentum"] or group["dampening"] or group["maximize"]:
                return None
            params = [p for p in group["params"] if p in self.copies and p.grad is not None]
            if not all(p.dtype == torch.float32 and _dense(p) for p in params):
                return None
            parts.append((group, params))
        return parts
