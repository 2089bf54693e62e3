"""Local logits in pure PyTorch with its own backward: the backend wherever no kernel of ours serves.

The products are batched matrix products of tiles (`_bands.py`), from whose diagonals the logits are read; those of
backward are local attention's. A chunk of samples passes through all steps before the next begins. Arithmetic is in
float32 for the half precisions.
"""
from typing import Optional, Tuple

import torch

from .._bands import Bands, chunks, compute_dtype
from .plain import taps_outside

Grads = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


def refuse(query: torch.Tensor) -> Optional[str]:
    """This backend takes everything."""
    return None


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
    B, H, W, _ = query.shape
    K, dtype = kernel_size, compute_dtype(query)
    out = query.new_empty(B, H, W, num_heads, K * K)
    outside = taps_outside(H, W, K, dilation, query.device).unsqueeze(2) if border == 'mask' else None
    bands = Bands(query, num_heads, K, dilation, dtype)
    for chunk in chunks(query, K):
        logits = bands.multiply(query[chunk].to(dtype), key[chunk].to(dtype)).unflatten(-1, (K, K))
        if row_bias is not None:
            logits += row_bias[chunk].unsqueeze(-1)
        if column_bias is not None:
            logits += column_bias[chunk].unsqueeze(-2)
        if outside is not None:
            logits.masked_fill_(outside, -float('inf'))
        out[chunk] = logits.flatten(-2)
    return out


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
    dtype = compute_dtype(query)
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    bands = Bands(query, num_heads, kernel_size, dilation, dtype)
    for chunk in chunks(query, kernel_size):
        g = grad[chunk].to(dtype)
        grad_query[chunk] = bands.aggregate(key[chunk].to(dtype), g)
        grad_key[chunk] = bands.aggregate_transposed(query[chunk].to(dtype), g)
    return grad_query, grad_key, *bias_gradients(grad, has_row_bias, has_column_bias, kernel_size, dilation, border)


def bias_gradients(
        grad: torch.Tensor,
        has_row_bias: bool,
        has_column_bias: bool,
        kernel_size: int,
        dilation: int,
        border: str,
) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Gradients of row_bias and column_bias (None where there is none) for the logits' `grad`."""
    if not has_row_bias and not has_column_bias:
        return None, None
    _, H, W, _, _ = grad.shape
    grad = grad.unflatten(-1, (kernel_size, kernel_size))
    if border == 'mask':
        grad = grad.masked_fill(taps_outside(H, W, kernel_size, dilation, grad.device).unsqueeze(2), 0.)
    return (  # sums of half precisions are taken in float32
        grad.sum(dim=-1) if has_row_bias else None,
        grad.sum(dim=-2) if has_column_bias else None,
    )
