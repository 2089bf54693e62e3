"""Local logits by Triton kernels: the backend for CUDA tensors.

The forward pass has a kernel of its own. The products of backward are those of local attention, whose kernels they are;
the biases' gradients are sums that PyTorch takes.
"""
import functools
from typing import Any, Optional

import torch

from .. import _triton
from ..local_attention import triton as local_attention
from .eager import Grads, bias_gradients

refuse = _triton.refuse


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels
    return triton_kernels


def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        row_bias: Optional[torch.Tensor],
        column_bias: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
) -> torch.Tensor:
    """See `local_logits_reference`, whose arguments and result these are."""
    problem = _triton.Problem(query, num_heads, kernel_size, dilation)
    row_bias, column_bias = (None if x is None else x.contiguous() for x in (row_bias, column_bias))
    out = _triton.empty(query, (*query.shape[:3], num_heads, kernel_size ** 2), query.dtype)
    form = row_bias is not None, column_bias is not None, border == 'mask'

    def launch(blocks: _triton.Blocks) -> None:
        sizes, grid = problem.cut(blocks, splits=1)
        _kernels().logits_kernel[grid,](
            out, query, key, row_bias, column_bias, **sizes, steps=problem.splits,
            **_triton.strides(q=query, k=key), KP=problem.side,
            HAS_ROW=form[0], HAS_COLUMN=form[1], MASK=form[2], **_triton.options(blocks))

    problem.launch('logits', launch, max(problem.BC, problem.side), form)
    return out.to(query.dtype)


def backward(
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        has_row_bias: bool,
        has_column_bias: bool,
        kernel_size: int,
        dilation: int,
        num_heads: int,
        border: str,
) -> Grads:
    """Gradients of query, key, row_bias and column_bias (None where there is none) for the logits' `grad`."""
    return (
        local_attention.forward(key, grad, None, None, kernel_size, dilation, False),
        local_attention.aggregate_transposed(query, grad, kernel_size, dilation),
        *bias_gradients(grad, has_row_bias, has_column_bias, kernel_size, dilation, border),
    )
