"""Products of neighbouring pixels in pure PyTorch, as batched products of banded matrices with tiles of a map.

What the operators' `eager.py` share.
"""
from typing import Callable, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

# bounds of one chunk's temporaries: what caches hold, and on other devices what memory can spare
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 1 << 22, 1 << 28


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """The type that sums are taken in: float32 for the half precisions."""
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype


def chunks(value: torch.Tensor, K: int) -> Iterator[slice]:
    """Samples that pass through all steps together, so that what lies between the steps stays in cache or in bounds."""
    # 2 cores, ELSA-Swin-T's first stage, batch 8: 9 ms for one sample at a time, 13 for all at once; but on maps of
    # 16 x 16, batch 64, the overhead of one at a time is 2 to 5 times the work
    B, H, W, C = value.shape
    bound = _CPU_CHUNK_BYTES if value.device.type == 'cpu' else _CHUNK_BYTES
    step = max(1, bound // max(1, 16 * K * H * W * C))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


def tile_width(width: int, tile: int = 14) -> int:
    """Width of the tiles that cut a row of `width` pixels with little padding; 14 divides the maps at 224 pixels."""
    count = max(1, (width + tile // 2) // tile)
    return max(1, (width + count - 1) // count)


def tap_slices(K: int, d: int, H: int, W: int) -> Iterator[Tuple[int, slice, slice]]:
    """Number of every tap, and the rows and columns of a padded map where the pixels of the map see it."""
    for tap in range(K * K):
        i, j = tap // K * d, tap % K * d
        yield tap, slice(i, i + H), slice(j, j + W)


class Bands:
    """Products of neighbouring pixels of maps like a given one.

    A row of W pixels is cut into n tiles of t, each of which sees P = t + (K - 1) d pixels in each of its K rows.
    Rows come first in every buffer, so that shifting by a row is a slice that batched products take as it is.
    Weights and logits are (b, H, W, G, K * K), everything else (b, H, W, C).

    In a band, what is no number meets the zeros beside the diagonals and would spoil pixels that do not see it. Samples
    that have such are summed tap by tap instead.
    """

    def __init__(self, value: torch.Tensor, heads: int, K: int, d: int, dtype: torch.dtype) -> None:
        _, self.H, self.W, C = value.shape
        self.G, self.Cg, self.K, self.d = heads, C // heads, K, d
        self.r = K // 2 * d
        self.t = tile_width(self.W)
        self.n = -(-self.W // self.t)
        self.P = self.t + 2 * self.r
        self.dtype, self.device = dtype, value.device
        self._band: Optional[torch.Tensor] = None

    def aggregate(self, v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Sum the neighbours `v` of every pixel with its weights `a`."""
        b, H = v.shape[0], self.H
        band, seen = self._spread(a), self._tile_neighbours(v)
        y = torch.bmm(self._batch(band[0]), self._batch(seen[:H]))
        for i in range(1, self.K):
            y.baddbmm_(self._batch(band[i]), self._batch(seen[self._rows(i)]))
        y = y.view(H, b, self.n, self.G, self.t, self.Cg).permute(1, 0, 2, 4, 3, 5)
        y = y.reshape(b, H, self.n * self.t, -1)[:, :, :self.W]
        return self._mend(y, lambda one: self._aggregate_by_taps(v[one], a[one]))

    def aggregate_transposed(self, g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Send every pixel `g`, times its weights `a`, to its neighbours: the gradient of `aggregate` for `v`."""
        sent = self._send(self._tile_pixels(g), self._spread(a))
        return self._mend(sent, lambda one: self._send_by_taps(g[one], a[one]))

    def multiply(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Multiply every pixel of `q` with its neighbours in `k`: the gradient of `aggregate` for `a`."""
        return self._multiply(self._tile_pixels(q), self._tile_neighbours(k))

    def aggregate_backward(
            self, g: torch.Tensor, v: torch.Tensor, a: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Gradients of `aggregate` for `v` and `a`."""
        return self.aggregate_transposed(g, a), self.multiply(g, v)

    def _mend(self, y: torch.Tensor, by_taps: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        if y.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return y  # nobody may ask what is in a tensor
        finite = y.flatten(1).sum(dim=1).isfinite()
        for i in (~finite).nonzero().flatten().tolist():
            y[i:i + 1] = by_taps(slice(i, i + 1))
        return y

    def _aggregate_by_taps(self, v: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        b, H, W, r = v.shape[0], self.H, self.W, self.r
        padded = F.pad(v, (0, 0, r, r, r, r)).unflatten(-1, (self.G, self.Cg))
        y = v.new_zeros(b, H, W, self.G, self.Cg)
        for tap, rows, columns in tap_slices(self.K, self.d, H, W):
            y += padded[:, rows, columns] * a[..., tap, None]
        return y.flatten(3)

    def _send_by_taps(self, g: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        b, H, W, r = g.shape[0], self.H, self.W, self.r
        g = g.unflatten(-1, (self.G, self.Cg))
        sent = g.new_zeros(b, H + 2 * r, W + 2 * r, self.G, self.Cg)
        for tap, rows, columns in tap_slices(self.K, self.d, H, W):
            sent[:, rows, columns] += g * a[..., tap, None]
        return sent.flatten(3)[:, r:r + H, r:r + W]

    def _send(self, g: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
        b, H, W, n, t, r = band.shape[2], self.H, self.W, self.n, self.t, self.r
        sent = g.new_zeros(H + 2 * r, b, n, self.G, self.P, self.Cg)
        for i in range(self.K):
            self._batch(sent[self._rows(i)]).baddbmm_(self._batch(band[i]).transpose(1, 2), g)
        y = g.new_zeros(H + 2 * r, b, n * t + 2 * r, self.G, self.Cg)
        for j in range(n):  # neighbouring tiles see 2r pixels in common
            y[:, :, j * t:j * t + self.P] += sent[:, :, j].transpose(2, 3)
        return y.flatten(3)[r:r + H, :, r:r + W].transpose(0, 1)

    def _multiply(self, q: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        b, H, n, t = seen.shape[1], self.H, self.n, self.t
        band = q.new_empty(self.K, H, b, n, self.G, t, self.P)
        for i in range(self.K):
            torch.bmm(q, self._batch(seen[self._rows(i)]).transpose(1, 2), out=self._batch(band[i]))
        a = self._diagonals(band).permute(2, 1, 3, 5, 4, 0, 6)  # b, H, n, t, G, K, K
        return a.reshape(b, H, n * t, self.G, -1)[:, :, :self.W].contiguous()

    def _rows(self, i: int) -> slice:
        return slice(i * self.d, i * self.d + self.H)

    def _spread(self, a: torch.Tensor) -> torch.Tensor:
        """Write attention (b, H, W, G, K * K) onto the diagonals of the bands (K, H, b, n, G, t, P)."""
        b, H, n, t, K = a.shape[0], self.H, self.n, self.t, self.K
        if self._band is None or self._band.shape[2] != b:
            self._band = torch.zeros(K, H, b, n, self.G, t, self.P, dtype=self.dtype, device=self.device)
        a = self._fill_tiles(a.flatten(3)).view(b, H, n, t, self.G, K, K)
        self._diagonals(self._band).copy_(a.permute(5, 1, 0, 2, 4, 3, 6))
        return self._band

    def _diagonals(self, band: torch.Tensor) -> torch.Tensor:
        """View of bands (K, H, b, n, G, t, P) at pixel i, column i + d j of each tile: (K, H, b, n, G, t, K)."""
        stride = band.stride()
        return band.as_strided(band.shape[:-1] + (self.K,), stride[:-2] + (stride[-2] + 1, self.d))

    def _tile_pixels(self, g: torch.Tensor) -> torch.Tensor:
        """Cut a map (b, H, W, C) into tiles (H b n G, t, C / G)."""
        g = self._fill_tiles(g).view(g.shape[0], self.H, self.n, self.t, self.G, self.Cg)
        return g.permute(1, 0, 2, 4, 3, 5).reshape(-1, self.t, self.Cg)

    def _tile_neighbours(self, v: torch.Tensor) -> torch.Tensor:
        """Cut a map (b, H, W, C) into overlapping tiles (H + 2r, b, n, G, P, C / G)."""
        b, r, C = v.shape[0], self.r, v.shape[3]
        v = F.pad(v, (0, 0, r, r + self.n * self.t - self.W, r, r)).contiguous()  # b, H + 2r, n t + 2r, C
        rows, width = v.shape[1], v.shape[2]
        shape = (rows, b, self.n, self.G, self.P, self.Cg)
        return v.as_strided(shape, (width * C, rows * width * C, self.t * C, self.Cg, C, 1)).contiguous()

    def _fill_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """Pad maps (b, H, W, C) to (b, H, n t, C), contiguous."""
        extra = self.n * self.t - self.W
        return F.pad(x, (0, 0, 0, extra)).contiguous() if extra else x.contiguous()  # a pad by nothing would copy

    @staticmethod
    def _batch(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, x.shape[-2], x.shape[-1])
