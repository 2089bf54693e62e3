"""Loops of the Numba backend of local logits (see `numba.py`), compiled at their first call and kept on disk.

Tensors come as addresses, of contiguous memory unless a stride is given, and None where there is none. `vec` is the
type of vector in which channels are taken, its width a divisor of the channels of a head. Pixels are numbered through
the batch.
"""
import numpy as np

from .._njit import compiled, inlined
from .._simd import bytes_of, claim, fill, first_entry, get, load, mul, put, totals, width
from ..local_attention.numba_kernels import channels_at


@compiled
def _begin(vec, out, n, row_bias, column_bias, K):
    """Write the biases of pixel and head number n, or zeros."""
    zero = first_entry(fill(0., vec))
    for i in range(K):
        row = zero
        if row_bias is not None:
            row = get(row_bias, n * K + i, vec)
        for j in range(K):
            logit = row
            if column_bias is not None:
                logit = row + get(column_bias, n * K + j, vec)
            put(out, (n * K + i) * K + j, logit)


@inlined
def _inside(x, W, K, d):
    """Range of the taps of a pixel in row or column x that are on the map."""
    r = K // 2
    return max(0, r - x // d), min(K, r + (W - 1 - x) // d + 1)


@compiled
def _mask(vec, out, n, y, x, H, W, K, d):
    """Write minus infinity to the taps of pixel and head number n that are outside the map."""
    top, bottom = _inside(y, H, K, d)
    left, right = _inside(x, W, K, d)
    if top == 0 and bottom == K and left == 0 and right == K:
        return
    nothing = first_entry(fill(-np.inf, vec))
    for i in range(K):
        for j in range(K):
            if i < top or i >= bottom or j < left or j >= right:
                put(out, (n * K + i) * K + j, nothing)


@compiled
def _forward_row(
        vec, row, out, query, query_stride, key, key_stride, row_bias, column_bias, spare, H, W, C, G, K, d, masks):
    """One row of the logits. Four pixels, d apart, share the loads of keys; `spare` has room for K * K numbers."""
    r, taps, D, size = K // 2, K * K, C // G, bytes_of(vec)
    y = row % H
    top, bottom = _inside(y, H, K, d)
    for first in range(min(d, W)):
        for x in range(first, W, 4 * d):
            p = row * W + x
            pixels = min(4, (W - 1 - x) // d + 1)
            for g in range(G):
                n = p * G + g
                o0, o1, o2, o3 = out + n * taps * size, spare, spare, spare
                if pixels > 1:
                    o1 = out + (n + d * G) * taps * size
                if pixels > 2:
                    o2 = out + (n + 2 * d * G) * taps * size
                if pixels > 3:
                    o3 = out + (n + 3 * d * G) * taps * size
                for q in range(pixels):
                    _begin(vec, out, n + q * d * G, row_bias, column_bias, K)
                for c in range(g * D, (g + 1) * D, width(vec)):
                    at = p * query_stride + c
                    u0, u1, u2, u3 = load(query, at, vec), fill(0., vec), fill(0., vec), fill(0., vec)
                    if pixels > 1:
                        u1 = load(query, at + d * query_stride, vec)
                    if pixels > 2:
                        u2 = load(query, at + 2 * d * query_stride, vec)
                    if pixels > 3:
                        u3 = load(query, at + 3 * d * query_stride, vec)
                    for i in range(top, bottom):
                        line = key + ((row + (i - r) * d) * W * key_stride + c) * size
                        u = x - r * d
                        v0 = channels_at(vec, line, u, W, key_stride)
                        v1 = channels_at(vec, line, u + d, W, key_stride)
                        v2 = channels_at(vec, line, u + 2 * d, W, key_stride)
                        for k in range(i * K, (i + 1) * K):
                            v3 = channels_at(vec, line, u + 3 * d, W, key_stride)
                            t0, t1, t2, t3 = totals(mul(u0, v0), mul(u1, v1), mul(u2, v2), mul(u3, v3))
                            put(o0, k, get(o0, k, vec) + t0)
                            put(o1, k, get(o1, k, vec) + t1)
                            put(o2, k, get(o2, k, vec) + t2)
                            put(o3, k, get(o3, k, vec) + t3)
                            v0, v1, v2 = v1, v2, v3
                            u += d
                    if top > 0 or bottom < K:
                        # keys of zero above and below the map: what they make of a query that is no number is none
                        v3 = fill(0., vec)
                        t0, t1, t2, t3 = totals(mul(u0, v3), mul(u1, v3), mul(u2, v3), mul(u3, v3))
                        for k in range(K * K):
                            if k < top * K or k >= bottom * K:
                                put(o0, k, get(o0, k, vec) + t0)
                                put(o1, k, get(o1, k, vec) + t1)
                                put(o2, k, get(o2, k, vec) + t2)
                                put(o3, k, get(o3, k, vec) + t3)
                if masks:
                    for q in range(pixels):
                        _mask(vec, out, n + q * d * G, y, x + q * d, H, W, K, d)


@compiled
def _sum_row(vec, row, grad_row_bias, grad_column_bias, grad, H, W, G, K, d, masks):
    """The gradients of both biases for one row of the map: sums of the logits' gradient over columns and rows."""
    zero = first_entry(fill(0., vec))
    top, bottom, left, right = 0, K, 0, K
    if masks:
        top, bottom = _inside(row % H, H, K, d)
    for x in range(W):
        if masks:
            left, right = _inside(x, W, K, d)
        for n in range((row * W + x) * G, (row * W + x + 1) * G):
            if grad_row_bias is not None:
                for i in range(K):
                    sum = zero
                    if top <= i < bottom:
                        for j in range(left, right):
                            sum += get(grad, (n * K + i) * K + j, vec)
                    put(grad_row_bias, n * K + i, sum)
            if grad_column_bias is not None:
                for j in range(K):
                    sum = zero
                    if left <= j < right:
                        for i in range(top, bottom):
                            sum += get(grad, (n * K + i) * K + j, vec)
                    put(grad_column_bias, n * K + j, sum)


@compiled
def forward(
        vec, lanes, counter, tasks, out, query, query_stride, key, key_stride, row_bias, column_bias, spare, room,
        H, W, C, G, K, d, masks):
    """All rows of the logits, each a task with `room` bytes of its own in `spare`."""
    while True:
        row = claim(counter)
        if row >= tasks:
            return
        _forward_row(
            vec, row, out, query, query_stride, key, key_stride, row_bias, column_bias, spare + row * room,
            H, W, C, G, K, d, masks)


@compiled
def sum_biases(vec, lanes, counter, tasks, grad_row_bias, grad_column_bias, grad, H, W, G, K, d, masks):
    """All rows of the gradients of the biases, each a task."""
    while True:
        row = claim(counter)
        if row >= tasks:
            return
        _sum_row(vec, row, grad_row_bias, grad_column_bias, grad, H, W, G, K, d, masks)
