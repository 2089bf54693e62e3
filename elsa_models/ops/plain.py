"""Local attention from core operators alone, for graphs that leave PyTorch: ONNX, torch.export, TorchScript.

Where the width is known, every row of the map is cut into tiles of `t` pixels. For one tile and one head the
attention is a banded matrix (`t` pixels x `K * (t + K - 1)` neighbours), so that one batched matrix product aggregates
the whole map. The band is skewed into place with pads and reshapes only. Where the width is open, and with a ghost
factor, the taps are summed one by one.

Autograd differentiates it any number of times, which makes it the path of double backward as well. Its temporaries
(about 1.4 K values per value) are why eager mode has `eager.py`.
"""
from typing import List, Optional

import torch
import torch.nn.functional as F

TILE = 14  # divides the maps at 224 pixels; the fastest of 7, 14 and 28 on CPU


def tile_width(width: int, tile: int = TILE) -> int:
    """Width of the tiles that cut a row of `width` pixels with little padding."""
    count = max(1, (width + tile // 2) // tile)
    return max(1, (width + count - 1) // count)


def local_attention_plain(
        value: torch.Tensor,
        logits: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        ghost_mul: Optional[torch.Tensor] = None,
        ghost_add: Optional[torch.Tensor] = None,
        normalize: bool = True,
) -> torch.Tensor:
    """See `local_attention_reference`, whose arguments and result these are."""
    dtype = value.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        value, logits = value.float(), logits.float()
    weights = logits.softmax(dim=-1) if normalize else logits
    symbolic = False  # a width that a graph leaves open cannot be cut into tiles without conditions on it
    if not torch.jit.is_scripting():
        symbolic = isinstance(value.shape[2], torch.SymInt) or torch.jit.is_tracing()
    if ghost_mul is None and not symbolic:
        y = _tiles(value, weights, kernel_size, dilation)
    else:
        y = _taps(value, weights, kernel_size, dilation, ghost_mul)
    if ghost_add is not None:
        y = y + _static_term(value, ghost_add.to(value.dtype), kernel_size, dilation)
    return y.to(dtype)


def _tiles(value: torch.Tensor, weights: torch.Tensor, K: int, d: int) -> torch.Tensor:
    B, H, W, C = value.shape
    G = weights.shape[3]
    r = K // 2 * d
    t = tile_width(W)
    n = (W + t - 1) // t
    P = t + 2 * r  # pixels that a tile sees in one row

    # each row of taps becomes a (t, P) band: pad its rows to P + 1 and cut the run at P, so that row i starts at i
    band = F.pad(weights, (0, 0, 0, 0, 0, n * t - W)).reshape(B, H, n, t, G, K, K).permute(0, 1, 2, 4, 5, 3, 6)
    if d > 1:
        band = F.pad(band.unsqueeze(-1), (0, d - 1)).flatten(-2)  # zeros between the taps
    band = F.pad(band, (0, P + 1 - band.shape[-1])).flatten(-2)[..., :t * P]
    band = band.reshape(B, H, n, G, K, t, P).transpose(-3, -2).reshape(B, H, n, G, t, K * P)

    # the pixels that each tile sees: its own columns and the 2r to their right, then K rows
    reach = (2 * r + t - 1) // t  # further tiles that these come from
    blocks = F.pad(value, (0, 0, r, (n + reach) * t - W - r, r, r)).reshape(B, H + 2 * r, n + reach, t, C)
    columns: List[torch.Tensor] = []
    for i in range(reach + 1):
        columns.append(blocks[:, :, i:i + n, :min(t, P - i * t)])
    seen = torch.cat(columns, dim=3)  # B, H + 2r, n, P, C
    rows: List[torch.Tensor] = []
    for i in range(K):
        rows.append(seen[:, i * d:i * d + H])
    neighbours = torch.stack(rows, dim=3)  # B, H, n, K, P, C
    neighbours = neighbours.reshape(B, H, n, K * P, G, C // G).transpose(3, 4)

    y = band @ neighbours  # B, H, n, G, t, C / G
    return y.transpose(3, 4).reshape(B, H, n * t, C)[:, :, :W]


def _taps(
        value: torch.Tensor,
        weights: torch.Tensor,
        K: int,
        d: int,
        ghost_mul: Optional[torch.Tensor],
) -> torch.Tensor:
    # a factor per channel and tap leaves no matrix product to be had: the sum is taken tap by tap
    B, H, W, C = value.shape
    G = weights.shape[3]
    r = K // 2 * d
    padded = F.pad(value, (0, 0, r, r, r, r)).unflatten(3, (G, C // G))
    y = torch.zeros_like(padded[:, :H, :W])
    for i in range(K):
        for j in range(K):
            neighbour = padded[:, i * d:i * d + H, j * d:j * d + W]
            if ghost_mul is not None:
                neighbour = neighbour * ghost_mul[:, i, j].to(value.dtype).unflatten(0, (G, C // G))
            y = y + weights[..., i * K + j].unsqueeze(-1) * neighbour
    return y.flatten(3)


def _static_term(value: torch.Tensor, ghost_add: torch.Tensor, K: int, d: int) -> torch.Tensor:
    B, H, W, C = value.shape
    r = K // 2 * d
    if d == 1:
        y = F.conv2d(value.permute(0, 3, 1, 2), ghost_add.unsqueeze(1), padding=r, groups=C)
        return y.permute(0, 2, 3, 1)
    padded = F.pad(value, (0, 0, r, r, r, r))  # on dilated convolutions see eager.py
    y = torch.zeros_like(value)
    for i in range(K):
        for j in range(K):
            y = y + padded[:, i * d:i * d + H, j * d:j * d + W] * ghost_add[:, i, j]
    return y
