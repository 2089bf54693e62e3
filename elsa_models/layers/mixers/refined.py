"""Self-attention whose maps are handed on from block to block, and refined on the way.

Paper: `Refiner: Refining Self-attention for Vision Transformers` - https://arxiv.org/abs/2106.03714

Tokens x are (B, N, C), maps (B, num_heads, N, N) with a row for each query. A layer maps `(x, maps)` to `(out, maps)`,
so it is no `Mixer`: what it sees is more than x. Written from a description of what the authors released, which refines
maps in every second block; their code has no licence and none of it is here.

Every map is needed by the next layer, so no fused attention can serve. Maps are kept in float32 at least, and computed
so under autocast: their entries are about 1 / N, and their variances near the eps of the BatchNorm on them.
"""
from contextlib import contextmanager, nullcontext
from typing import ContextManager, Iterator, List, Optional, Tuple

import torch
import torch.distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ...ops._autocast import without_autocast
from ...ops.map_refinement import Moments, Norm, Weights, refined_product
from ..arguments import is_plain, whole_number
from ..sizes import sizes_are_open

_ROW_BYTES = 2 ** 21  # of the rows of maps that inference computes at a time


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


torch.fx.wrap('_at_least_float32')  # a leaf of symbolic traces, where tensors have no dtype


@torch.jit.unused
def is_recorded(x: torch.Tensor) -> bool:
    """Whether operators are recorded rather than run: no strips, whose number depends on the size, and no counting."""
    return (
        isinstance(x, torch.fx.Proxy) or sizes_are_open() or x.device.type == 'meta'
        or torch._C._are_functorch_transforms_active())


@torch.jit.unused
def _without_autocast(x: torch.Tensor) -> ContextManager:
    return nullcontext() if isinstance(x, torch.fx.Proxy) else without_autocast(x.device.type)


