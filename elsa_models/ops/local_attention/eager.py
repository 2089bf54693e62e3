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

from .._bands import Bands, chunks, compute_dtype, tap_slices

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
    bands = Bands(value, logits.shape[3], K, d, dtype)
    for chunk in chunks(value, K):
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
    bands = Bands(value, logits.shape[3], K, d, dtype)
    for chunk in chunks(value, K):
        g, v, a = grad[chunk].to(dtype), value[chunk].to(dtype), logits[chunk].to(dtype)
        if normalize:
            a = a.softmax(dim=-1)
        if mul is None or grad_mul is None:
            gv, ga = bands.aggregate_backward(g, v, a)
        else:
            gv, ga = _tap_sum_backward(g, v, a, mul, grad_mul, K, d)
        if add is not None and grad_add is not None:
            _add_static_term_backward(gv, grad_add, g, v, add, d)
        if normalize:  # PyTorch's own takes sums in an order that follows the number of threads
            ga = a * (ga - (a * ga).sum(dim=-1, keepdim=True))
        grad_value[chunk], grad_logits[chunk] = gv, ga
    return grad_value, grad_logits, _cast(grad_mul, value.dtype), _cast(grad_add, value.dtype)


def _cast(x: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[torch.Tensor]:
    return None if x is None else x.to(dtype)


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
    for tap, rows, columns in tap_slices(K, d, H, W):
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
    for tap, rows, columns in tap_slices(K, d, H, W):
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
    r = K // 2 * d
    for batch in _conv_batches(v):
        static, _, _ = torch.ops.aten.convolution_backward(
            g[batch].permute(0, 3, 1, 2), v[batch].permute(0, 3, 1, 2), add.unsqueeze(1),
            None, [1, 1], [r, r], [d, d], False, [0, 0], C, [True, False, False])
        gv[batch] += static.permute(0, 2, 3, 1)
    # PyTorch's convolution sums its weights' gradient in an order that follows the number of threads and, if dilated,
    # with 6 times the error of a plain sum
    grad_add += ghost_gradient(g, v, None, K, d)


def ghost_gradient(g: torch.Tensor, v: torch.Tensor, a: Optional[torch.Tensor], K: int, d: int) -> torch.Tensor:
    """Gradient (C, K, K) of `ghost_mul`, or of `ghost_add` if the attention `a` is None, for the output's gradient."""
    C, r = v.shape[3], K // 2 * d
    padded = F.pad(v, (0, 0, r, r, r, r))
    grad = v.new_empty(C, K * K)
    for tap, rows, columns in tap_slices(K, d, v.shape[1], v.shape[2]):
        product = g * padded[:, rows, columns]
        if a is not None:
            product = (product.unflatten(-1, (a.shape[3], -1)) * a[..., tap, None]).flatten(3)
        grad[:, tap] = product.sum(dim=(0, 1, 2))
    return grad.view(C, K, K)
