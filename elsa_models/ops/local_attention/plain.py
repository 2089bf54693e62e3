"""Local attention from core operators alone, for graphs that leave PyTorch: ONNX, torch.export, TorchScript.

The map is cut into tiles. For one tile and one head the attention is a banded matrix (pixels of the tile x pixels that
it sees), so that one batched matrix product aggregates the whole map. A product with a constant matrix of zeros and
ones puts the weights into the band, and one gather fetches the pixels: in ONNX Runtime both are faster than pads and
slices, which it runs on one thread.

Autograd differentiates it any number of times, which makes it the path of double backward as well. Its temporaries
(10 values per value for K = 7; with a ghost factor K * K) are why eager mode has `eager.py`.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .._graphs import is_exporting


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
    seen = value
    if ghost_mul is None and not _is_for_runtimes():
        # what is no number would meet the zeros of a tile's matrix and spoil pixels that do not see it: it comes to
        # those that do with the static term, be that of zeros
        seen = torch.where(value - value == 0., value, torch.zeros_like(value))
        if ghost_add is None:
            ghost_add = torch.zeros(value.shape[3], kernel_size, kernel_size, dtype=value.dtype, device=value.device)
    y = _aggregate(seen, weights, kernel_size, dilation, ghost_mul)
    if ghost_add is not None:
        y = y + _static_term(value, ghost_add.to(value.dtype), kernel_size, dilation)
    return y.to(dtype)


def _is_for_runtimes() -> bool:
    """Whether the graph is exported: there a NaN may reach all of its tile, for three operators more are too dear."""
    if torch.jit.is_scripting():
        return False
    return is_exporting()


def _aggregate(
        value: torch.Tensor,
        weights: torch.Tensor,
        K: int,
        d: int,
        ghost_mul: Optional[torch.Tensor],
        tile_h: int = 2,
        tile_w: int = 4,
) -> torch.Tensor:
    # 2 x 4 is the fastest in ONNX Runtime of shapes from 1 x 7 to 7 x 7; it sees 10 pixels for each of its own at K = 7
    B, H, W, C = value.shape
    G = weights.shape[3]
    # a factor per channel and tap leaves no matrix that channels could share: each pixel is a tile of its own
    t_h, t_w = (tile_h, tile_w) if ghost_mul is None else (1, 1)
    n_h, n_w = (H + t_h - 1) // t_h, (W + t_w - 1) // t_w
    H_t, W_t = n_h * t_h, n_w * t_w
    N, t = n_h * n_w, t_h * t_w  # tiles, pixels of a tile

    # the pixels that each tile sees, by their offset from its first in the padded map
    r = K // 2 * d
    H_p, W_p = H_t + 2 * r, W_t + 2 * r
    steps = torch.arange(max(t_h, t_w) + 2 * r, device=value.device)
    taps = (steps[:2 * r + 1:d, None] * W_p + steps[:2 * r + 1:d]).reshape(K * K)
    offsets = taps if t == 1 else (steps[:t_h + 2 * r, None] * W_p + steps[:t_w + 2 * r]).reshape(-1)
    P = offsets.shape[0]
    corners = torch.arange(n_h, device=value.device)[:, None] * (t_h * W_p)
    corners = (corners + torch.arange(n_w, device=value.device) * t_w).reshape(N)
    heads = torch.arange(G, device=value.device)
    seen = (corners[:, None, None] + offsets) * G + heads[:, None]  # N, G, P
    padded = F.pad(value, (0, 0, r, W_p - W - r, r, H_p - H - r)).reshape(B, H_p * W_p * G, C // G)
    neighbours = padded.index_select(1, seen.reshape(N * G * P)).reshape(B, N, G, P, C // G)

    if ghost_mul is not None:
        neighbours = neighbours * ghost_mul.to(value.dtype).reshape(G, C // G, P).transpose(1, 2)
        band = weights.reshape(B, N, G, 1, P)
    else:
        # the weights of a tile's pixel i, times the matrix of zeros and ones that puts each tap where it looks
        pixels = (steps[:t_h, None] * W_p + steps[:t_w]).reshape(t)
        place = (pixels[:, None, None] + taps[:, None]) == offsets  # t, K * K, P
        band = F.pad(weights, (0, 0, 0, 0, 0, W_t - W, 0, H_t - H))
        band = band.reshape(B, n_h, t_h, n_w, t_w, G * K * K).permute(2, 4, 0, 1, 3, 5).reshape(t, B * N * G, K * K)
        band = (band @ place.to(band.dtype)).transpose(0, 1).reshape(B, N, G, t, P)
    y = band @ neighbours  # B, N, G, t, C / G
    y = y.reshape(B, n_h, n_w, G, t_h, t_w, C // G).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H_t, W_t, C)
    if not torch.jit.is_scripting():
        if isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt):
            # a crop is a view, and export would hold on to whether it was contiguous in the example
            rows, columns = torch.arange(H, device=y.device), torch.arange(W, device=y.device)
            return y.index_select(1, rows).index_select(2, columns)
    return y[:, :H, :W]


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
