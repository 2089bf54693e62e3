"""Global self-attention in linear time: a context for each key channel, and positions along each axis.

Paper: `Global Self-Attention Networks for Image Recognition` - https://arxiv.org/abs/2010.03019
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn

from ...ops._autocast import without_autocast
from ..arguments import check_map, pair, whole_number
from ..axis import by_pair, fit_table, lines_at_once
from ..sizes import sizes_are_open
from .mixer import Mixer

_BEYOND = ('zero', 'resample')
_NORMS = ('between', 'after', 'none')


def _attend_content(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    B, H, W, C = q.shape
    q = q.reshape(B, H * W, num_heads, C // num_heads).transpose(1, 2)
    k = k.reshape(B, H * W, num_heads, C // num_heads).permute(0, 2, 3, 1)
    v = v.reshape(B, H * W, num_heads, C // num_heads).transpose(1, 2)
    x = q @ (k.softmax(dim=-1) @ v)  # B, num_heads, H * W, channels
    return x.transpose(1, 2).reshape(B, H, W, C)


def attend_content(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Read `softmax(k) v`, a mean of all pixels' values for each channel of the keys, by the queries.

    Args:
        q: Queries (B, H, W, C), head-major.
        k: Keys of the same shape.
        v: Values of the same shape.
        num_heads: Heads.

    Returns:
        (B, H, W, C), computed as the arguments come even under autocast.
    """
    if not torch.jit.is_scripting():
        with without_autocast(q.device.type):
            return _attend_content(q, k, v, num_heads)
    return _attend_content(q, k, v, num_heads)


def _weigh(q: torch.Tensor, v: torch.Tensor, rel: torch.Tensor) -> torch.Tensor:
    # q: L, lines, channels; v: lines, L, channels; rel: L, channels, L
    weights = torch.bmm(q, rel)  # query, line, key
    return torch.bmm(weights.transpose(0, 1), v)


