"""Local logits from core operators alone, for graphs that leave PyTorch: ONNX, torch.export, TorchScript.

The map is cut into tiles as in `local_attention_plain`. One batched matrix product multiplies the queries of a tile
with all keys that it sees; a product with a constant matrix of zeros and ones then picks, for each pixel, the K * K
that are its neighbours. Autograd differentiates it any number of times: this is the path of double backward as well.
"""
from typing import Optional

import torch
import torch.nn.functional as F


def local_logits_plain(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
        row_bias: Optional[torch.Tensor] = None,
        column_bias: Optional[torch.Tensor] = None,
        num_heads: int = 1,
        border: str = 'zero',
) -> torch.Tensor:
    """See `local_logits_reference`, whose arguments and result these are."""
    dtype = query.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        query, key = query.float(), key.float()
    B, H, W, _ = query.shape
    G, K = num_heads, kernel_size
    logits = _products(query, key, G, K, dilation)
    if row_bias is not None:
        logits = logits + row_bias.to(logits.dtype).unsqueeze(-1)
    if column_bias is not None:
        logits = logits + column_bias.to(logits.dtype).unsqueeze(-2)
    if border == 'mask':
        outside = taps_outside(H, W, K, dilation, query.device)
        logits = logits.masked_fill(outside.unsqueeze(2), -float('inf'))
    return logits.flatten(4).to(dtype)


def taps_outside(H: int, W: int, K: int, d: int, device: torch.device) -> torch.Tensor:
    """Which taps of every pixel lie outside the map: (H, W, K, K)."""
    steps = (torch.arange(K, device=device) - K // 2) * d
    rows, columns = torch.arange(H, device=device)[:, None] + steps, torch.arange(W, device=device)[:, None] + steps
    rows, columns = (rows < 0) | (rows >= H), (columns < 0) | (columns >= W)  # H, K and W, K
    return rows[:, None, :, None] | columns[None, :, None, :]


def _products(
        query: torch.Tensor,
        key: torch.Tensor,
        G: int,
        K: int,
        d: int,
        t_h: int = 2,
        t_w: int = 4,
) -> torch.Tensor:
    """Products (B, H, W, G, K, K) of queries and their neighbours' keys, by tiles of t_h x t_w pixels."""
    B, H, W, C = query.shape
    r = K // 2 * d
    n_h, n_w = (H + t_h - 1) // t_h, (W + t_w - 1) // t_w
    H_t, W_t = n_h * t_h, n_w * t_w
    N, t = n_h * n_w, t_h * t_w  # tiles, pixels of a tile
    H_p, W_p = H_t + 2 * r, W_t + 2 * r

    # where a tile's P pixels are, counted from the first: of all that its own pixels see
    rows, columns = torch.arange(t_h + 2 * r, device=query.device), torch.arange(t_w + 2 * r, device=query.device)
    seen = (rows[:, None] * W_p + columns).reshape(-1)
    corners = torch.arange(n_h, device=query.device)[:, None] * (t_h * W_p)
    corners = (corners + torch.arange(n_w, device=query.device) * t_w).reshape(N)
    heads = torch.arange(G, device=query.device)
    seen_by_tile = (corners[:, None, None] + seen) * G + heads[:, None]  # N, G, P
    P = seen.shape[0]
    padded = F.pad(key, (0, 0, r, W_p - W - r, r, H_p - H - r)).reshape(B, H_p * W_p * G, C // G)
    keys = padded.index_select(1, seen_by_tile.reshape(N * G * P)).reshape(B, N, G, P, C // G)
    queries = F.pad(query, (0, 0, 0, W_t - W, 0, H_t - H)).reshape(B, n_h, t_h, n_w, t_w, G, C // G)
    queries = queries.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, N, G, t, C // G)
    products = queries @ keys.transpose(3, 4)  # B, N, G, t, P

    pixels = (rows[:t_h, None] * W_p + columns[:t_w]).reshape(t)
    taps = (rows[:2 * r + 1:d, None] * W_p + columns[:2 * r + 1:d]).reshape(K * K)
    place = (pixels[:, None, None] + taps[:, None]) == seen  # t, K * K, P
    picked = products.permute(3, 0, 1, 2, 4).reshape(t, B * N * G, P) @ place.to(products.dtype).transpose(1, 2)
    picked = picked.reshape(t_h, t_w, B, n_h, n_w, G, K, K).permute(2, 3, 0, 4, 1, 5, 6, 7)
    picked = picked.reshape(B, H_t, W_t, G, K, K)
    if not torch.jit.is_scripting():
        if isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt):
            # a crop is a view, and export would hold on to whether it was contiguous in the example
            all_rows, all_columns = torch.arange(H, device=query.device), torch.arange(W, device=query.device)
            return picked.index_select(1, all_rows).index_select(2, all_columns)
    return picked[:, :H, :W]
