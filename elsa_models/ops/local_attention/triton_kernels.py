"""The Triton kernels of local attention. `triton.py` launches them; importing this module needs Triton.

A program works on one tile of pixels, at most BP of them in a rectangle of TH x TW, and on one block of BC channels
within one head. Logits, values and gradients are read through any strides; outputs are contiguous.

What reaches DRAM, per pixel, with s bytes per number, C channels, G heads and T = K * K taps:

| kernel | reads | writes |
|---|---|---|
| forward_kernel | s (C + G T) | s C |
| backward_logits_kernel | s (2 C + G T) | s G T + 8 G; partial sums of the ghost matrices: 4 C T per program |
| backward_value_kernel | s (C + G T) + 8 G | s C |

Neighbours are loaded tap by tap. Tiles are rectangles because the halo of a tile comes from L2 once and then from L1:
8 x 8 pixels read 3.1 times their values at K = 7, a row of 64 reads 7.7 times as much. Heads vary fastest over the
grid, so that the programs which share a sector of logits run side by side. The normalised map never reaches memory:
a pixel keeps the maximum and the sum of its softmax, and a tap's weight is recomputed where it is used. The gradient
of a value is gathered from the pixels that saw it; the gradients of the ghost matrices are summed in registers by each
program over the tiles that it is given, and by one reduction over the programs. There are no atomics.

Names of arguments: the strides of a tensor `x` over (B, H, W, C) are xb, xh, xw, xc; those of logits over
(B, H, W, G, T) are lb, lh, lw, lg, lt. T is the type of arithmetic: float64 for float64, else float32.
"""
import triton
import triton.language as tl


