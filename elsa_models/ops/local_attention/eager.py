"""Local attention in pure PyTorch with its own backward: the backend wherever no kernel of ours serves.

Without a ghost factor the aggregation is a batched matrix product, as in `plain.py`, but nothing is gathered K times
over: the softmax is written straight onto the diagonals of a zeroed buffer, and the K rows of taps are K products that
accumulate in place. With one there is no product to be had, and the taps are summed one by one.

A chunk of samples passes through all steps before the next begins, so that what lies between the steps stays in cache
(CPU) or within a bound (elsewhere); nothing between the steps outlives a chunk, and backward recomputes it.
Arithmetic is in float32 for the half precisions. Measured on a CPU against sums of shifted slices, K = 7: 1.4 to 3
times as fast forward at batch 1, 2 to 3.5 times at batch 8 (benchmarks/).
"""
from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F

from .plain import tile_width

# bounds of one chunk's temporaries: what caches hold, and on other devices what memory can spare
_CPU_CHUNK_BYTES, _CHUNK_BYTES = 1 << 22, 1 << 28

Grads = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


def refuse(value: torch.Tensor) -> Optional[str]:
    """This backend takes everything."""
    return None


def forward(
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> torch.Tensor:
    """See `local_attention_reference`, whose arguments and result these are."""
    K, d, dtype = kernel_size, dilation, compute_dtype(value)
    mul, add = _cast(ghost_mul, dtype), _cast(ghost_add, dtype)
    out = value.new_empty(value.shape)
    bands = _Bands(value, logits.shape[3], K, d, dtype)
    for chunk in _chunks(value, K):
        v, a = value[chunk].to(dtype), logits[chunk].to(dtype)
        if normalize:
            a = a.softmax(dim=-1)
        y = bands.aggregate(v, a) if mul is None else _tap_sum(v, a, mul, K, d)
        if add is not None:
            _add_static_term(y, v, add, d)
        out[chunk] = y
    return out


def backward(
        grad: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> Grads:
    """Gradients of value, logits, ghost_mul and ghost_add (None where that is None) for the output's `grad`."""
    K, d, dtype = kernel_size, dilation, compute_dtype(value)
    mul, add = _cast(ghost_mul, dtype), _cast(ghost_add, dtype)
    grad_value, grad_logits = value.new_empty(value.shape), logits.new_empty(logits.shape)
    grad_mul = None if mul is None else mul.new_zeros(mul.shape)
    grad_add = None if add is None else add.new_zeros(add.shape)
    bands = _Bands(value, logits.shape[3], K, d, dtype)
    for chunk in _chunks(value, K):
        g, v, a = grad[chunk].to(dtype), value[chunk].to(dtype), logits[chunk].to(dtype)
        if normalize:
            a = a.softmax(dim=-1)
        if mul is None:
            gv, ga = bands.aggregate_backward(g, v, a)
        else:
            gv, ga = _tap_sum_backward(g, v, a, mul, grad_mul, K, d)
        if add is not None:
            _add_static_term_backward(gv, grad_add, g, v, add, d)
        if normalize:
            ga = torch._softmax_backward_data(ga, a, -1, dtype)
        grad_value[chunk], grad_logits[chunk] = gv, ga
    return grad_value, grad_logits, _cast(grad_mul, value.dtype), _cast(grad_add, value.dtype)


def compute_dtype(value: torch.Tensor) -> torch.dtype:
    """The type that sums are taken in: float32 for the half precisions."""
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype


def _cast(x: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[torch.Tensor]:
    return None if x is None else x.to(dtype)


def _chunks(value: torch.Tensor, K: int) -> Iterator[slice]:
    # 2 cores, ELSA-Swin-T's first stage, batch 8: 9 ms for one sample at a time, 13 for all at once; but on maps of
    # 16 x 16, batch 64, the overhead of one at a time is 2 to 5 times the work
    B, H, W, C = value.shape
    bound = _CPU_CHUNK_BYTES if value.device.type == 'cpu' else _CHUNK_BYTES
    step = max(1, bound // max(1, 16 * K * H * W * C))
    for start in range(0, B, step):
        yield slice(start, min(start + step, B))


class _Bands:
    """Local attention as products of banded matrices with tiles of values.

    A row of W pixels is cut into n tiles of t, each of which sees P = t + (K - 1) d pixels in each of its K rows.
    Rows come first in every buffer, so that shifting by a row is a slice that batched products take as it is.
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
        b, H = v.shape[0], self.H
        band, seen = self._spread(a), self._tile_values(v)
        y = torch.bmm(self._batch(band[0]), self._batch(seen[:H]))
        for i in range(1, self.K):
            y.baddbmm_(self._batch(band[i]), self._batch(seen[i * self.d:i * self.d + H]))
        y = y.view(H, b, self.n, self.G, self.t, self.Cg).permute(1, 0, 2, 4, 3, 5)
        return y.reshape(b, H, self.n * self.t, -1)[:, :, :self.W]

    def aggregate_backward(
            self, g: torch.Tensor, v: torch.Tensor, a: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        b, H, W, n, t, r = v.shape[0], self.H, self.W, self.n, self.t, self.r
        band, seen = self._spread(a), self._tile_values(v)
        g = self._fill_tiles(g).view(b, H, n, t, self.G, self.Cg)
        g = g.permute(1, 0, 2, 4, 3, 5).reshape(-1, t, self.Cg)  # H b n G, t, C / G
        grad_band, grad_seen = torch.empty_like(band), torch.zeros_like(seen)
        for i in range(self.K):
            rows = slice(i * self.d, i * self.d + H)
            torch.bmm(g, self._batch(seen[rows]).transpose(1, 2), out=self._batch(grad_band[i]))
            self._batch(grad_seen[rows]).baddbmm_(self._batch(band[i]).transpose(1, 2), g)

        ga = self._diagonals(grad_band).permute(2, 1, 3, 5, 4, 0, 6)  # b, H, n, t, G, K, K
        ga = ga.reshape(b, H, n * t, self.G, -1)[:, :, :W].contiguous()
        gv = v.new_zeros(H + 2 * r, b, n * t + 2 * r, self.G, self.Cg)
        for j in range(n):  # neighbouring tiles see 2r pixels in common
            gv[:, :, j * t:j * t + self.P] += grad_seen[:, :, j].transpose(2, 3)
        return gv.flatten(3)[r:r + H, :, r:r + W].transpose(0, 1), ga

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

    def _tile_values(self, v: torch.Tensor) -> torch.Tensor:
        """Cut values (b, H, W, C) into overlapping tiles (H + 2r, b, n, G, P, C / G)."""
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


def _tap_slices(K: int, d: int, H: int, W: int) -> Iterator[Tuple[int, slice, slice]]:
    for tap in range(K * K):
        i, j = tap // K * d, tap % K * d
        yield tap, slice(i, i + H), slice(j, j + W)


def _by_tap(v: torch.Tensor, a: torch.Tensor, mul: torch.Tensor, r: int) -> Tuple[torch.Tensor, ...]:
    b, H, W, C = v.shape
    G = a.shape[3]
    padded = F.pad(v, (0, 0, r, r, r, r)).reshape(b, H + 2 * r, W + 2 * r, G, C // G)
    a = a.permute(4, 0, 1, 2, 3).unsqueeze(-1).contiguous()  # K * K, b, H, W, G, 1
    mul = mul.flatten(1).t().contiguous().view(-1, G, C // G)  # K * K, G, C / G
    return padded, a, mul


def _tap_sum(v: torch.Tensor, a: torch.Tensor, mul: torch.Tensor, K: int, d: int) -> torch.Tensor:
    b, H, W, C = v.shape
    G = a.shape[3]
    padded, a, mul = _by_tap(v, a, mul, K // 2 * d)
    y = v.new_zeros(b, H, W, G, C // G)
    for tap, rows, columns in _tap_slices(K, d, H, W):
        y.addcmul_(padded[:, rows, columns] * mul[tap], a[tap])
    return y.flatten(3)


def _tap_sum_backward(
        g: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        mul: torch.Tensor,
        grad_mul: torch.Tensor,
        K: int,
        d: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Gradients of value and attention; that of `mul` is added to `grad_mul`."""
    b, H, W, C = v.shape
    G, r = a.shape[3], K // 2 * d
    padded, a, mul = _by_tap(v, a, mul, r)
    g = g.reshape(b, H, W, G, C // G)
    grad_padded, grad_a = padded.new_zeros(padded.shape), torch.empty_like(a)
    grad_taps = grad_mul.view(G, C // G, K * K)
    for tap, rows, columns in _tap_slices(K, d, H, W):
        product = g * padded[:, rows, columns]
        torch.sum(product * mul[tap], dim=-1, keepdim=True, out=grad_a[tap])
        grad_taps[..., tap] += (product * a[tap]).sum(dim=(0, 1, 2))
        grad_padded[:, rows, columns] += g * a[tap] * mul[tap]
    gv = grad_padded.flatten(3)[:, r:r + H, r:r + W]
    return gv, grad_a.squeeze(-1).permute(1, 2, 3, 4, 0).contiguous()


def _conv_batches(v: torch.Tensor) -> Iterator[slice]:
    # a CPU convolution chooses its algorithm by the batch as well: alone, a sample's result is always the same
    step = 1 if v.device.type == 'cpu' else v.shape[0]
    for start in range(0, v.shape[0], step):
        yield slice(start, start + step)


def _add_static_term(y: torch.Tensor, v: torch.Tensor, add: torch.Tensor, d: int) -> None:
    """Add the neighbours weighted by `add` to `y`."""
    C, K = add.shape[:2]
    for batch in _conv_batches(v):
        static = F.conv2d(v[batch].permute(0, 3, 1, 2), add.unsqueeze(1), padding=K // 2 * d, dilation=d, groups=C)
        y[batch] += static.permute(0, 2, 3, 1)


def _add_static_term_backward(
        gv: torch.Tensor,
        grad_add: torch.Tensor,
        g: torch.Tensor,
        v: torch.Tensor,
        add: torch.Tensor,
        d: int,
) -> None:
    """Add the gradients of value and `add` to `gv` and `grad_add`."""
    C, K = add.shape[:2]
    pad = K // 2 * d
    for batch in _conv_batches(v):
        static, weight, _ = torch.ops.aten.convolution_backward(
            g[batch].permute(0, 3, 1, 2), v[batch].permute(0, 3, 1, 2), add.unsqueeze(1),
            None, [1, 1], [pad, pad], [d, d], False, [0, 0], C, [True, d == 1, False])
        gv[batch] += static.permute(0, 2, 3, 1)
        if d == 1:
            grad_add += weight.squeeze(1)
    if d > 1:  # PyTorch's dilated convolution sums its weights' gradient with 6 times the error of a plain sum
        padded = F.pad(v, (0, 0, pad, pad, pad, pad))
        for tap, rows, columns in _tap_slices(K, d, v.shape[1], v.shape[2]):
            grad_add.view(C, -1)[:, tap] += (g * padded[:, rows, columns]).sum(dim=(0, 1, 2))
