"""The formula of ELSA's local attention, written to be read.

This is the truth that every other backend is tested against (in float64). It follows section 3 of
`What Limits the Performance of Local Self-attention?` (https://arxiv.org/abs/2112.12786) tap by tap and lets
autograd find the gradients; it is neither fast nor small.
"""
from typing import Optional

import torch
import torch.nn.functional as F


def local_attention_reference(
        value: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        ghost_mul: Optional[torch.Tensor] = None,
        ghost_add: Optional[torch.Tensor] = None,
        normalize: bool = True,
) -> torch.Tensor:
    """Sum the neighbours of every pixel, weighted by attention and ghost head.

    `y[p, c] = sum_t (ghost_mul[c, t] * a[p, head(c), t] + ghost_add[c, t]) * value[p + dilation * (t - K // 2), c]`
    with `a = softmax_t(logits)` and `head(c) = c // (C / G)`. Taps outside the map keep their share of the softmax
    and meet a value of zero.

    Args:
        value: (B, H, W, C).
        logits: (B, H, W, G, K * K), tap = row * K + column.
        kernel_size: K, odd.
        dilation: Distance between neighbouring taps, in pixels.
        ghost_mul: (C, K, K), or None for a factor of one.
        ghost_add: (C, K, K), or None for no static term.
        normalize: False takes the logits as they are, without the softmax.

    Returns:
        (B, H, W, C).
    """
    B, H, W, C = value.shape
    G = logits.shape[3]
    K, r = kernel_size, kernel_size // 2 * dilation

    weights = logits.softmax(dim=-1) if normalize else logits
    weights = weights.repeat_interleave(C // G, dim=3)  # B, H, W, C, K * K
    if ghost_mul is not None:
        weights = weights * ghost_mul.flatten(1)
    if ghost_add is not None:
        weights = weights + ghost_add.flatten(1)

    padded = F.pad(value, (0, 0, r, r, r, r))
    y = torch.zeros_like(value)
    for i in range(K):
        for j in range(K):
            top, left = i * dilation, j * dilation
            y = y + weights[..., i * K + j] * padded[:, top:top + H, left:left + W]
    return y
