"""Loops of attention of windows (see `numba.py`), compiled at their first call and kept on disk.

Tensors come as addresses of contiguous memory, None where there is none. `lanes` is the type of vector in which the
pixels of a window are taken; `pixels` is their number with those of zero that fill the last two vectors, `keys` that of
keys with those, unseen, that make it a multiple of four.
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
    get_whole,
    load,
    maximum,
    put,
    store,
    sub,
    width,
)


@compiled
def _find_keys(
        lanes, addresses, hidden, qkv, pooled, steps, places, bounded, first, window, rows, columns, L, S, keys, C):
    """Write the address of each key of a window of the image that begins with window `first`, and what to add to its
    logits: nothing, or minus infinity where it is unseen."""
    size = bytes_of(lanes)
    seen, unseen = first_entry(fill(0., lanes)), first_entry(fill(-np.inf, lanes))
    for s in range(keys):
        key = min(s, S - 1)
        row = window // columns + int(get(steps, key, lanes))
        column = window % columns + int(get(steps, S + key, lanes))
        outside = row < 0 or row >= rows or column < 0 or column >= columns
        is_bounded = False
        if bounded is not None:
            is_bounded = get(bounded, key, lanes) != 0.
        if s >= S or outside and is_bounded:
            row, column = window // columns, window % columns
            put(hidden, s, unseen)
        else:
            row, column = (row + rows) % rows, (column + columns) % columns
            put(hidden, s, seen)
        place = int(get(places, key, lanes))
        there = first + row * columns + column
        if place < L:
            put(addresses, s, qkv + ((there * L + place) * 3 * C + C) * size)
        else:
            put(addresses, s, pooled + there * 2 * C * size)


@compiled
def _write_logits(lanes, logits, queries, q, addresses, head, hidden, bias, pixels, keys, D):
    """Write the logits of the pixels of two vectors, from `q` on, with all keys, four at a time."""
    n = width(lanes)
    for s in range(0, keys, 4):
        k0, k1 = get_whole(addresses, s) + head, get_whole(addresses, s + 1) + head
        k2, k3 = get_whole(addresses, s + 2) + head, get_whole(addresses, s + 3) + head
        at = s * pixels + q
        h0, h1 = fill(get(hidden, s, lanes), lanes), fill(get(hidden, s + 1, lanes), lanes)
        h2, h3 = fill(get(hidden, s + 2, lanes), lanes), fill(get(hidden, s + 3, lanes), lanes)
        a0, b0 = add(load(bias, at, lanes), h0), add(load(bias, at + n, lanes), h0)
        a1, b1 = add(load(bias, at + pixels, lanes), h1), add(load(bias, at + pixels + n, lanes), h1)
        a2, b2 = add(load(bias, at + 2 * pixels, lanes), h2), add(load(bias, at + 2 * pixels + n, lanes), h2)
        a3, b3 = add(load(bias, at + 3 * pixels, lanes), h3), add(load(bias, at + 3 * pixels + n, lanes), h3)
        for c in range(D):
            a, b = load(queries, c * pixels + q, lanes), load(queries, c * pixels + q + n, lanes)
            x = fill(get(k0, c, lanes), lanes)
            a0, b0 = fma(x, a, a0), fma(x, b, b0)
            x = fill(get(k1, c, lanes), lanes)
            a1, b1 = fma(x, a, a1), fma(x, b, b1)
            x = fill(get(k2, c, lanes), lanes)
            a2, b2 = fma(x, a, a2), fma(x, b, b2)
            x = fill(get(k3, c, lanes), lanes)
            a3, b3 = fma(x, a, a3), fma(x, b, b3)
        store(logits, at, a0)
        store(logits, at + n, b0)
        store(logits, at + pixels, a1)
        store(logits, at + pixels + n, b1)
        store(logits, at + 2 * pixels, a2)
        store(logits, at + 2 * pixels + n, b2)
        store(logits, at + 3 * pixels, a3)
        store(logits, at + 3 * pixels + n, b3)


@compiled
def _exponentials(lanes, weights, sums, q, pixels, keys):
    """Put e to the power of the logits of a vector of pixels, less the largest of each, in their place."""
    top = load(weights, q, lanes)
    for s in range(1, keys):
        top = maximum(load(weights, s * pixels + q, lanes), top)
    sum = fill(0., lanes)
    for s in range(keys):
        weight = exp(sub(load(weights, s * pixels + q, lanes), top))
        store(weights, s * pixels + q, weight)
        sum = add(sum, weight)
    store(sums, q, sum)


@compiled
def _sum_values(lanes, results, weights, q, addresses, value, pixels, keys, D):
    """Write the sums of weighted values for the pixels of two vectors, from `q` on, four channels at a time."""
    n, size = width(lanes), bytes_of(lanes)
    for c in range(0, D, 4):
        a0, a1, a2, a3 = fill(0., lanes), fill(0., lanes), fill(0., lanes), fill(0., lanes)
        b0, b1, b2, b3 = fill(0., lanes), fill(0., lanes), fill(0., lanes), fill(0., lanes)
        for s in range(keys):
            a, b = load(weights, s * pixels + q, lanes), load(weights, s * pixels + q + n, lanes)
            v = get_whole(addresses, s) + value + c * size
            x = fill(get(v, 0, lanes), lanes)
            a0, b0 = fma(x, a, a0), fma(x, b, b0)
            x = fill(get(v, 1, lanes), lanes)
            a1, b1 = fma(x, a, a1), fma(x, b, b1)
            x = fill(get(v, 2, lanes), lanes)
            a2, b2 = fma(x, a, a2), fma(x, b, b2)
            x = fill(get(v, 3, lanes), lanes)
            a3, b3 = fma(x, a, a3), fma(x, b, b3)
        at = c * pixels + q
        store(results, at, a0)
        store(results, at + n, b0)
        store(results, at + pixels, a1)
        store(results, at + pixels + n, b1)
        store(results, at + 2 * pixels, a2)
        store(results, at + 2 * pixels + n, b2)
        store(results, at + 3 * pixels, a3)
        store(results, at + 3 * pixels + n, b3)


@compiled
def _attend(
        lanes, item, out, qkv, pooled, bias, scale, steps, places, bounded, spare, rows, columns, L, pixels, S, keys, C,
        G):
    """One head of one window."""
    D, size, n = C // G, bytes_of(lanes), width(lanes)
    at, g = item // G, item % G
    window = at % (rows * columns)
    addresses = spare
    hidden = addresses + 8 * keys
    queries = hidden + keys * size
    results = queries + D * pixels * size
    weights = results + D * pixels * size
    sums = weights + keys * pixels * size
    _find_keys(
        lanes, addresses, hidden, qkv, pooled, steps, places, bounded, at - window, window, rows, columns, L, S, keys,
        C)
    zero, factor = first_entry(fill(0., lanes)), get(scale, 0, lanes)
    for q in range(L):
        for c in range(D):
            put(queries, c * pixels + q, factor * get(qkv, (at * L + q) * 3 * C + g * D + c, lanes))
    for q in range(L, pixels):
        for c in range(D):
            put(queries, c * pixels + q, zero)
    for q in range(0, pixels, 2 * n):
        _write_logits(
            lanes, weights, queries, q, addresses, g * D * size, hidden, bias + g * keys * pixels * size, pixels, keys,
            D)
        _exponentials(lanes, weights, sums, q, pixels, keys)
        _exponentials(lanes, weights, sums, q + n, pixels, keys)
        _sum_values(lanes, results, weights, q, addresses, (C + g * D) * size, pixels, keys, D)
    for q in range(L):
        share = first_entry(fill(1. / get(sums, q, lanes), lanes))
        for c in range(D):
            put(out, (at * L + q) * C + g * D + c, share * get(results, c * pixels + q, lanes))


@compiled
def forward(
        vec, lanes, counter, tasks, out, qkv, pooled, bias, scale, steps, places, bounded, spare, room, items, rows,
        columns, L, pixels, S, keys, C, G):
    """All heads of all windows, dealt to tasks with `room` bytes each in `spare`."""
    while True:
        task = claim(counter)
        if task >= tasks:
            return
        for item in range(task * items // tasks, (task + 1) * items // tasks):
            _attend(
                lanes, item, out, qkv, pooled, bias, scale, steps, places, bounded, spare + task * room, rows, columns,
                L, pixels, S, keys, C, G)