@triton.jit
def _pixels_of_tile(tile, H, W, TH, TW, tiles_h, tiles_w, BP: tl.constexpr):
    """Sample, rows and columns of a tile's pixels, and which of them exist."""
    p = tl.arange(0, BP)
    in_sample = tile % (tiles_h * tiles_w)
    y = in_sample // tiles_w * TH + p // TW
    x = in_sample % tiles_w * TW + p % TW
    exists = (p < TH * TW) & (y < H) & (x < W)
    return tl.cast(tile // (tiles_h * tiles_w), tl.int64), y, x, exists


@triton.jit
def _address(b, y, x, sb, sh, sw):
    """Offset of each pixel, in 64 bits."""
    return b * sb + y.to(tl.int64) * sh + x.to(tl.int64) * sw


@triton.jit
def _softmax_stats(
        logits, exists, lt, rows, K: tl.constexpr, KP: tl.constexpr, BP: tl.constexpr, T: tl.constexpr):
    """Maximum and 1 / sum of the softmax of each pixel (BP), row by row of taps: a whole tile of taps would spill."""
    column = tl.arange(0, KP)[None, :]
    m = tl.full((BP,), -3e38, dtype=T)  # below all float32; no infinity, whose difference to itself is no number
    total = tl.zeros((BP,), dtype=T)
    for i in range(rows):
        a = tl.load(
            logits[:, None] + (i * K + column) * lt, mask=exists[:, None] & (column < K), other=0.).to(T)
        a = tl.where(column < K, a, float('-inf'))
        before = m
        m = tl.maximum(m, tl.max(a, axis=1))
        total = total * tl.exp(before - m) + tl.sum(tl.exp(a - m[:, None]), axis=1)
    return m, 1. / total


@triton.jit
def forward_kernel(
        out, value, logits, mul, add,
        H, W, C, width, TH, TW, tiles_h, tiles_w, heads, splits, rows, dilation,
        vb, vh, vw, vc, lb, lh, lw, lg, lt,
        K: tl.constexpr, KP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr,
        NORMALIZE: tl.constexpr, HAS_MUL: tl.constexpr, HAS_ADD: tl.constexpr,
):
    """out = sum over taps of (mul * softmax(logits) + add) * value; a program per tile, head and block of channels."""
    program = tl.program_id(0)
    block = program % (heads * splits)
    head = block // splits
    b, y, x, exists = _pixels_of_tile(program // (heads * splits), H, W, TH, TW, tiles_h, tiles_w, BP)
    in_head = block % splits * BC + tl.arange(0, BC)
    is_channel = in_head < width
    c = head * width + in_head
    values = value + _address(b, y, x, vb, vh, vw)[:, None] + (c.to(tl.int64) * vc)[None, :]
    logits += _address(b, y, x, lb, lh, lw) + tl.cast(head, tl.int64) * lg
    if NORMALIZE:
        m, inverse = _softmax_stats(logits, exists, lt, rows, K, KP, BP, T)

    acc = tl.zeros((BP, BC), dtype=T)
    for i in range(rows):
        dy = (i - K // 2) * dilation
        in_rows = exists & (y + dy >= 0) & (y + dy < H)
        row = values + tl.cast(dy, tl.int64) * vh
        for j in tl.static_range(K):
            dx = (j - K // 2) * dilation
            inside = in_rows & (x + dx >= 0) & (x + dx < W)
            v = tl.load(
                row + tl.cast(dx, tl.int64) * vw, mask=inside[:, None] & is_channel[None, :], other=0.).to(T)
            weight = tl.load(logits + (i * K + j) * lt, mask=exists, other=0.).to(T)
            if NORMALIZE:
                weight = tl.exp(weight - m) * inverse
            weight = weight[:, None]
            if HAS_MUL:
                weight = weight * tl.load(mul + (i * K + j) * C + c, mask=is_channel, other=0.).to(T)[None, :]
            if HAS_ADD:
                weight = weight + tl.load(add + (i * K + j) * C + c, mask=is_channel, other=0.).to(T)[None, :]
            acc += weight * v
    outs = out + (((b * H + y) * W + x) * C)[:, None] + c[None, :]
    tl.store(outs, acc, mask=exists[:, None] & is_channel[None, :])


@triton.jit
def backward_logits_kernel(
        grad_logits, stats, partial_mul, partial_add, grad, value, logits, mul,
        H, W, C, width, TH, TW, tiles_h, tiles_w, tiles, programs, heads, splits, steps, rows, dilation,
        gb, gh, gw, gc, vb, vh, vw, vc, lb, lh, lw, lg, lt,
        K: tl.constexpr, KP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr,
        NORMALIZE: tl.constexpr, HAS_MUL: tl.constexpr,
        LOGITS: tl.constexpr, GRAD_MUL: tl.constexpr, GRAD_ADD: tl.constexpr,
):
    """Gradient of the logits with the statistics of their softmax, and partial gradients of the ghost matrices.

    Everything here is a sum of grad[p, c] * value[p + tap, c]: over channels for the logits, over pixels for the ghost
    matrices. Program n of a head and block takes tiles n, n + programs, ... Where a head has more channels than a
    block, the logits take them in `steps` and the ghost matrices in `splits`, in a launch each.
    """
    program = tl.program_id(0)
    block = program % (heads * splits)
    first = program // (heads * splits)
    head = block // splits
    row_index, column_index = tl.arange(0, KP)[None, :, None], tl.arange(0, KP)[None, :]
    is_tap = (row_index < K) & (column_index[None, :, :] < K)
    if GRAD_MUL:
        sum_mul = tl.zeros((BC, KP, KP), dtype=T)
    if GRAD_ADD:
        sum_add = tl.zeros((BC, KP, KP), dtype=T)

    for tile in range(first, tiles, programs):
        b, y, x, exists = _pixels_of_tile(tile, H, W, TH, TW, tiles_h, tiles_w, BP)
        tile_logits = logits + _address(b, y, x, lb, lh, lw) + tl.cast(head, tl.int64) * lg
        if NORMALIZE and (LOGITS or GRAD_MUL):
            m, inverse = _softmax_stats(tile_logits, exists, lt, rows, K, KP, BP, T)
        grad_a = tl.zeros((BP, KP, KP), dtype=T)
        for step in range(steps):
            in_head = (block % splits + step) * BC + tl.arange(0, BC)
            is_channel = in_head < width
            c = head * width + in_head
            g = tl.load(
                grad + _address(b, y, x, gb, gh, gw)[:, None] + (c.to(tl.int64) * gc)[None, :],
                mask=exists[:, None] & is_channel[None, :], other=0.).to(T)
            values = value + _address(b, y, x, vb, vh, vw)[:, None] + (c.to(tl.int64) * vc)[None, :]
            for i in range(rows):
                dy = (i - K // 2) * dilation
                in_rows = exists & (y + dy >= 0) & (y + dy < H)
                row = values + tl.cast(dy, tl.int64) * vh
                row_a = tl.zeros((BP, KP), dtype=T)
                row_mul = tl.zeros((BC, KP), dtype=T)
                row_add = tl.zeros((BC, KP), dtype=T)
                for j in range(rows):
                    dx = (j - K // 2) * dilation
                    inside = in_rows & (x + dx >= 0) & (x + dx < W)
                    v = tl.load(
                        row + tl.cast(dx, tl.int64) * vw, mask=inside[:, None] & is_channel[None, :], other=0.).to(T)
                    product = g * v
                    if GRAD_ADD:
                        row_add = tl.where(column_index == j, tl.sum(product, axis=0)[:, None], row_add)
                    if GRAD_MUL:
                        a = tl.load(tile_logits + (i * K + j) * lt, mask=exists, other=0.).to(T)
                        if NORMALIZE:
                            a = tl.exp(a - m) * inverse
                        row_mul = tl.where(
                            column_index == j, tl.sum(product * a[:, None], axis=0)[:, None], row_mul)
                    if LOGITS:
                        if HAS_MUL:
                            product *= tl.load(
                                mul + (i * K + j) * C + c, mask=is_channel, other=0.).to(T)[None, :]
                        row_a = tl.where(column_index == j, tl.sum(product, axis=1)[:, None], row_a)
                if LOGITS:
                    grad_a += tl.where(row_index == i, row_a[:, None, :], 0.)
                if GRAD_MUL:
                    sum_mul += tl.where(row_index == i, row_mul[:, None, :], 0.)
                if GRAD_ADD:
                    sum_add += tl.where(row_index == i, row_add[:, None, :], 0.)

        if LOGITS:
            pixel = ((b * H + y) * W + x) * heads + head
            tap = row_index * K + column_index[None, :, :]
            stored = exists[:, None, None] & is_tap
            if NORMALIZE:
                a = tl.load(tile_logits[:, None, None] + tap * lt, mask=stored, other=0.).to(T)
                a = tl.where(stored, tl.exp(a - m[:, None, None]) * inverse[:, None, None], 0.)
                mean = tl.sum(tl.sum(a * grad_a, axis=2), axis=1)
                grad_a = a * (grad_a - mean[:, None, None])
                tl.store(stats + 2 * pixel, m, mask=exists)
                tl.store(stats + 2 * pixel + 1, inverse, mask=exists)
            tl.store(grad_logits + (pixel * (K * K))[:, None, None] + tap, grad_a, mask=stored)

    if GRAD_MUL or GRAD_ADD:
        in_head = block % splits * BC + tl.arange(0, BC)
        c = tl.cast(first, tl.int64) * C + head * width + in_head
        taps = (c * (K * K))[:, None, None] + row_index * K + column_index[None, :, :]
        stored = (in_head < width)[:, None, None] & is_tap
        if GRAD_MUL:
            tl.store(partial_mul + taps, sum_mul, mask=stored)
        if GRAD_ADD:
            tl.store(partial_add + taps, sum_add, mask=stored)


@triton.jit
def backward_value_kernel(
        grad_value, grad, logits, stats, mul, add,
        H, W, C, width, TH, TW, tiles_h, tiles_w, heads, splits, rows, dilation,
        gb, gh, gw, gc, lb, lh, lw, lg, lt,
        K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr,
        NORMALIZE: tl.constexpr, HAS_MUL: tl.constexpr, HAS_ADD: tl.constexpr,
):
    """Gradient of the values: pixel q gathers, over the taps, from the pixel q - tap whose tap it was."""
    program = tl.program_id(0)
    block = program % (heads * splits)
    head = block // splits
    b, y, x, exists = _pixels_of_tile(program // (heads * splits), H, W, TH, TW, tiles_h, tiles_w, BP)
    in_head = block % splits * BC + tl.arange(0, BC)
    is_channel = in_head < width
    c = head * width + in_head
    grads = grad + _address(b, y, x, gb, gh, gw)[:, None] + (c.to(tl.int64) * gc)[None, :]
    logits += _address(b, y, x, lb, lh, lw) + tl.cast(head, tl.int64) * lg
    if NORMALIZE:
        stats += 2 * (((b * H + y) * W + x) * heads + head)

    acc = tl.zeros((BP, BC), dtype=T)
    for i in range(rows):
        dy = (i - K // 2) * dilation
        in_rows = exists & (y - dy >= 0) & (y - dy < H)
        for j in range(rows):
            dx = (j - K // 2) * dilation
            inside = in_rows & (x - dx >= 0) & (x - dx < W)
            back_y, back_x = tl.cast(dy, tl.int64), tl.cast(dx, tl.int64)
            g = tl.load(
                grads - (back_y * gh + back_x * gw), mask=inside[:, None] & is_channel[None, :], other=0.).to(T)
            weight = tl.load(
                logits - (back_y * lh + back_x * lw) + (i * K + j) * lt, mask=inside, other=0.).to(T)
            if NORMALIZE:
                seer = stats - 2 * (back_y * W + back_x) * heads
                m = tl.load(seer, mask=inside, other=0.)
                weight = tl.exp(weight - m) * tl.load(seer + 1, mask=inside, other=0.)
            weight = weight[:, None]
            if HAS_MUL:
                weight = weight * tl.load(mul + (i * K + j) * C + c, mask=is_channel, other=0.).to(T)[None, :]
            if HAS_ADD:
                weight = weight + tl.load(add + (i * K + j) * C + c, mask=is_channel, other=0.).to(T)[None, :]
            acc += weight * g
    outs = grad_value + (((b * H + y) * W + x) * C)[:, None] + c[None, :]
    tl.store(outs, acc, mask=exists[:, None] & is_channel[None, :])
