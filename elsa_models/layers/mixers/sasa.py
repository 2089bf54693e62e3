"""Stand-alone self-attention: queries against the keys of K x K neighbours and their relative positions.

Paper: `Stand-Alone Self-Attention in Vision Models` - https://arxiv.org/abs/1906.05909
"""
from typing import Tuple

import torch
import torch.nn as nn
from timm.layers import trunc_normal_

from ...ops import local_attention, local_logits
from ..arguments import check_map, whole_number
from .mixer import Mixer

_BORDERS = ('zero', 'mask')

# leaves of symbolic traces
torch.fx.wrap('local_attention')
torch.fx.wrap('local_logits')
torch.fx.wrap('check_map')


class StandAloneSelfAttention(Mixer):
    """Local self-attention with relative positions by rows and columns (paper, equation 3).

    `y[p] = sum_t softmax_t(q[p] . k[p + t] + q[p] . e[t]) v[p + t]` over the K x K neighbours t, where the first half
    of `e[t]` is a learned vector of t's row and the second half one of its column. There is no factor of the logits and
    no projection of the output. Cost is linear in pixels; nothing depends on the size of the map.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            kernel_size: int = 7,
            dilation: int = 1,
            border: str = 'zero',
            attn_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Heads, whose number of channels must be even. Channels are head-major.
            kernel_size: Odd side of the neighbourhood, in taps.
            dilation: Distance between neighbouring taps, in pixels.
            border: What a tap outside the map is, on which the paper is silent: 'zero' a key and a value of zero, whose
                position keeps its share of the softmax, as in timm's `HaloAttn`; 'mask' nothing.
            attn_drop: Dropout rate of the attention weights.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, kernel_size is even, or border is none of
                those named.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        kernel_size, dilation = whole_number('kernel_size', kernel_size), whole_number('dilation', dilation)
        if dim % (2 * num_heads) != 0:
            raise ValueError(
                f'num_heads: got {num_heads}, must divide dim, which is {dim}, into heads of an even number of '
                f'channels.')
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
        if border not in _BORDERS:
            raise ValueError(f'border: got {border!r}, must be one of {", ".join(_BORDERS)}.')
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.border = border
        self.attn_drop_rate = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        # by offset, key minus query; shared by the heads
        self.rel_row = nn.Parameter(torch.empty(kernel_size, self.head_dim // 2, **dd))
        self.rel_col = nn.Parameter(torch.empty(kernel_size, self.head_dim // 2, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as timm's `HaloAttn`; the paper says nothing."""
        trunc_normal_(self.qkv.weight, std=self.dim ** -.5)
        trunc_normal_(self.rel_row, std=self.head_dim ** -.5)
        trunc_normal_(self.rel_col, std=self.head_dim ** -.5)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Hook of timm's initialisers, which have drawn every Linear anew by the time they come here."""
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, H, W, dim) to values (B, H, W, dim) and logits (B, H, W, num_heads, kernel_size ** 2)."""
        check_map(x, self.dim)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        B, H, W, _ = q.shape
        halves = q.unflatten(-1, (self.num_heads, 2, self.head_dim // 2)).permute(4, 0, 1, 2, 3, 5)
        tables = torch.stack([self.rel_row, self.rel_col]).transpose(1, 2)
        positions = torch.bmm(halves.reshape(2, -1, self.head_dim // 2), tables)
        row_bias, column_bias = positions.reshape(2, B, H, W, self.num_heads, self.kernel_size).unbind(0)
        logits = local_logits(
            q, k, self.kernel_size, self.dilation, row_bias, column_bias, self.num_heads, self.border)
        return v, logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        v, logits = self.project(x)
        dropout_p = self.attn_drop_rate if self.training else 0.
        return local_attention(v, logits, self.kernel_size, self.dilation, dropout_p=dropout_p)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights (B, H, W, num_heads, kernel_size ** 2), for looking at."""
        return self.project(x)[1].softmax(dim=-1)