@torch.jit.unused
def _is_recomputed() -> bool:
    """Whether the pass is a second one, of gradient checkpointing: it runs within a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _heads_first(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    # B, N, C -> B, num_heads, N, C / num_heads
    return x.unflatten(2, (num_heads, x.shape[2] // num_heads)).transpose(1, 2)


class MapAttention(nn.Module):
    """Self-attention that adds a share of the maps it is given to its own: `softmax(q k^T * s) + s * maps`.

    s is head_dim ** -0.5. The sum is not normalised: rows of the first layer's maps sum to 1, of the next's to 1 + s.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of input and output.
            num_heads: Heads, a divisor of dim.
            qkv_bias: Add a bias to query, key and value.
            attn_drop: Dropout rate of the maps; what is dropped is dropped for the layers after it too.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: Sizes are no whole numbers, or num_heads is no divisor of dim.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads, head_dim = _check_heads(dim, num_heads)
        self.scale = head_dim ** -0.5
        self.lean = True  # compute inference in strips of queries
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self,
            x: torch.Tensor,
            maps: Optional[torch.Tensor] = None,
            may_overwrite: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: Tokens (B, N, dim).
            maps: Those of the layer before (B, num_heads, N, N), None in the first.
            may_overwrite: Nobody reads the given maps any more: inference may put the new ones in their place.

        Returns:
            Tokens (B, N, dim), and the maps that were applied to their values, to be handed on.
        """
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k, v = [_heads_first(_at_least_float32(t), self.num_heads) for t in (q, k, v)]
        if torch.jit.is_scripting():
            out, maps = self._attend(q, k, v, maps)
        else:
            with _without_autocast(x):
                if self._takes_strips(x):
                    out, maps = self._attend_by_rows(q, k, v, maps, may_overwrite)
                else:
                    out, maps = self._attend(q, k, v, maps)
        out = out.transpose(1, 2).flatten(2).to(x.dtype)
        return self.proj_drop(self.proj(out)), maps

    @torch.jit.unused
    def _takes_strips(self, x: torch.Tensor) -> bool:
        inference = self.lean and not self.training and not torch.is_grad_enabled()
        return inference and not is_recorded(x) and x.shape[0] > 0

    def _attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            maps: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        attn = torch.matmul(q * self.scale, k.transpose(-2, -1)).softmax(dim=-1)
        if maps is not None:
            attn = torch.add(attn, maps, alpha=self.scale)
        attn = self.attn_drop(attn)
        return torch.matmul(attn, v), attn

    @torch.jit.unused
    def _attend_by_rows(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            maps: Optional[torch.Tensor],
            may_overwrite: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The same for inference, a few queries at a time: no other map beside the two, and all of it in the cache."""
        B, h, N, _ = q.shape
        q, k = (q * self.scale).contiguous(), k.transpose(-2, -1)
        size = _ROW_BYTES if q.device.type == 'cpu' else 32 * _ROW_BYTES
        images = max(1, size // (h * N * N * q.element_size()))
        rows = max(1, min(N, size // (h * N * q.element_size())))
        attn = maps if may_overwrite and maps is not None and maps.dtype == q.dtype else q.new_empty(B, h, N, N)
        out = torch.empty_like(q)
        for b in range(0, B, images):
            some = slice(b, b + images)
            for low in range(0, N, rows):
                row = slice(low, low + rows)
                part = torch.matmul(q[some, :, row], k[some]).softmax(dim=-1)
                if maps is not None:
                    part.add_(maps[some, :, row], alpha=self.scale)
                attn[some, :, row] = part
                out[some, :, row] = torch.matmul(part, v[some])
        return out, attn


class MapRefinement(nn.Module):
    """`scale * bn4(A + bn3(reduce(relu6(bn2(conv(relu6(bn1(expand(A)))))))))` of maps A (B, num_heads, N, N).

    expand and reduce are linear in the heads. conv is a depthwise 3 x 3 convolution over queries and keys; neighbours
    are those of the sequence of tokens, the class token and the ends of image rows included.

    In eager mode `product` computes it in strips of queries, and in training anew in backward, see
    `ops/map_refinement.py`; graphs and scripts get operator after operator.
    """

    def __init__(self, num_heads: int, scale: float, ratio: float = 3., device=None, dtype=None) -> None:
        """
        Args:
            num_heads: Maps.
            scale: Factor of the refined maps.
            ratio: Expanded maps for each map.

        Raises:
            ValueError: num_heads is no whole number, or ratio leaves no expanded map.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        num_heads = whole_number('num_heads', num_heads)
        hidden = whole_number('ratio * num_heads', int(ratio * num_heads))
        self.scale = scale
        self.lean = True  # compute in strips, and anew in backward; False keeps what every operator gives
        self.expand = nn.Conv2d(num_heads, hidden, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(hidden, **dd)
        self.reduce = nn.Conv2d(hidden, num_heads, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(num_heads, **dd)
        self.bn4 = nn.BatchNorm2d(num_heads, **dd)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (B, num_heads, N, N) to refined maps of that shape and dtype, computed in the dtype of the parameters."""
        if torch.jit.is_scripting():
            return self._refine(maps)
        with _without_autocast(maps), self._counting_once(maps):
            return self._refine(maps)

    def _refine(self, maps: torch.Tensor) -> torch.Tensor:
        x = maps.to(self.expand.weight.dtype)
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.conv(y)))
        y = self.bn3(self.reduce(y))
        return self.scale * self.bn4(x + y).to(maps.dtype)

    @torch.jit.unused
    @contextmanager
    def _counting_once(self, maps: torch.Tensor) -> Iterator[None]:
        """Leave running statistics as they are where checkpointing computes a block for the second time."""
        if is_recorded(maps) or not _is_recomputed():
            yield
            return
        buffers = [(bn, dict(bn._buffers)) for bn in self._norms()]
        for bn, kept in buffers:  # copies take the second count; backward holds on to them
            bn._buffers.update({name: x.clone() for name, x in kept.items() if x is not None})
        try:
            yield
        finally:
            for bn, kept in buffers:
                bn._buffers.update(kept)

    @torch.jit.unused
    def _norms(self) -> List[_BatchNorm]:
        return [self.bn1, self.bn2, self.bn3, self.bn4]

    @torch.jit.unused
    def product(self, maps: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Product (B, num_heads, N, d) of refined maps and values (B, num_heads, N, d), both float32 or float64."""
        with _without_autocast(maps):
            norms: List[Norm] = []
            convs = self.expand, self.conv, self.reduce
            plain = all(is_plain(m, nn.Conv2d) for m in convs)
            if self.lean and plain and not is_recorded(maps) and maps.shape[0]:
                norms = [norm for norm in (_norm_of(bn, maps.dtype) for bn in self._norms()) if norm is not None]
            if len(norms) < 4:
                return torch.matmul(self(maps), value)
            weights = Weights(*(m.weight.to(maps.dtype) for m in convs))
            out, moments = refined_product(maps, value, weights, norms, self.scale)
        if not _is_recomputed():
            for bn, found in zip(self._norms(), moments):
                if found is not None:
                    _count(bn, found)
        return out


def _check_heads(dim: int, num_heads: int) -> Tuple[int, int]:
    dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
    if dim % num_heads != 0:
        raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {dim} channels.')
    return num_heads, dim // num_heads


def _norm_of(bn: _BatchNorm, dtype: torch.dtype) -> Optional[Norm]:
    """What a norm computes, None if it is of an unknown kind."""
    if not is_plain(bn, nn.BatchNorm2d, nn.SyncBatchNorm) or bn.weight is None:
        return None
    weight, bias = bn.weight.to(dtype), bn.bias.to(dtype)
    if not bn.training and bn.running_mean is not None and bn.running_var is not None:
        return Norm(weight, bias, bn.running_mean.to(dtype), bn.running_var.to(dtype), bn.eps)
    group = None
    if isinstance(bn, nn.SyncBatchNorm) and bn.training and torch.distributed.is_initialized():
        group = bn.process_group or torch.distributed.group.WORLD
        if torch.distributed.get_world_size(group) == 1:
            group = None
    return Norm(weight, bias, None, None, bn.eps, group)


@torch.no_grad()
def _count(bn: _BatchNorm, moments: Moments) -> None:
    """Update the running statistics of a BatchNorm, as its own forward does."""
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            momentum = 1. / float(bn.num_batches_tracked)
    for running, new in zip((bn.running_mean, bn.running_var), moments):
        running.lerp_(new.to(running.dtype), 0. if momentum is None else momentum)


class RefinedAttention(nn.Module):
    """Attention that has no queries and keys: it applies refined maps of the layer before, and hands these on as they
    were."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            qkv_bias: bool = True,
            refine_ratio: float = 3.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of input and output.
            num_heads: Heads, a divisor of dim.
            qkv_bias: Add a bias to the value.
            refine_ratio: Expanded maps of the refinement for each head.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: Sizes are no whole numbers, or num_heads is no divisor of dim.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_heads, head_dim = _check_heads(dim, num_heads)
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.refine = MapRefinement(self.num_heads, head_dim ** -0.5, refine_ratio, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self,
            x: torch.Tensor,
            maps: Optional[torch.Tensor] = None,
            may_overwrite: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: Tokens (B, N, dim).
            maps: Those of the layer before (B, num_heads, N, N).
            may_overwrite: As in `MapAttention`, whose calls are like these; they are read alone.

        Returns:
            Tokens (B, N, dim), and the maps as given.

        Raises:
            ValueError: There are no maps.
        """
        if maps is None:
            raise ValueError('maps: got None, must be those of a MapAttention before.')
        v = _heads_first(_at_least_float32(self.v(x)), self.num_heads)
        if torch.jit.is_scripting():
            out = torch.matmul(self.refine(maps), v)
        else:
            out = self.refine.product(maps, v)
        out = out.transpose(1, 2).flatten(2).to(x.dtype)
        return self.proj_drop(self.proj(out)), maps
