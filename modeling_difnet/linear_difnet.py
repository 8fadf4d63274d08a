"""Linear layers that oneDNN computes on a CPU in float32; elsewhere they are PyTorch's own.

PyTorch leaves products of float32 matrices to MKL, which does not use all of the instructions of processors that are
not Intel's: there oneDNN, which computes the products of bfloat16 matrices anyway, takes half the time or less, and on
Intel's about the same. Values differ by rounding.
"""

import torch
from torch import nn


def use_onednn(*tensors: torch.Tensor | None) -> bool:
    """Whether oneDNN multiplies these matrices: plain float32 ones on a CPU, that nothing traces or transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.backends.mkldnn.is_available():
        return False
    if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:  # a counter of operations knows PyTorch's own
        return False
    return all(
        each is None
        or (each.device.type == "cpu" and each.dtype == torch.float32 and type(each) in (torch.Tensor, nn.Parameter))
        for each in tensors
    )


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`nn.functional.linear`; matrices may have any strides."""
    if not use_onednn(states, weight, bias) or states.ndim < 2 or states.numel() == 0:
        return nn.functional.linear(states, weight, bias)
    return OneDnnLinear.apply(states, weight, bias)


class OneDnnLinear(torch.autograd.Function):
    """`nn.functional.linear` by the operator that `torch.compile` emits for it."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # (rows, out)
        return (
            linear(gradient, weight.t()) if of_states else None,
            linear(rows.t(), states.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`, where speed counts: in training, and without gradients.

    With gradients in eval mode, which analyses of a network take, it is PyTorch's own, which can be transformed and
    differentiated in every way.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not self.training:
            return super().forward(states)
        return linear(states, self.weight, self.bias)
