"""Loops of the Numba backend (see `numba_cpu.py`), compiled at their first call and kept on disk.

Tensors come as addresses, of contiguous memory unless a stride is given, and None where there is none. `vec` is the
type of vector in which channels are taken, its width a divisor of the channels of a head; `eight` has eight entries
of the same type. Pixels are numbered through the batch.
"""
import logging

import numba

from ._simd import add, exp, fill, fma, get, largest, load, maximum, mul, put, store, sub, total, width

_logger = logging.getLogger(__name__)


def _compiled(function, **options):
    try:
        return numba.njit(nogil=True, error_model='numpy', cache=True, **options)(function)
    except RuntimeError as e:  # no folder to write to
        _logger.info('Compiled kernels are not kept: %s', e)
        return numba.njit(nogil=True, error_model='numpy', **options)(function)


def _parallel(function):
    return _compiled(function, parallel=True)


@_compiled
def _attend(eight, weights, start, logits, at, taps, normalize):
    """Write the softmax of logits[at:at + taps], or a copy of it, to weights[start:]."""
    many = taps - 1  # a multiple of 8, as the taps are an odd square
    last = fill(get(logits, at + many, eight), eight)
    if not normalize:
        for k in range(0, many, 8):
            store(weights, start + k, load(logits, at + k, eight))
        put(weights, start + many, get(logits, at + many, eight))
        return
    top = last
    for k in range(0, many, 8):
        top = maximum(load(logits, at + k, eight), top)
    top = fill(largest(top), eight)
    last = exp(sub(last, top))
    sums = mul(last, fill(0.125, eight))
    for k in range(0, many, 8):
        e = exp(sub(load(logits, at + k, eight), top))
        store(weights, start + k, e)
        sums = add(sums, e)
    scale = fill(1 / total(sums), eight)
    for k in range(0, many, 8):
        store(weights, start + k, mul(load(weights, start + k, eight), scale))
    put(weights, start + many, largest(mul(last, scale)))


@_compiled
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


