"""Attention along lines on a CPU, compiled by Numba, see `numba_kernels.py`."""
import torch

from .. import _numba

_KERNELS = f'{__package__}.numba_kernels'


def takes(*tensors: torch.Tensor) -> bool:
    """Whether `attend_lines` serves these tensors here and now."""
    return _numba.serves_inference(*tensors)


def attend_lines(
        qkv: torch.Tensor,
        num_heads: int,
        qk_scale: torch.Tensor,
        rel_query: torch.Tensor,
        rel_key: torch.Tensor,
        rel_value: torch.Tensor,
) -> torch.Tensor:
    """`layers.mixers.axial.attend_axis` of tables (num_heads, channels, 2 * L - 1) that are made for lines of L pixels.

    Args:
        qkv: Queries, keys and values (S, L, 2 * C), float32 or float64 as all others.
        num_heads: Heads.
        qk_scale: (num_heads).
        rel_query: (num_heads, C / num_heads / 2, 2 * L - 1), which queries meet.
        rel_key: Of the same shape, which keys meet.
        rel_value: (num_heads, C / num_heads, 2 * L - 1), added to the values.

    Returns:
        (S, L, C).
    """
    S, L, C = qkv.shape
    C //= 2
    channels = C // num_heads
    vec, lanes = _numba.vectors(qkv.dtype, channels, 1)
    taps = -(-L // lanes.width) * lanes.width  # keys with what fills the last vector
    qkv = qkv.contiguous()
    fill = (0, taps - L)
    rel_query, rel_key = (torch.nn.functional.pad(x, fill).contiguous() for x in (rel_query, rel_key))
    rel_value = rel_value.transpose(1, 2).contiguous()  # num_heads, distances, channels
    out = qkv.new_empty(S, L, C)
    spare = qkv.new_empty(S, (channels // 2 + 2) * taps)  # keys by channel, weights of two queries
    _numba.run(
        _KERNELS, 'forward', S * L * L * C * 7 // 2, vec, lanes, S, out, qkv, qk_scale.contiguous(), rel_query, rel_key,
        rel_value, spare, spare.stride(0) * spare.element_size(), L, taps, C, num_heads)
    return out