def _attend_rows(q: torch.Tensor, v: torch.Tensor, rel: torch.Tensor, num_heads: int) -> torch.Tensor:
    B, H, W, C = q.shape
    lines = B * H * num_heads
    q = q.reshape(B, H, W, num_heads, C // num_heads).permute(2, 0, 1, 3, 4).reshape(W, lines, C // num_heads)
    v = v.reshape(B, H, W, num_heads, C // num_heads).transpose(2, 3).reshape(lines, W, C // num_heads)
    rel = by_pair(rel.t()).transpose(0, 1)  # query, channels, key
    step = lines
    if not sizes_are_open():
        step = lines_at_once(W, 1, q.is_cuda)
    if not sizes_are_open() and step < lines:
        x = torch.cat([_weigh(a, b, rel) for a, b in zip(q.split(step, dim=1), v.split(step))])
    else:
        x = _weigh(q, v, rel)
    return x.view(B, H, num_heads, W, C // num_heads).transpose(2, 3).reshape(B, H, W, C)


def attend_rows(q: torch.Tensor, v: torch.Tensor, rel: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`sum_p (q_o . rel[p - o]) v_p` over the pixels p of the row of each pixel o, without a softmax.

    Args:
        q: Queries (B, H, W, C), head-major.
        v: Values of the same shape.
        rel: Table (2 * W - 1, C / num_heads) by distance, shared by the heads.
        num_heads: Heads.

    Returns:
        (B, H, W, C), computed as the arguments come even under autocast.
    """
    if not torch.jit.is_scripting():
        with without_autocast(q.device.type):
            return _attend_rows(q, v, rel, num_heads)
    return _attend_rows(q, v, rel, num_heads)


def fit_positions(table: torch.Tensor, length: int, beyond: str) -> torch.Tensor:
    """A table (distances, channels) for lines of another length, see `fit_table`."""
    return fit_table(table.t(), length, beyond, True).t()


torch.fx.wrap('fit_positions')
torch.fx.wrap('attend_content')
torch.fx.wrap('attend_rows')
torch.fx.wrap('check_map')


class GlobalSelfAttention(Mixer):
    """The sum of attention to content and of attention to positions (paper, section 3).

    Content: softmax over all pixels for each channel of the keys makes a context of the values, which queries read.
    Positions: queries weigh the pixels of their column by distance, and after a batch norm those of their row. Cost is
    linear in pixels but for the length of an axis. There is no projection of the output.

    No softmax bounds the weights of positions. With a batch norm whose statistics do not match, outputs grow from layer
    to layer without end: train it, and do not freeze it early. Behind the projection everything is float32.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            feat_size: Tuple[int, int] = (56, 56),
            norm: str = 'between',
            share_norm: bool = False,
            beyond: str = 'zero',
            norm_eps: float = 1e-5,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Heads, a divisor of dim. Channels are head-major.
            feat_size: Height and width of the map that tables are made for: both cover the longer side. Maps may be of
                any size, distances mean the same in all.
            norm: Where the batch norm of the positions' branch is: 'between' columns and rows as in the paper's
                figure 1, 'after' both, or 'none'.
            share_norm: The heads share a batch norm of one head's channels.
            beyond: What larger maps find in the tables: 'zero' beyond the largest distance; or 'resample', the table
                stretched to the map and divided by as much, so that sums keep their size.
            norm_eps: Added to the variance of the batch norm.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, or an option is none of those named.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        if dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of dim, which is {dim}.')
        if norm not in _NORMS:
            raise ValueError(f'norm: got {norm!r}, must be one of {", ".join(_NORMS)}.')
        if beyond not in _BEYOND:
            raise ValueError(f'beyond: got {beyond!r}, must be one of {", ".join(_BEYOND)}.')
        self.dim = dim
        self.num_heads = num_heads
        self.norm = norm
        self.beyond = beyond
        self.norm_dim = dim // num_heads if share_norm else dim
        length = max(pair('feat_size', feat_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        # by distance, key minus query; shared by the heads
        self.rel_col = nn.Parameter(torch.empty(2 * length - 1, dim // num_heads, **dd))
        self.rel_row = nn.Parameter(torch.empty(2 * length - 1, dim // num_heads, **dd))
        self.bn = nn.BatchNorm2d(self.norm_dim, eps=norm_eps, **dd) if norm != 'none' else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that a sum over the pixels of a line is of the size of one value; the paper has nothing."""
        nn.init.normal_(self.qkv.weight, std=self.dim ** -.5)
        for table in (self.rel_col, self.rel_row):
            length, head_dim = (table.shape[0] + 1) // 2, table.shape[1]
            nn.init.normal_(table, std=(length * head_dim) ** -.5)
        if self.bn is not None:
            self.bn.reset_parameters()

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Let the tables cover maps of another size.

        Args:
            feat_size: Height and width of the map.
            window_size: There are no windows.
            always_partition: There are no windows.
        """
        length = max(pair('feat_size', feat_size))
        for name in ('rel_col', 'rel_row'):
            table = getattr(self, name)
            if table.shape[0] != 2 * length - 1:
                fitted = fit_positions(table.detach(), length, self.beyond).clone(memory_format=torch.contiguous_format)
                setattr(self, name, nn.Parameter(fitted, requires_grad=table.requires_grad))

    def norm_map(self, x: torch.Tensor) -> torch.Tensor:
        """Batch norm of a map (B, H, W, dim), by channels of the map or of a head."""
        bn = self.bn
        if bn is None:
            return x
        else:
            B, H, W, C = x.shape
            x = x.reshape(B, H, W * (C // self.norm_dim), self.norm_dim)
            if bn.training:
                dtype = x.dtype
                x = bn(x.to(bn.weight.dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(dtype)
            else:  # as the map comes: half precision could not hold it
                mean, var = bn.running_mean, bn.running_var
                assert mean is not None and var is not None
                scale = bn.weight.to(x.dtype) / torch.sqrt(var.to(x.dtype) + bn.eps)
                x = torch.addcmul(bn.bias.to(x.dtype) - mean.to(x.dtype) * scale, x, scale)
            return x.reshape(B, H, W, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        dtype = qkv.dtype
        q, k, v = qkv.to(torch.promote_types(dtype, torch.float32)).chunk(3, dim=-1)
        content = attend_content(q, k, v, self.num_heads)
        rel_col = fit_positions(self.rel_col, H, self.beyond).to(q.dtype)
        rel_row = fit_positions(self.rel_row, W, self.beyond).to(q.dtype)
        x = attend_rows(q.transpose(1, 2), v.transpose(1, 2), rel_col, self.num_heads).transpose(1, 2)
        if self.norm == 'between':
            x = self.norm_map(x)
        x = attend_rows(q, x, rel_row, self.num_heads)
        if self.norm == 'after':
            x = self.norm_map(x)
        return (content + x).to(dtype)
