"""Loops of attention along lines (see `numba.py`), compiled at their first call and kept on disk.

Tensors come as addresses of contiguous memory. `vec` is the type of vector in which the channels of a head's values are
taken, `lanes` that of keys; `taps` is the number of keys with those of zero that fill the last vector.
"""
import numpy as np

from .._njit import compiled
from .._simd import (
    add,
    bytes_of,
    claim,
    exp,
    fill,
    first_entry,
    fma,
    get,
    largest,
    load,
    maximum,
    mul,
    put,
    store,
    sub,
    total,
    width,
)


@compiled
def _logits(lanes, logits, qkv, q, other, keys, scale, rel_query, rel_key, taps, channels, columns):
    """Write the logits of two neighbouring queries, at `q` and `other`; tables begin where those of the first do."""
    size = bytes_of(lanes)
    scales = fill(scale, lanes)
    # distances from the second query are one less; a line of one pixel has no second
    other_query, other_key = rel_query, rel_key
    if other != q:
        other_query, other_key = rel_query - size, rel_key - size
    for k in range(0, taps, width(lanes)):
        content0, query0, key0 = fill(0., lanes), fill(0., lanes), fill(0., lanes)
        content1, query1, key1 = fill(0., lanes), fill(0., lanes), fill(0., lanes)
        for c in range(channels):
            x0, x1 = fill(get(qkv, q + c, lanes), lanes), fill(get(qkv, other + c, lanes), lanes)
            key = load(keys, c * taps + k, lanes)
            at = c * columns + k
            content0 = fma(x0, key, content0)
            content1 = fma(x1, key, content1)
            query0 = fma(x0, load(rel_query, at, lanes), query0)
            query1 = fma(x1, load(other_query, at, lanes), query1)
            key0 = fma(key, load(rel_key, at, lanes), key0)
            key1 = fma(key, load(other_key, at, lanes), key1)
        store(logits, k, add(fma(scales, content0, query0), key0))
        store(logits, taps + k, add(fma(scales, content1, query1), key1))


@compiled
def _exponentials(lanes, weights, start, L, taps):
    """Put e to the power of the logits from `start` on, less the largest, in their place; return the sum."""
    n = width(lanes)
    nothing = first_entry(fill(-np.inf, lanes))
    for k in range(L, taps):
        put(weights, start + k, nothing)
    top = load(weights, start, lanes)
    for k in range(n, taps, n):
        top = maximum(load(weights, start + k, lanes), top)
    top = largest(top)
    sums = fill(0., lanes)
    for k in range(0, taps, n):
        weight = exp(sub(load(weights, start + k, lanes), top))
        store(weights, start + k, weight)
        sums = add(sums, weight)
    return total(sums)


@compiled
def _line(vec, lanes, line, out, qkv, qk_scale, rel_query, rel_key, rel_value, spare, L, taps, C, G):
    """A line of the output, two pixels at a time, which share the loads of keys and values."""
    D, size = C // G, bytes_of(lanes)
    channels, columns = D // 2, L - 1 + taps
    keys, weights = spare, spare + channels * taps * size
    zero = first_entry(fill(0., lanes))
    for g in range(G):
        for c in range(channels):
            for k in range(L):
                put(keys, c * taps + k, get(qkv, (line * L + k) * 2 * C + C // 2 + g * channels + c, lanes))
            for k in range(L, taps):
                put(keys, c * taps + k, zero)
        for i in range(0, L, 2):
            j = min(i + 1, L - 1)
            first = L - 1 - i  # the column of the distance from query i to the first key
            table = (g * channels * columns + first) * size
            q, other = (line * L + i) * 2 * C + g * channels, (line * L + j) * 2 * C + g * channels
            _logits(
                lanes, weights, qkv, q, other, keys, get(qk_scale, g, lanes), rel_query + table, rel_key + table,
                taps, channels, columns)
            share0 = fill(1. / _exponentials(lanes, weights, 0, L, taps), vec)
            share1 = fill(1. / _exponentials(lanes, weights, taps, L, taps), vec)
            for c in range(0, D, width(vec)):
                content0, position0, content1, position1 = fill(0., vec), fill(0., vec), fill(0., vec), fill(0., vec)
                values = line * L * 2 * C + C + g * D + c
                distances = (g * (2 * L - 1) + first) * D + c
                other_distances = distances - (j - i) * D
                for k in range(L):
                    weight0 = fill(get(weights, k, vec), vec)
                    weight1 = fill(get(weights, taps + k, vec), vec)
                    value = load(qkv, values + k * 2 * C, vec)
                    content0 = fma(weight0, value, content0)
                    content1 = fma(weight1, value, content1)
                    position0 = fma(weight0, load(rel_value, distances + k * D, vec), position0)
                    position1 = fma(weight1, load(rel_value, other_distances + k * D, vec), position1)
                store(out, (line * L + i) * C + g * D + c, mul(add(content0, position0), share0))
                store(out, (line * L + j) * C + g * D + c, mul(add(content1, position1), share1))


@compiled
def forward(
        vec, lanes, counter, tasks, out, qkv, qk_scale, rel_query, rel_key, rel_value, spare, room, L, taps, C, G):
    """All lines, each a task with `room` bytes of its own in `spare`."""
    while True:
        line = claim(counter)
        if line >= tasks:
            return
        _line(
            vec, lanes, line, out, qkv, qk_scale, rel_query, rel_key, rel_value, spare + line * room, L, taps, C, G)
