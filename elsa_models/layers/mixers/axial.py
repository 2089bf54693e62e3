"""Position-sensitive axial attention.

Paper: `Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation` - https://arxiv.org/abs/2003.07853
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ...ops import axis_attention
from ..arguments import check_map, is_plain, pair, whole_number
from ..axis import by_pair, fit_table, lines_at_once
from ..sizes import sizes_are_open
from .mixer import Mixer

_BEYOND = ('clamp', 'resample')
_POOLS = ('average', 'stride')
_Folded = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _heads(qkv: torch.Tensor, num_heads: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (S, num_heads, L, channels) of (S, L, 2 * C)."""
    S, L, C = qkv.shape
    q, k, v = qkv.split([C // 4, C // 4, C // 2], dim=-1)
    q = q.reshape(S, L, num_heads, C // 4 // num_heads).transpose(1, 2)
    k = k.reshape(S, L, num_heads, C // 4 // num_heads).transpose(1, 2)
    v = v.reshape(S, L, num_heads, C // 2 // num_heads).transpose(1, 2)
    return q, k, v


def _weights(
        q: torch.Tensor,
        k: torch.Tensor,
        qk_scale: torch.Tensor,
        rel_query: torch.Tensor,
        rel_key: torch.Tensor,
) -> torch.Tensor:
    # q, k: S, num_heads, L, channels; rel_*: num_heads, channels, query, key
    logits = q @ (k * qk_scale.view(-1, 1, 1)).transpose(-2, -1)  # S, num_heads, query, key
    logits += torch.einsum('snqc,ncqk->snqk', q, rel_query)
    logits += torch.einsum('snkc,ncqk->snqk', k, rel_key)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(q.dtype)


def axis_weights(
        qkv: torch.Tensor,
        num_heads: int,
        qk_scale: torch.Tensor,
        rel_query: torch.Tensor,
        rel_key: torch.Tensor,
        beyond: str,
) -> torch.Tensor:
    """The weights (S, num_heads, L, L) of `attend_axis` by query and key."""
    q, k, _ = _heads(qkv, num_heads)
    qk_scale = qk_scale.to(qkv.dtype)
    rel_query = by_pair(fit_table(rel_query, qkv.shape[1], beyond)).to(qkv.dtype)
    rel_key = by_pair(fit_table(rel_key, qkv.shape[1], beyond)).to(qkv.dtype)
    return _weights(q, k, qk_scale, rel_query, rel_key)


def _attend(
        qkv: torch.Tensor,
        num_heads: int,
        qk_scale: torch.Tensor,
        rel_query: torch.Tensor,
        rel_key: torch.Tensor,
        rel_value: torch.Tensor,
) -> torch.Tensor:
    q, k, v = _heads(qkv, num_heads)
    attn = _weights(q, k, qk_scale, rel_query, rel_key)
    x = attn @ v + torch.einsum('snqk,ncqk->snqc', attn, rel_value)
    return x.transpose(1, 2).flatten(2)


def attend_axis(
        qkv: torch.Tensor,
        num_heads: int,
        qk_scale: torch.Tensor,
        rel_query: torch.Tensor,
        rel_key: torch.Tensor,
        rel_value: torch.Tensor,
        beyond: str,
) -> torch.Tensor:
    """Attention of the pixels of each line to one another, with distances in logits and values.

    This is `AxialLayer` with its norms in the arguments. Lines are taken a few at a time; in inference on a CPU Numba's
    kernels serve, where they can.

    Args:
        qkv: Queries, keys and values (S, L, 2 * C) of S lines: C / 2, C / 2 and C channels, head-major.
        num_heads: Heads.
        qk_scale: (num_heads), factor of query times key.
        rel_query: Table (num_heads, C / num_heads / 2, distances), which queries meet.
        rel_key: Of the same shape, which keys meet.
        rel_value: (num_heads, C / num_heads, distances), added to the values.
        beyond: See `fit_table`.

    Returns:
        (S, L, C).
    """
    S, L, _ = qkv.shape
    rel_query = fit_table(rel_query, L, beyond).to(qkv.dtype)
    rel_key = fit_table(rel_key, L, beyond).to(qkv.dtype)
    rel_value = fit_table(rel_value, L, beyond).to(qkv.dtype)
    qk_scale = qk_scale.to(qkv.dtype)
    if not torch.jit.is_scripting():
        if axis_attention.takes(qkv, qk_scale, rel_query, rel_key, rel_value):
            return axis_attention.attend_lines(qkv, num_heads, qk_scale, rel_query, rel_key, rel_value)
    rel_query, rel_key, rel_value = by_pair(rel_query), by_pair(rel_key), by_pair(rel_value)
    if not sizes_are_open():
        step = lines_at_once(L, num_heads, qkv.is_cuda)
        if S > step:
            return torch.cat(
                [_attend(x, num_heads, qk_scale, rel_query, rel_key, rel_value) for x in qkv.split(step)])
    return _attend(qkv, num_heads, qk_scale, rel_query, rel_key, rel_value)


torch.fx.wrap('attend_axis')
torch.fx.wrap('by_pair')
torch.fx.wrap('check_map')
torch.fx.wrap('fit_table')


def _scale_shift(
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: Optional[torch.Tensor],
        var: Optional[torch.Tensor],
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """What an evaluated batch norm multiplies with and then adds."""
    assert mean is not None and var is not None
    scale = weight / torch.sqrt(var + eps)
    return scale, bias - mean * scale


def _to_images(x: torch.Tensor) -> torch.Tensor:
    """(S, L, C) as (S, C, L, 1), channels last in memory, for batch norms."""
    return x.transpose(1, 2).unsqueeze(3)


def _to_lines(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(3).transpose(1, 2)


def _set_length(layer: Union['AxialLayer', 'FoldedAxialLayer'], length: int) -> None:
    for name in ('rel_query', 'rel_key', 'rel_value'):
        table = getattr(layer, name)
        if table.shape[-1] != 2 * length - 1:
            fitted = fit_table(table.detach(), length, layer.beyond).clone()
            setattr(layer, name, nn.Parameter(fitted, requires_grad=table.requires_grad))


class AxialLayer(nn.Module):
    """Attention along one axis, on lines (S, L, C) (paper, equation 4).

    Batch norms follow the projection, each of the three terms of the logits and both of the output, as the authors have
    it. Evaluated, they are folded into the projection and the tables, which leaves one map of logits in place of three.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            length: int,
            in_dim: Optional[int] = None,
            beyond: str = 'clamp',
            norm_eps: float = 1e-5,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of output and values; queries and keys have half as many.
            num_heads: Heads, a divisor of dim / 2. Channels are head-major.
            length: Pixels of the lines that the tables cover.
            in_dim: Channels of the input, dim if None.
            beyond: What longer lines find in the tables: 'clamp' or 'resample', see `fit_table`.
            norm_eps: Added to the variances of the batch norms.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, or beyond is neither.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        length = whole_number('length', length)
        in_dim = dim if in_dim is None else whole_number('in_dim', in_dim)
        if dim % (2 * num_heads) != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of half of dim, which is {dim}.')
        if beyond not in _BEYOND:
            raise ValueError(f'beyond: got {beyond!r}, must be one of {", ".join(_BEYOND)}.')
        self.dim = dim
        self.num_heads = num_heads
        self.beyond = beyond
        head_dim = dim // num_heads
        self.qkv = nn.Linear(in_dim, 2 * dim, bias=False, **dd)
        # by distance, key minus query; shared by the heads
        self.rel_query = nn.Parameter(torch.empty(head_dim // 2, 2 * length - 1, **dd))
        self.rel_key = nn.Parameter(torch.empty(head_dim // 2, 2 * length - 1, **dd))
        self.rel_value = nn.Parameter(torch.empty(head_dim, 2 * length - 1, **dd))
        self.bn_qkv = nn.BatchNorm2d(2 * dim, eps=norm_eps, **dd)
        self.bn_qk = nn.BatchNorm2d(num_heads, eps=norm_eps, **dd)
        self.bn_qr = nn.BatchNorm2d(num_heads, eps=norm_eps, **dd)
        self.bn_kr = nn.BatchNorm2d(num_heads, eps=norm_eps, **dd)
        self.bn_content = nn.BatchNorm2d(dim, eps=norm_eps, **dd)
        self.bn_position = nn.BatchNorm2d(dim, eps=norm_eps, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do."""
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_features ** -.5)
        for table in (self.rel_query, self.rel_key, self.rel_value):
            nn.init.normal_(table, std=(self.dim // self.num_heads) ** -.5)
        for norm in (self.bn_qkv, self.bn_qk, self.bn_qr, self.bn_kr, self.bn_content, self.bn_position):
            norm.reset_parameters()

    @torch.jit.ignore
    def set_length(self, length: int) -> None:
        """Let the tables cover lines of another length."""
        _set_length(self, length)

    def fold(self) -> _Folded:
        """Factor and shift of what is projected, then `attend_axis`'s factor and tables, with all norms in them.

        The shifts of the logits' norms are the same for all keys: a softmax does not see them. Those of the output's
        go to the values, since weights sum to 1.
        """
        bn = self.bn_qkv
        scale, bias = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        bn = self.bn_qk
        qk_scale, qk_shift = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        bn = self.bn_qr
        qr_scale, qr_shift = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        bn = self.bn_kr
        kr_scale, kr_shift = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        bn = self.bn_content
        content_scale, content_shift = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        bn = self.bn_position
        position_scale, position_shift = _scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
        qk_scale = qk_scale + 0. * (qk_shift + qr_shift + kr_shift)  # no effect, but a gradient of 0 instead of none
        factor = torch.cat([torch.ones_like(content_scale), content_scale])  # query and key, value
        scale, bias = scale * factor, bias * factor
        bias = bias + torch.cat([torch.zeros_like(content_shift), content_shift + position_shift])
        return (
            scale,
            bias,
            qk_scale,
            self.rel_query * qr_scale[:, None, None],
            self.rel_key * kr_scale[:, None, None],
            self.rel_value * position_scale.view(self.num_heads, -1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map lines (S, L, in_dim) to (S, L, dim)."""
        if self.training or self._finds_statistics():
            return self.forward_unfolded(x)
        scale, bias, qk_scale, rel_query, rel_key, rel_value = self.fold()
        x = self._project(x, scale, bias)
        return attend_axis(x, self.num_heads, qk_scale, rel_query, rel_key, rel_value, self.beyond)

    def _finds_statistics(self) -> bool:
        """Whether a norm takes those of this batch, as `reestimate_batch_norm` has it in evaluation."""
        return (
            self.bn_qkv.training or self.bn_qk.training or self.bn_qr.training or self.bn_kr.training
            or self.bn_content.training or self.bn_position.training)

    def _project(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not is_plain(self.qkv, nn.Linear):
                return self.qkv(x) * scale + bias
        return F.linear(x, self.qkv.weight * scale[:, None], bias)

    def forward_unfolded(self, x: torch.Tensor) -> torch.Tensor:
        """The same, norm by norm, as for training."""
        length = x.shape[1]
        rel_query = by_pair(fit_table(self.rel_query, length, self.beyond))
        rel_key = by_pair(fit_table(self.rel_key, length, self.beyond))
        rel_value = by_pair(fit_table(self.rel_value, length, self.beyond))
        dtype = self.bn_qkv.weight.dtype  # float32 under autocast: statistics are of many pairs of pixels
        x = _to_lines(self.bn_qkv(_to_images(self.qkv(x).to(dtype))))
        q, k, v = _heads(x, self.num_heads)
        qk = q @ k.transpose(-2, -1)  # S, num_heads, query, key
        qr = torch.einsum('snqc,cqk->snqk', q, rel_query)
        kr = torch.einsum('snkc,cqk->snqk', k, rel_key)
        logits = self.bn_qk(qk.to(dtype)) + self.bn_qr(qr.to(dtype)) + self.bn_kr(kr.to(dtype))
        attn = logits.softmax(dim=-1)
        content = (attn @ v).transpose(1, 2).flatten(2)  # S, L, dim
        position = torch.einsum('snqk,cqk->sqnc', attn, rel_value).flatten(2)
        x = self.bn_content(_to_images(content.to(dtype))) + self.bn_position(_to_images(position.to(dtype)))
        return _to_lines(x)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (S, num_heads, L, L) by query and key, of lines (S, L, in_dim), as in evaluation."""
        scale, bias, qk_scale, rel_query, rel_key, _ = self.fold()
        return axis_weights(self._project(x, scale, bias), self.num_heads, qk_scale, rel_query, rel_key, self.beyond)


class FoldedAxialLayer(nn.Module):
    """An evaluated `AxialLayer` whose norms are gone for good."""

    def __init__(self, layer: AxialLayer) -> None:
        """
        Args:
            layer: The layer to take the place of.
        """
        super().__init__()
        self.dim = layer.dim
        self.num_heads = layer.num_heads
        self.beyond = layer.beyond
        with torch.no_grad():
            scale, bias, qk_scale, rel_query, rel_key, rel_value = layer.fold()
            weight = layer.qkv.weight * scale[:, None]
        self.qkv = nn.Linear(weight.shape[1], weight.shape[0], device='meta')
        self.qkv.weight, self.qkv.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.qk_scale = nn.Parameter(qk_scale)
        self.rel_query = nn.Parameter(rel_query)
        self.rel_key = nn.Parameter(rel_key)
        self.rel_value = nn.Parameter(rel_value)

    @torch.jit.ignore
    def set_length(self, length: int) -> None:
        """Let the tables cover lines of another length."""
        _set_length(self, length)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (S, num_heads, L, L) by query and key, of lines (S, L, in_dim)."""
        return axis_weights(
            self.qkv(x), self.num_heads, self.qk_scale, self.rel_query, self.rel_key, self.beyond)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map lines (S, L, in_dim) to (S, L, dim)."""
        return attend_axis(
            self.qkv(x), self.num_heads, self.qk_scale, self.rel_query, self.rel_key, self.rel_value, self.beyond)


class AxialAttention(Mixer):
    """Attention along the height of a map, then along its width (paper, section 3.2)."""

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            feat_size: Tuple[int, int] = (56, 56),
            stride: int = 1,
            pool: str = 'average',
            table_length: Optional[int] = None,
            beyond: str = 'clamp',
            norm_eps: float = 1e-5,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Heads, a divisor of dim / 2. Channels are head-major.
            feat_size: Height and width of the map that the tables cover. Maps may be of any size: shorter axes take
                the tables' central columns.
            stride: 1 or 2, of the output.
            pool: How strides are made: 'average' of 2 x 2 pixels at the end, as in the authors' PyTorch version; or
                'stride', every second row after attention along the height and every second column after that along the
                width, as in the paper and the authors' TensorFlow version. The two are not equivalent.
            table_length: Pixels that all tables cover, whatever the map's size (255 in the authors' TensorFlow
                version); the map's if None.
            beyond: What larger maps find in the tables: 'clamp', the value of the largest distance; or 'resample', the
                table stretched to the map.
            norm_eps: Added to the variances of the batch norms.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, or an option is none of those named.
        """
        super().__init__()
        feat_size = pair('feat_size', feat_size)
        if stride not in (1, 2):
            raise ValueError(f'stride: got {stride!r}, must be 1 or 2.')
        if pool not in _POOLS:
            raise ValueError(f'pool: got {pool!r}, must be one of {", ".join(_POOLS)}.')
        if table_length is not None:
            table_length = whole_number('table_length', table_length)
        self.dim = whole_number('dim', dim)
        self.num_heads = num_heads
        self.stride = stride
        self.pool = pool
        self.table_length = table_length
        layer_args = dict(
            dim=dim, num_heads=num_heads, beyond=beyond, norm_eps=norm_eps, device=device, dtype=dtype)
        height_length, width_length = self._table_lengths(feat_size)
        self.height = AxialLayer(length=height_length, **layer_args)
        self.width = AxialLayer(length=width_length, **layer_args)

    def _table_lengths(self, feat_size: Tuple[int, int]) -> Tuple[int, int]:
        return feat_size if self.table_length is None else (self.table_length, self.table_length)

    def reset_parameters(self) -> None:
        """Initialise both layers."""
        self.height.reset_parameters()
        self.width.reset_parameters()

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Let the tables cover maps of another size, unless they have a length of their own.

        Args:
            feat_size: Height and width of the map.
            window_size: There are no windows.
            always_partition: There are no windows.
        """
        height_length, width_length = self._table_lengths(pair('feat_size', feat_size))
        self.height.set_length(height_length)
        self.width.set_length(width_length)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Fold all batch norms for good, where the projection before them is plain."""
        for name in ('height', 'width'):
            layer = getattr(self, name)
            if isinstance(layer, AxialLayer) and is_plain(layer.qkv, nn.Linear):
                setattr(self, name, FoldedAxialLayer(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, ceil(H / stride), ceil(W / stride), dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        x = self.height(x.transpose(1, 2).reshape(B * W, H, C).contiguous()).view(B, W, H, C)
        strided = self.stride > 1 and self.pool == 'stride'
        if strided:
            x = x[:, :, ::self.stride]
            H = x.shape[2]
        x = self.width(x.transpose(1, 2).reshape(B * H, W, C).contiguous()).view(B, H, W, C)
        if strided:
            x = x[:, :, ::self.stride].contiguous()
        elif self.stride > 1:
            x = F.avg_pool2d(
                x.permute(0, 3, 1, 2), self.stride, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
        return x

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, H, W, num_heads, H + W): of the pixels of a pixel's column, then of those of its row."""
        B, H, W, C = x.shape
        lines = x.transpose(1, 2).reshape(B * W, H, C)
        column = self.height.attention_map(lines).view(B, W, self.num_heads, H, H).permute(0, 3, 1, 2, 4)
        rows = self.height(lines).view(B, W, H, C).transpose(1, 2).reshape(B * H, W, C)
        row = self.width.attention_map(rows).view(B, H, self.num_heads, W, W).permute(0, 1, 3, 2, 4)
        return torch.cat([column, row], dim=-1)
