"""The Triton kernel of local logits. `triton.py` launches it; importing this module needs Triton.

A program works on one tile of pixels (see local attention's `triton_kernels.py`) and one head, whose channels it takes
in steps of BC. Queries and keys are read through any strides; biases and logits are contiguous. Per pixel, with s
bytes per number, C channels, G heads and K x K taps, s (2 C + 2 G K) bytes come from DRAM and s G K K go there.

Strides of a tensor `x` over (B, H, W, C) are xb, xh, xw, xc. T is the type of arithmetic.
"""
import triton
import triton.language as tl

from elsa_models.ops.local_attention.triton_kernels import _address, _pixels_of_tile


@triton.jit
def logits_kernel(
        out, query, key, row_bias, column_bias,
        H, W, C, width, TH, TW, tiles_h, tiles_w, heads, steps, rows, dilation,
        qb, qh, qw, qc, kb, kh, kw, kc,
        K: tl.constexpr, KP: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr,
        HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr, MASK: tl.constexpr,
):
    """out = query . key of each tap + row_bias + column_bias, written a row of taps at a time."""
    program = tl.program_id(0)
    head = program % heads
    b, y, x, exists = _pixels_of_tile(program // heads, H, W, TH, TW, tiles_h, tiles_w, BP)
    queries = query + _address(b, y, x, qb, qh, qw)[:, None]
    keys = key + _address(b, y, x, kb, kh, kw)[:, None]
    pixel = ((b * H + y) * W + x) * heads + head
    column = tl.arange(0, KP)[None, :]
    stored = exists[:, None] & (column < K)
    beside = x[:, None] + (column - K // 2) * dilation
    for i in range(rows):
        dy = (i - K // 2) * dilation
        in_rows = exists & (y + dy >= 0) & (y + dy < H)
        logits = tl.zeros((BP, KP), dtype=T)
        for step in range(steps):
            in_head = step * BC + tl.arange(0, BC)
            is_channel = in_head < width
            c = (head * width + in_head).to(tl.int64)[None, :]
            q = tl.load(queries + c * qc, mask=exists[:, None] & is_channel[None, :], other=0.).to(T)
            row = keys + tl.cast(dy, tl.int64) * kh + c * kc
            for j in range(rows):
                dx = (j - K // 2) * dilation
                inside = in_rows & (x + dx >= 0) & (x + dx < W)
                k = tl.load(
                    row + tl.cast(dx, tl.int64) * kw, mask=inside[:, None] & is_channel[None, :], other=0.).to(T)
                logits += tl.where(column == j, tl.sum(q * k, axis=1)[:, None], 0.)
        if HAS_ROW:
            logits += tl.load(row_bias + pixel * K + i, mask=exists, other=0.).to(T)[:, None]
        if HAS_COLUMN:
            logits += tl.load(column_bias + (pixel * K)[:, None] + column, mask=stored, other=0.).to(T)
        if MASK:
            logits = tl.where(in_rows[:, None] & (beside >= 0) & (beside < W), logits, float('-inf'))
        tl.store(out + (pixel * (K * K) + i * K)[:, None] + column, logits, mask=stored)