@_compiled
def _forward_row(
        vec, eight, row, out, value, stride, logits, ghost_mul, ghost_add, weights, H, W, C, G, K, d, normalize):
    """One row of the output; ghost matrices are (K * K, C), `weights` has room for 4 K * K numbers."""
    r, taps = K // 2, K * K
    y, step = row % H, d * stride
    top, bottom = max(0, r - y // d), min(K, r + (H - 1 - y) // d + 1)
    x = 0
    while x < W:
        p = row * W + x
        # four pixels share the loads of the ghost matrices, where all their taps are inside
        together = r * d <= x and x + 4 + r * d <= W
        pixels = 4 if together else 1
        left, right = max(0, r - x // d), min(K, r + (W - 1 - x) // d + 1)
        for g in range(G):
            for q in range(pixels):
                _attend(eight, weights, q * taps, logits, ((p + q) * G + g) * taps, taps, normalize)
            for c in range(g * (C // G), (g + 1) * (C // G), width(vec)):
                if together:
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
                            a1 = fma(w1, load(value, at + stride, vec), a1)
                            a2 = fma(w2, load(value, at + 2 * stride, vec), a2)
                            a3 = fma(w3, load(value, at + 3 * stride, vec), a3)
                            at += step
                    store(out, p * C + c, a0)
                    store(out, (p + 1) * C + c, a1)
                    store(out, (p + 2) * C + c, a2)
                    store(out, (p + 3) * C + c, a3)
                else:
                    a0 = fill(0., vec)
                    for i in range(top, bottom):
                        at = (p + ((i - r) * W + left - r) * d) * stride + c
                        for k in range(i * K + left, i * K + right):
                            w0 = _refine(vec, get(weights, k, vec), ghost_mul, ghost_add, k * C + c)
                            a0 = fma(w0, load(value, at, vec), a0)
                            at += step
                    store(out, p * C + c, a0)
        x += pixels


@_compiled
def _backward_rows(
        vec, eight, rows, task, grad_logits, spread, grad_mul, grad_add, grad, value, stride, logits, ghost_mul,
        weights, dots, H, W, C, G, K, d, normalize):
    """Gradients of the logits and, summed over `rows`, of the ghost matrices; attention for the gradient of `value`.

    Args:
        grad_mul, grad_add: (tasks, K * K, C), to which this task adds its sums.
        spread: (pixels, G, K * K); a weight goes to the pixel that it weighs, as the tap that leads back.
        weights, dots: Room for 4 K * K numbers each.
    """
    r, taps = K // 2, K * K
    step, sums = d * stride, task * taps * C
    for row in range(rows[0], rows[1]):
        y = row % H
        top, bottom = max(0, r - y // d), min(K, r + (H - 1 - y) // d + 1)
        x = 0
        while x < W:
            p = row * W + x
            together = r * d <= x and x + 4 + r * d <= W
            pixels = 4 if together else 1
            left, right = max(0, r - x // d), min(K, r + (W - 1 - x) // d + 1)
            for g in range(G):
                for q in range(pixels):
                    _attend(eight, weights, q * taps, logits, ((p + q) * G + g) * taps, taps, normalize)
                for k in range(pixels * taps):
                    put(dots, k, total(fill(0., eight)))
                for c in range(g * (C // G), (g + 1) * (C // G), width(vec)):
                    if together:
                        u0, u1 = load(grad, p * C + c, vec), load(grad, (p + 1) * C + c, vec)
                        u2, u3 = load(grad, (p + 2) * C + c, vec), load(grad, (p + 3) * C + c, vec)
                        for i in range(top, bottom):
                            at = (p + ((i - r) * W - r) * d) * stride + c
                            for k in range(i * K, (i + 1) * K):
                                m = k * C + c
                                v0, v1 = mul(u0, load(value, at, vec)), mul(u1, load(value, at + stride, vec))
                                v2 = mul(u2, load(value, at + 2 * stride, vec))
                                v3 = mul(u3, load(value, at + 3 * stride, vec))
                                if grad_add is not None:
                                    e = add(add(v0, v1), add(v2, v3))
                                    store(grad_add, sums + m, add(load(grad_add, sums + m, vec), e))
                                if ghost_mul is not None:
                                    e = fma(fill(get(weights, taps + k, vec), vec), v1,
                                            mul(fill(get(weights, k, vec), vec), v0))
                                    f = fma(fill(get(weights, 3 * taps + k, vec), vec), v3,
                                            mul(fill(get(weights, 2 * taps + k, vec), vec), v2))
                                    store(grad_mul, sums + m, add(load(grad_mul, sums + m, vec), add(e, f)))
                                    factor = load(ghost_mul, m, vec)
                                    v0, v1, v2, v3 = mul(v0, factor), mul(v1, factor), mul(v2, factor), mul(v3, factor)
                                put(dots, k, get(dots, k, vec) + total(v0))
                                put(dots, taps + k, get(dots, taps + k, vec) + total(v1))
                                put(dots, 2 * taps + k, get(dots, 2 * taps + k, vec) + total(v2))
                                put(dots, 3 * taps + k, get(dots, 3 * taps + k, vec) + total(v3))
                                at += step
                    else:
                        u0 = load(grad, p * C + c, vec)
                        for i in range(top, bottom):
                            at = (p + ((i - r) * W + left - r) * d) * stride + c
                            for k in range(i * K + left, i * K + right):
                                m = k * C + c
                                v0 = mul(u0, load(value, at, vec))
                                if grad_add is not None:
                                    store(grad_add, sums + m, add(load(grad_add, sums + m, vec), v0))
                                if ghost_mul is not None:
                                    e = fma(fill(get(weights, k, vec), vec), v0, load(grad_mul, sums + m, vec))
                                    store(grad_mul, sums + m, e)
                                    v0 = mul(v0, load(ghost_mul, m, vec))
                                put(dots, k, get(dots, k, vec) + total(v0))
                                at += step
                for q in range(pixels):
                    own, map_at = q * taps, ((p + q) * G + g) * taps
                    for i in range(top, bottom):
                        for j in range(left, right):
                            k = i * K + j
                            seen = p + q + ((i - r) * W + j - r) * d
                            put(spread, (seen * G + g) * taps + taps - 1 - k, get(weights, own + k, vec))
                    _attend_backward(eight, grad_logits, map_at, weights, dots, own, taps, normalize)
            x += pixels


@_compiled
def _attend_backward(eight, grad_logits, at, weights, dots, start, taps, normalize):
    """Gradient of the softmax `weights` for their gradient `dots`; or a copy of that."""
    many = taps - 1
    if not normalize:
        for k in range(taps):
            put(grad_logits, at + k, get(dots, start + k, eight))
        return
    last = get(weights, start + many, eight)
    sums = fill(0., eight)
    for k in range(0, many, 8):
        sums = fma(load(weights, start + k, eight), load(dots, start + k, eight), sums)
    mean = total(sums) + last * get(dots, start + many, eight)
    for k in range(0, many, 8):
        e = sub(load(dots, start + k, eight), fill(mean, eight))
        store(grad_logits, at + k, mul(load(weights, start + k, eight), e))
    put(grad_logits, at + many, last * (get(dots, start + many, eight) - mean))


@_compiled
def forward(
        vec, eight, tasks, block, rows, out, value, stride, logits, ghost_mul, ghost_add, scratch, room,
        H, W, C, G, K, d, normalize):
    """All rows of the output, `block` rows to a task, for the tasks of the range `tasks`."""
    for task in range(tasks[0], tasks[1]):
        for row in range(task * block, min(rows, (task + 1) * block)):
            _forward_row(
                vec, eight, row, out, value, stride, logits, ghost_mul, ghost_add, scratch + task * room,
                H, W, C, G, K, d, normalize)


@_compiled
def backward(
        vec, eight, tasks, block, rows, grad_logits, spread, grad_mul, grad_add, grad, value, stride, logits, ghost_mul,
        scratch, room, H, W, C, G, K, d, normalize):
    """All gradients that `_backward_rows` makes, `block` rows to a task, for the tasks of the range `tasks`."""
    for task in range(tasks[0], tasks[1]):
        weights = scratch + task * room
        _backward_rows(
            vec, eight, (task * block, min(rows, (task + 1) * block)), task, grad_logits, spread, grad_mul, grad_add,
            grad, value, stride, logits, ghost_mul, weights, weights + room // 2, H, W, C, G, K, d, normalize)


# the compiled code is kept by name: a function that differs in options alone would be taken for the other


@_parallel
def forward_parallel(
        vec, eight, tasks, block, rows, out, value, stride, logits, ghost_mul, ghost_add, scratch, room,
        H, W, C, G, K, d, normalize):
    for task in numba.prange(tasks[0], tasks[1]):
        forward(
            vec, eight, (task, task + 1), block, rows, out, value, stride, logits, ghost_mul, ghost_add, scratch, room,
            H, W, C, G, K, d, normalize)


@_parallel
def backward_parallel(
        vec, eight, tasks, block, rows, grad_logits, spread, grad_mul, grad_add, grad, value, stride, logits, ghost_mul,
        scratch, room, H, W, C, G, K, d, normalize):
    for task in numba.prange(tasks[0], tasks[1]):
        backward(
            vec, eight, (task, task + 1), block, rows, grad_logits, spread, grad_mul, grad_add, grad, value, stride,
            logits, ghost_mul, scratch, room, H, W, C, G, K, d, normalize)
