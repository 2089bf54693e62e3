"""The formula of local logits, written to be read.

This is the truth that every backend is tested against (in float64). It follows equation 3 of `Stand-Alone
Self-Attention in Vision Models` (https://arxiv.org/abs/1906.05909) tap by tap and lets autograd find the gradients.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F


def local_logits_reference(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        row_bias: Optional[torch.Tensor] = None,
        column_bias: Optional[torch.Tensor] = None,
        num_heads: int = 1,
        border: str = 'zero',
) -> torch.Tensor:
    """Products of every pixel's query with the keys of its K x K neighbours, and a bias for rows and columns of taps.

    `l[p, g, (i, j)] = q[p, g] . k[p + dilation * ((i, j) - K // 2), g] + row_bias[p, g, i] + column_bias[p, g, j]`

    Args:
        query: (B, H, W, C), head g owning channels g * C / G to (g + 1) * C / G - 1.
        key: (B, H, W, C).
        kernel_size: K, odd.
        dilation: Distance between neighbouring taps, in pixels.
        row_bias: (B, H, W, G, K), added to all taps of a row, or None for zero.
        column_bias: (B, H, W, G, K), added to all taps of a column, or None for zero.
        num_heads: G.
        border: What a tap outside the map meets: 'zero' a key of zero, 'mask' a logit of minus infinity.

    Returns:
        (B, H, W, G, K * K), tap = row * K + column.
    """
    B, H, W, C = query.shape
    G, K, r = num_heads, kernel_size, kernel_size // 2 * dilation

    padded = F.pad(key, (0, 0, r, r, r, r))
    on_map = F.pad(torch.ones(H, W, dtype=torch.bool, device=query.device), (r, r, r, r))
    taps: List[torch.Tensor] = []
    for i in range(K):
        for j in range(K):
            rows, columns = slice(i * dilation, i * dilation + H), slice(j * dilation, j * dilation + W)
            logits = (query * padded[:, rows, columns]).unflatten(-1, (G, C // G)).sum(dim=-1)  # B, H, W, G
            if row_bias is not None:
                logits = logits + row_bias[..., i]
            if column_bias is not None:
                logits = logits + column_bias[..., j]
            if border == 'mask':
                logits = logits.masked_fill(~on_map[rows, columns, None], -float('inf'))
            taps.append(logits)
    return torch.stack(taps, dim=-1)
