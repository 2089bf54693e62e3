"""Loops of the Numba backend (see `numba.py`), compiled at their first call and kept on disk.

Tensors come as addresses, of contiguous memory unless a stride is given, and None where there is none. `vec` is the
type of vector in which channels are taken, its width a divisor of the channels of a head; `lanes` that in which taps
are taken, its width a divisor of all taps but the last. Pixels are numbered through the batch. Taps in rows beside the
map are passed over; those in columns beside it meet a zero, and what is no number may show there.
"""
from .._njit import compiled, inlined
from .._simd import (
    add,
    bytes_of,
    claim,
    exp,
    fetch,
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
    totals,
    width,
)


@compiled
def _attend(lanes, weights, start, logits, at, taps, normalize):
    """Write the softmax of logits[at:at + taps], or a copy of it, to weights[start:]."""
    many = taps - 1
    last = fill(get(logits, at + many, lanes), lanes)
    if not normalize:
        for k in range(0, many, width(lanes)):
            store(weights, start + k, load(logits, at + k, lanes))
        put(weights, start + many, get(logits, at + many, lanes))
        return
    top = last
    for k in range(0, many, width(lanes)):
        top = maximum(load(logits, at + k, lanes), top)
    top = largest(top)
    last = exp(sub(last, top))
    sums = mul(last, fill(1. / width(lanes), lanes))
    for k in range(0, many, width(lanes)):
        e = exp(sub(load(logits, at + k, lanes), top))
        store(weights, start + k, e)
        sums = add(sums, e)
    scale = fill(1 / total(sums), lanes)
    for k in range(0, many, width(lanes)):
        store(weights, start + k, mul(load(weights, start + k, lanes), scale))
    put(weights, start + many, first_entry(mul(last, scale)))


@compiled
def _refine(vec, weight, ghost_mul, ghost_add, at):
    """Weights of the channels for one tap: the attention's, refined by the ghost head."""
    weight = fill(weight, vec)
    if ghost_mul is not None and ghost_add is not None:
        return fma(weight, load(ghost_mul, at, vec), load(ghost_add, at, vec))
    if ghost_mul is not None:
        return mul(weight, load(ghost_mul, at, vec))
    if ghost_add is not None:
        return add(weight, load(ghost_add, at, vec))
    return weight


@compiled
def channels_at(vec, line, x, W, stride):
    """Channels at column x of a row of the map that begins at address `line`; zeros beside the map."""
    if 0 <= x < W:
        return load(line, x * stride, vec)
    return fill(0., vec)


@inlined
def _sum_inside(vec, p, c, top, bottom, value, stride, weights, ghost_mul, ghost_add, W, C, K, d):
    """The output of four pixels from p on, d apart, that have no taps beside the map, for the channels from c on.

    `_sum_anywhere` would do, in 1.2 times the time where registers are the 16 of AVX2.
    """
    r, taps, step = K // 2, K * K, d * stride
    a0, a1, a2, a3 = fill(0., vec), fill(0., vec), fill(0., vec), fill(0., vec)
    for i in range(top, bottom):
        at = (p + ((i - r) * W - r) * d) * stride + c
        for k in range(i * K, (i + 1) * K):
            m = k * C + c
            w0 = _refine(vec, get(weights, k, vec), ghost_mul, ghost_add, m)
            w1 = _refine(vec, get(weights, taps + k, vec), ghost_mul, ghost_add, m)
            w2 = _refine(vec, get(weights, 2 * taps + k, vec), ghost_mul, ghost_add, m)
            w3 = _refine(vec, get(weights, 3 * taps + k, vec), ghost_mul, ghost_add, m)
            a0 = fma(w0, load(value, at, vec), a0)
            a1 = fma(w1, load(value, at + step, vec), a1)
            a2 = fma(w2, load(value, at + 2 * step, vec), a2)
            a3 = fma(w3, load(value, at + 3 * step, vec), a3)
            at += step
    return a0, a1, a2, a3


@inlined
def _sum_anywhere(
        vec, row, x, c, top, bottom, value, stride, weights, turned, ghost_mul, ghost_add, W, C, K, d):
    """The output of four pixels from column x on, d apart, for the channels from c on.

    Values move on from one pixel to the next, tap by tap. With `turned`, the (first, last, hop) of `_forward_row`,
    `weights` are those of all pixels and move on likewise.
    """
    r, taps, size = K // 2, K * K, bytes_of(vec)
    b0, b1, b2, b3 = weights, weights + taps * size, weights + 2 * taps * size, weights + 3 * taps * size
    a0, a1, a2, a3 = fill(0., vec), fill(0., vec), fill(0., vec), fill(0., vec)
    for i in range(top, bottom):
        start = (row + (i - r) * d) * W
        line = value + (start * stride + c) * size
        u = x - r * d
        v0 = channels_at(vec, line, u, W, stride)
        v1 = channels_at(vec, line, u + d, W, stride)
        v2 = channels_at(vec, line, u + 2 * d, W, stride)
        if turned is not None:
            b0 = _seen(weights, start, u, turned, size)
            b1 = _seen(weights, start, u + d, turned, size)
            b2 = _seen(weights, start, u + 2 * d, turned, size)
        for k in range(i * K, (i + 1) * K):
            v3 = channels_at(vec, line, u + 3 * d, W, stride)
            at = k
            if turned is not None:
                b3 = _seen(weights, start, u + 3 * d, turned, size)
                at = taps - 1 - k
            m = k * C + c
            a0 = fma(_refine(vec, get(b0, at, vec), ghost_mul, ghost_add, m), v0, a0)
            a1 = fma(_refine(vec, get(b1, at, vec), ghost_mul, ghost_add, m), v1, a1)
            a2 = fma(_refine(vec, get(b2, at, vec), ghost_mul, ghost_add, m), v2, a2)
            a3 = fma(_refine(vec, get(b3, at, vec), ghost_mul, ghost_add, m), v3, a3)
            v0, v1, v2 = v1, v2, v3
            if turned is not None:
                b0, b1, b2 = b1, b2, b3
            u += d
    return a0, a1, a2, a3


@compiled
def _seen(weights, start, x, turned, size):
    """Address of the weights of the pixel in column x, or in the nearest of those that see one another."""
    # beside the map any weight serves, for it meets a value of zero; but none of a pixel that the other does not see
    first, last, hop = turned
    return weights + (start + min(max(x, first), last)) * hop * size


@compiled
def _fetch_logits(logits, p, size):
    """Send for those of four pixels from p on, `size` bytes each: 0.7 to 0.9 of the time where maps exceed caches."""
    for n in range(0, 4 * size, 64):
        fetch(logits + p * size + n)


@compiled
def _forward_row(
        vec, lanes, row, out, value, stride, logits, turned, ghost_mul, ghost_add, weights,
        H, W, C, G, K, d, normalize):
    """One row of the output; ghost matrices are (K * K, C), `weights` has room for 4 K * K numbers.

    Four pixels, d apart, share the loads of the ghost matrices. Logits may be attention to be `turned` (True or None):
    a pixel takes for tap k the weight that the pixel there has for tap K * K - 1 - k, which leads back.
    """
    r, taps, D, size = K // 2, K * K, C // G, bytes_of(vec)
    y, hop = row % H, G * taps
    top, bottom = max(0, r - y // d), min(K, r + (H - 1 - y) // d + 1)
    for first in range(min(d, W)):
        last = first + (W - 1 - first) // d * d
        for x in range(first, W, 4 * d):
            p = row * W + x
            pixels = min(4, (last - x) // d + 1)
            if turned is None:
                _fetch_logits(logits, p + 4, hop * size)
            for g in range(G):
                if turned is None:
                    for q in range(4):
                        own = p + min(q, pixels - 1) * d
                        _attend(lanes, weights, q * taps, logits, own * hop + g * taps, taps, normalize)
                for c in range(g * D, (g + 1) * D, width(vec)):
                    if turned is not None:
                        a0, a1, a2, a3 = _sum_anywhere(
                            vec, row, x, c, top, bottom, value, stride, logits + g * taps * size, (first, last, hop),
                            ghost_mul, ghost_add, W, C, K, d)
                    elif r * d <= x and x + (3 + r) * d < W:
                        a0, a1, a2, a3 = _sum_inside(
                            vec, p, c, top, bottom, value, stride, weights, ghost_mul, ghost_add, W, C, K, d)
                    else:
                        a0, a1, a2, a3 = _sum_anywhere(
                            vec, row, x, c, top, bottom, value, stride, weights, None, ghost_mul, ghost_add, W, C, K, d)
                    _store_some(out, p * C + c, d * C, pixels, a0, a1, a2, a3)


@inlined
def _store_some(out, at, step, count, a0, a1, a2, a3):
    """Write the first `count` of four vectors, `step` apart."""
    store(out, at, a0)
    if count > 1:
        store(out, at + step, a1)
    if count > 2:
        store(out, at + 2 * step, a2)
    if count > 3:
        store(out, at + 3 * step, a3)


@compiled
def _backward_rows(
        vec, lanes, rows, task, grad_logits, attention, grad_mul, grad_add, grad, value, stride, logits, ghost_mul,
        weights, dots, H, W, C, G, K, d, normalize):
    """Gradients of the logits and, summed over `rows`, of the ghost matrices.

    Args:
        grad_mul, grad_add: (tasks, K * K, C), to which this task adds its sums.
        attention: (pixels, G, K * K), written for the gradient of `value`.
        weights, dots: Room for 4 K * K numbers each.
    """
    r, taps, D, size = K // 2, K * K, C // G, bytes_of(vec)
    hop, sums = G * taps, task * taps * C
    for row in range(rows[0], rows[1]):
        y = row % H
        top, bottom = max(0, r - y // d), min(K, r + (H - 1 - y) // d + 1)
        for first in range(min(d, W)):
            for x in range(first, W, 4 * d):
                p = row * W + x
                pixels = min(4, (W - 1 - x) // d + 1)
                _fetch_logits(logits, p + 4, hop * size)
                for g in range(G):
                    for q in range(4):
                        own = p + min(q, pixels - 1) * d
                        _attend(lanes, weights, q * taps, logits, own * hop + g * taps, taps, normalize)
                    for k in range(4 * taps):
                        put(dots, k, total(fill(0., lanes)))
                    for c in range(g * D, (g + 1) * D, width(vec)):
                        at = p * C + c
                        u0, u1, u2, u3 = load(grad, at, vec), fill(0., vec), fill(0., vec), fill(0., vec)
                        if pixels > 1:
                            u1 = load(grad, at + d * C, vec)
                        if pixels > 2:
                            u2 = load(grad, at + 2 * d * C, vec)
                        if pixels > 3:
                            u3 = load(grad, at + 3 * d * C, vec)
                        for i in range(top, bottom):
                            line = value + ((row + (i - r) * d) * W * stride + c) * size
                            u = x - r * d
                            v0 = channels_at(vec, line, u, W, stride)
                            v1 = channels_at(vec, line, u + d, W, stride)
                            v2 = channels_at(vec, line, u + 2 * d, W, stride)
                            for k in range(i * K, (i + 1) * K):
                                v3 = channels_at(vec, line, u + 3 * d, W, stride)
                                m = k * C + c
                                e0, e1, e2, e3 = mul(u0, v0), mul(u1, v1), mul(u2, v2), mul(u3, v3)
                                if grad_add is not None:
                                    e = add(add(e0, e1), add(e2, e3))
                                    store(grad_add, sums + m, add(load(grad_add, sums + m, vec), e))
                                if ghost_mul is not None:
                                    e = fma(fill(get(weights, taps + k, vec), vec), e1,
                                            mul(fill(get(weights, k, vec), vec), e0))
                                    f = fma(fill(get(weights, 3 * taps + k, vec), vec), e3,
                                            mul(fill(get(weights, 2 * taps + k, vec), vec), e2))
                                    store(grad_mul, sums + m, add(load(grad_mul, sums + m, vec), add(e, f)))
                                    factor = load(ghost_mul, m, vec)
                                    e0, e1, e2, e3 = mul(e0, factor), mul(e1, factor), mul(e2, factor), mul(e3, factor)
                                t0, t1, t2, t3 = totals(e0, e1, e2, e3)
                                put(dots, k, get(dots, k, vec) + t0)
                                put(dots, taps + k, get(dots, taps + k, vec) + t1)
                                put(dots, 2 * taps + k, get(dots, 2 * taps + k, vec) + t2)
                                put(dots, 3 * taps + k, get(dots, 3 * taps + k, vec) + t3)
                                v0, v1, v2 = v1, v2, v3
                                u += d
                    for q in range(pixels):
                        own = p + q * d
                        _attend(lanes, attention, own * hop + g * taps, weights, q * taps, taps, False)
                        _attend_backward(
                            lanes, grad_logits, own * hop + g * taps, weights, dots, q * taps, taps, normalize)


@compiled
def _attend_backward(lanes, grad_logits, at, weights, dots, start, taps, normalize):
    """Gradient of the softmax `weights` for their gradient `dots`; or a copy of that."""
    many = taps - 1
    if not normalize:
        for k in range(taps):
            put(grad_logits, at + k, get(dots, start + k, lanes))
        return
    last = get(weights, start + many, lanes)
    sums = fill(0., lanes)
    for k in range(0, many, width(lanes)):
        sums = fma(load(weights, start + k, lanes), load(dots, start + k, lanes), sums)
    mean = total(sums) + last * get(dots, start + many, lanes)
    for k in range(0, many, width(lanes)):
        e = sub(load(dots, start + k, lanes), fill(mean, lanes))
        store(grad_logits, at + k, mul(load(weights, start + k, lanes), e))
    put(grad_logits, at + many, last * (get(dots, start + many, lanes) - mean))


@compiled
def forward(
        vec, lanes, counter, tasks, out, value, stride, logits, turned, ghost_mul, ghost_add, scratch, room,
        H, W, C, G, K, d, normalize):
    """All rows of the output; a task is a row."""
    while True:
        row = claim(counter)
        if row >= tasks:
            return
        _forward_row(
            vec, lanes, row, out, value, stride, logits, turned, ghost_mul, ghost_add, scratch + row * room,
            H, W, C, G, K, d, normalize)


@compiled
def backward(
        vec, lanes, counter, tasks, block, rows, grad_logits, attention, grad_mul, grad_add, grad, value, stride,
        logits, ghost_mul, scratch, room, H, W, C, G, K, d, normalize):
    """All gradients that `_backward_rows` makes, `block` rows to a task."""
    while True:
        task = claim(counter)
        if task >= tasks:
            return
        weights = scratch + task * room
        _backward_rows(
            vec, lanes, (task * block, min(rows, (task + 1) * block)), task, grad_logits, attention, grad_mul, grad_add,
            grad, value, stride, logits, ghost_mul, weights, weights + room // 2, H, W, C, G, K, d, normalize)
