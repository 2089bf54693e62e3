"""Focal self-attention: a window that also sees its surround and, pooled, the region around it.

Paper: `Focal Self-attention for Local-Global Interactions in Vision Transformers` - https://arxiv.org/abs/2107.00641
(NeurIPS 2021). What is computed, and which weights it reads, are those of the authors' first release
(https://github.com/microsoft/Focal-Transformer, MIT); the code is written from a description of it.

Maps are (B, H, W, C) throughout, contiguous in C.
"""
import math
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table, trunc_normal_, use_fused_attn
from timm.models.swin_transformer import get_relative_position_index

from ...ops import window_attention
from ..arguments import check_map, is_plain, pair, whole_number
from ..sizes import pad_map, sizes_are_open
from .mixer import Mixer
from .window import pixels_by_window, rows_and_columns, window_places

_CHUNK_BYTES = 2 ** 22  # of gathered keys and values where no gradient is needed; larger ones leave the caches


def surround_offsets(window_size: int, expand_size: int) -> List[Tuple[int, int]]:
    """Row and column of each key of the surround, from the corner of the window, in the order of the bias table.

    They come from four copies of the window, moved by `expand_size` down or up and right or left, of which those
    positions stay that lie outside the window. Positions beside the middle of a side lie in two copies and are
    listed twice, with a bias each.
    """
    w, e = window_size, expand_size
    return [
        (row + down, column + right)
        for down in (e, -e) for right in (e, -e) for row in range(w) for column in range(w)
        if not (0 <= row + down < w and 0 <= column + right < w)]


def partition_windows(x: torch.Tensor, size: int) -> torch.Tensor:
    """Cut maps (B, H, W, C), padded with zeros on the right and at the bottom, into (B, windows, size ** 2, C)."""
    B, H, W, C = x.shape
    rows, columns = (H + size - 1) // size, (W + size - 1) // size
    x = pad_map(x, rows * size, columns * size)
    if not torch.jit.is_scripting():
        if sizes_are_open():  # views would be compiled anew for maps of one row of windows
            row, column = pixels_by_window(rows * size, columns * size, size, size, x.device)
            return x.flatten(1, 2).index_select(1, row * (columns * size) + column).view(B, -1, size * size, C)
    x = x.reshape(B, rows, size, columns, size, C).transpose(2, 3)
    return x.reshape(B, rows * columns, size * size, C)


def merge_windows(x: torch.Tensor, size: int, H: int, W: int) -> torch.Tensor:
    """The inverse of `partition_windows`: (B, windows, size ** 2, C) to (B, H, W, C)."""
    B, C = x.shape[0], x.shape[3]
    rows, columns = (H + size - 1) // size, (W + size - 1) // size
    if not torch.jit.is_scripting():
        if sizes_are_open():
            row, column = rows_and_columns(H, W, x.device)
            place = window_places(row, column, W, size, size)
            return x.flatten(1, 2).index_select(1, place).view(B, H, W, C)
    x = x.reshape(B, rows, columns, size, size, C).transpose(2, 3).reshape(B, rows * size, columns * size, C)
    return x[:, :H, :W].contiguous()


def find_keys(
        steps: torch.Tensor,
        places: torch.Tensor,
        bounded: Optional[torch.Tensor],
        rows: int,
        columns: int,
        places_per_window: int,
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Where each window finds its keys in a map of rows x columns windows.

    Args:
        steps: From the window to that of each key, rows down and columns right, (2, keys).
        places: Place of each key in its window, (keys,).
        bounded: Whether a key is unseen beyond the map's edge, (keys,). For the others, at most one step away, the map
            wraps round. None where no key is bounded.
        rows: Rows of windows.
        columns: Windows in a row.
        places_per_window: Places that a window has.

    Returns:
        Indices (windows, keys) of the keys among all places, window by window, and the keys that are not seen.
    """
    window = torch.arange(rows * columns, device=steps.device)
    window_row = window // columns
    row = window_row[:, None] + steps[0]
    column = (window - window_row * columns)[:, None] + steps[1]
    above, below, left, right = row < 0, row >= rows, column < 0, column >= columns
    # no remainder by a size, which ONNX has not
    row = torch.where(above, row + rows, torch.where(below, row - rows, row))
    column = torch.where(left, column + columns, torch.where(right, column - columns, column))
    index = (row * columns + column) * places_per_window + places
    if bounded is None:
        return index, None
    unseen = (above | below | left | right) & bounded
    return index.masked_fill(unseen, 0), unseen


def resize_pool(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Resample the weights of pooling (1, old_size ** 2) to windows of another size, keeping their sum."""
    return resize_grid(weight, size) * (weight.shape[1] / size ** 2)


def _like(parameter: torch.Tensor, x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=parameter.requires_grad)


def resize_grid(x: torch.Tensor, size: int) -> torch.Tensor:
    """Resample grids (n, old_size ** 2), row-major, to (n, size ** 2), bicubically."""
    old_size = math.isqrt(x.shape[1])
    if old_size == size:
        return x
    grid = x.detach().float().view(1, -1, old_size, old_size)
    return F.interpolate(grid, (size, size), mode='bicubic', align_corners=False)[0].flatten(1).to(x.dtype)


def _attend_some(
        q: torch.Tensor,
        kv: torch.Tensor,
        bias: torch.Tensor,
        index: torch.Tensor,
        unseen: Optional[torch.Tensor],
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    # q: B, heads, windows, L, d; kv: 2, B, heads, places, d; bias: heads, L, S; index, unseen: windows, S
    heads, L, S = bias.shape
    B, windows, d = q.shape[0], index.shape[0], q.shape[4]
    bias = bias.unsqueeze(1)
    if unseen is not None:
        bias = bias.masked_fill(unseen.unsqueeze(1), -float('inf'))
    bias = bias.expand(heads, windows, L, S).reshape(1, heads * windows, L, S)
    kv = kv.index_select(3, index.flatten()).view(2, B, heads * windows, S, d)
    k, v = kv.unbind(0)
    q = q.reshape(B, heads * windows, L, d)
    if fused and not (q.device.type == 'cpu' and torch.is_grad_enabled()):
        # on the CPU, PyTorch's kernel takes no bias that learns, which torch.func hides, and what stands in for it is
        # slower than the below
        x = F.scaled_dot_product_attention(q, k, v, bias, dropout_p)
    else:
        attn = (q * d ** -.5) @ k.transpose(-2, -1)
        attn = (attn + bias).softmax(dim=-1)
        if dropout_p > 0.:
            attn = F.dropout(attn, dropout_p)
        x = attn @ v
    return x.view(B, heads, windows, L, d).permute(0, 2, 3, 1, 4).flatten(3)


def attend_windows(
        qkv: torch.Tensor,
        pooled: torch.Tensor,
        bias: torch.Tensor,
        steps: torch.Tensor,
        places: torch.Tensor,
        bounded: Optional[torch.Tensor],
        rows: int,
        columns: int,
        dropout_p: float = 0.,
        fused: bool = False,
) -> torch.Tensor:
    """Attention of each window of a map to its keys, see `find_keys`.

    Windows count as heads of their own, so that one bias serves all images of a batch without a copy. Where no
    gradient is needed, windows are taken in chunks, and memory does not grow with the image; on a CPU Numba's kernels
    serve there, where they can.

    Args:
        qkv: Query, key and value of each pixel, (B, rows * columns, L, 3 * C).
        pooled: Key and value of each window's pooled token, (B, rows * columns, 1, 2 * C); its place is L.
        bias: Added to the logits, (heads, L, keys).
        steps: See `find_keys`; what follows the keys of the bias is not used.
        places: See `find_keys`.
        bounded: See `find_keys`.
        rows: Rows of windows.
        columns: Windows in a row.
        dropout_p: Dropout rate of the attention weights.
        fused: Call PyTorch's fused attention.

    Returns:
        (B, rows * columns, L, C).
    """
    heads, L, S = bias.shape
    B, windows, C = qkv.shape[0], rows * columns, qkv.shape[3] // 3
    steps, places = steps[:, :S], places[:S]
    if bounded is not None:
        bounded = bounded[:S]
    if not torch.jit.is_scripting():
        if dropout_p == 0. and window_attention.takes(qkv, pooled, bias):
            return window_attention.attend_windows(qkv, pooled, bias, steps, places, bounded, rows, columns)
    index, unseen = find_keys(steps, places, bounded, rows, columns, L + 1)
    q = qkv[..., :C].unflatten(3, [heads, C // heads]).permute(0, 3, 1, 2, 4)
    kv = torch.cat([qkv[..., C:], pooled], dim=2).unflatten(3, [2, heads, C // heads])
    kv = kv.permute(3, 0, 4, 1, 2, 5).flatten(3, 4)  # 2, B, heads, places, d
    if not torch.jit.is_scripting():
        if not sizes_are_open() and not torch.is_grad_enabled():
            step = max(1, _CHUNK_BYTES // (2 * B * S * C * qkv.element_size() + 1))
            if step < windows:
                chunks = [slice(i, i + step) for i in range(0, windows, step)]
                return torch.cat([
                    _attend_some(
                        q[:, :, chunk], kv, bias, index[chunk], None if unseen is None else unseen[chunk], dropout_p,
                        fused)
                    for chunk in chunks], dim=1)
    return _attend_some(q, kv, bias, index, unseen, dropout_p, fused)


# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('check_map')
torch.fx.wrap('partition_windows')
torch.fx.wrap('merge_windows')
torch.fx.wrap('attend_windows')


class FocalAttention(Mixer):
    """Window attention whose keys are the window, its surround and the pooled windows of the region around it.

    Each window of w x w pixels attends to

    * its own pixels;
    * those that lie at most `expand_size` pixels outside it. As in the authors' release the map is a torus here: at an
      edge the surround is that of the opposite edge, unless `wrap` is off. Some of these keys are listed twice, with
      two biases, see `surround_offsets`; where no dropout falls between them they are computed once, with the
      logarithm of the sum of the biases' exponentials;
    * one token for each of the `focal_window` x `focal_window` windows around it that lie within the map: the sum of
      the window's pixels, weighted by `pool`, before their projection to key and value.

    Maps that windows do not divide are padded with zeros on the right and at the bottom, and what is padded counts as
    pixels. No parameter depends on the size of the map.
    """
    fused_attn: torch.jit.Final[bool]
    bounded: Optional[torch.Tensor]
    fixed_bias: Optional[torch.Tensor]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int = 7,
            expand_size: int = 3,
            focal_window: int = 7,
            wrap: bool = True,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Heads, a divisor of dim.
            window_size: Side of the windows in pixels.
            expand_size: Width of the surround in pixels, at most the window's; 0 for none.
            focal_window: Side of the region in windows, odd.
            wrap: Let the surround wrap round the map's edges; without, nothing is seen beyond them.
            qkv_bias: Add a bias to query, key and value.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: Sizes are no whole numbers or not as said.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        window_size, expand_size = whole_number('window_size', window_size), whole_number('expand_size', expand_size, 0)
        focal_window = whole_number('focal_window', focal_window)
        if dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {dim} channels.')
        if expand_size > window_size:
            raise ValueError(f'expand_size: got {expand_size}, must be at most the window\'s side, {window_size}.')
        if focal_window % 2 == 0:
            raise ValueError(f'focal_window: got {focal_window}, must be odd.')
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = (window_size, window_size)
        self.expand_size = expand_size
        self.focal_window = focal_window
        self.wrap = wrap
        self.attn_drop_rate = attn_drop
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.pool = nn.Linear(window_size ** 2, 1, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        num_surround = len(surround_offsets(window_size, expand_size))
        # of query - key, of each query and key, of query - pooled key
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads, **dd))
        self.surround_bias = nn.Parameter(
            torch.empty(1, num_heads, window_size ** 2, num_surround, **dd)) if num_surround > 0 else None
        self.pooled_bias = nn.Parameter(torch.empty(num_heads, (window_size + focal_window - 1) ** 2, **dd))
        for name in ('window_index', 'surround_index', 'pooled_index', 'steps', 'places', 'bounded', 'fixed_bias'):
            self.register_buffer(name, None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do; their network draws the weights of `pool` like those of any linear layer."""
        for linear in (self.qkv, self.pool, self.proj):
            trunc_normal_(linear.weight, std=.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.relative_position_bias_table)
        if self.surround_bias is not None:
            trunc_normal_(self.surround_bias, std=.02)
        trunc_normal_(self.pooled_bias, std=.02)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Hook of timm's initialisers, which have drawn every Linear anew by the time they come here."""
        self.reset_parameters()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds. timm calls this after `to_empty()`."""
        w, f, device = self.window_size[0], self.focal_window, self.pooled_bias.device
        self.window_index = get_relative_position_index(w, w, device=device).flatten()
        row, column = torch.arange(w * w) // w, torch.arange(w * w) % w
        window_row, window_column = torch.arange(f * f) // f, torch.arange(f * f) % f
        away = row[:, None] - window_row + f - 1, column[:, None] - window_column + f - 1
        self.pooled_index = (away[0] * (w + f - 1) + away[1]).flatten().to(device)

        offsets = surround_offsets(w, self.expand_size)
        first = {offset: i for i, offset in reversed(list(enumerate(offsets)))}
        second = {offset: i for i, offset in enumerate(offsets) if first[offset] != i}
        once = sorted(i for offset, i in first.items() if offset not in second)
        order = once + [first[offset] for offset in second] + list(second.values())
        self.num_repeated = len(second)
        self.surround_index = torch.tensor(order, dtype=torch.long, device=device)
        # the window, its surround without repeats, pooled windows, repeats
        own = [(i // w, i % w) for i in range(w * w)]
        keys = own + [offsets[i] for i in order]
        at = len(keys) - len(second)
        steps = [(r // w, c // w) for r, c in keys]
        places = [r % w * w + c % w for r, c in keys]
        around = [(i // f - f // 2, i % f - f // 2) for i in range(f * f)]
        steps = steps[:at] + around + steps[at:]
        places = places[:at] + [w * w] * (f * f) + places[at:]
        bounded = [not self.wrap] * at + [True] * (f * f) + [not self.wrap] * len(second)
        self.steps = torch.tensor(steps, dtype=torch.long, device=device).t().contiguous()
        self.places = torch.tensor(places, dtype=torch.long, device=device)
        is_bounded = f > 1 or not self.wrap and len(offsets) > 0
        self.bounded = torch.tensor(bounded, device=device) if is_bounded else None
        self.fixed_bias = None

    @torch.jit.ignore
    def check_window_size(self, window_size: Tuple[int, int]) -> None:
        """Require that the windows could be of this size.

        Raises:
            ValueError: It is no square, or another than now and there is a surround, whose table cannot be resampled.
        """
        height, width = pair('window_size', window_size)
        if height != width:
            raise ValueError(f'window_size: got {window_size}, must be a square.')
        if self.surround_bias is not None and height != self.window_size[0]:
            raise ValueError(
                f'window_size: got {window_size}, must be {self.window_size}: the bias of the surround is one of each '
                f'pixel and key, which cannot be resampled. Without (expand_size=0) windows can change.')

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Nothing depends on the size of the map; tables and pooling weights are resampled to new windows.

        Raises:
            ValueError: As `check_window_size`, or always_partition is not None.
        """
        if always_partition is not None:
            raise ValueError(f'always_partition: got {always_partition}, must be None.')
        if window_size is None or pair('window_size', window_size) == self.window_size:
            return
        self.check_window_size(window_size)
        size = pair('window_size', window_size)[0]
        with torch.no_grad():
            self.relative_position_bias_table = _like(self.relative_position_bias_table, resize_rel_pos_bias_table(
                self.relative_position_bias_table, (size, size), ((2 * size - 1) ** 2, self.num_heads)))
            self.pooled_bias = _like(self.pooled_bias, resize_grid(self.pooled_bias, size + self.focal_window - 1))
            self.pool.weight = _like(self.pool.weight, resize_pool(self.pool.weight, size))
        self.pool.in_features = size ** 2
        self.window_size = (size, size)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Keep the sum of the bias tables in their place, for inference."""
        self.fixed_bias = None
        self.fixed_bias = self._bias(merged=True).detach()

    def _bias(self, merged: bool) -> torch.Tensor:
        """Bias (num_heads, window pixels, keys) of all keys, with repeated keys merged or as they are."""
        fixed_bias = self.fixed_bias
        if fixed_bias is not None:
            return fixed_bias
        L = self.window_size[0] * self.window_size[1]
        own = self.relative_position_bias_table[self.window_index].view(L, L, -1).permute(2, 0, 1)
        pooled = self.pooled_bias[:, self.pooled_index].view(self.num_heads, L, -1)
        if self.surround_bias is None:
            return torch.cat([own, pooled], dim=2)
        surround = self.surround_bias[0].index_select(2, self.surround_index)
        single, repeats = surround.shape[2] - 2 * self.num_repeated, self.num_repeated
        once, first, second = surround.split([single, repeats, repeats], dim=2)
        if merged:
            return torch.cat([own, once, torch.logaddexp(first, second), pooled], dim=2)
        return torch.cat([own, once, first, pooled, second], dim=2)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, H, W, num_heads, keys): of the window, its surround without repeats, and pooled windows."""
        B, H, W, C = x.shape
        w, heads = self.window_size[0], self.num_heads
        qkv, pooled = self._project(x)
        bias = self._bias(merged=True)
        L, S = bias.shape[1:]
        bounded = None if self.bounded is None else self.bounded[:S]
        rows, columns = (H + w - 1) // w, (W + w - 1) // w
        index, unseen = find_keys(self.steps[:, :S], self.places[:S], bounded, rows, columns, L + 1)
        q = qkv[..., :C].unflatten(3, (heads, C // heads)).transpose(2, 3)  # B, windows, heads, L, d
        k = torch.cat([qkv[..., C:2 * C], pooled[..., :C]], dim=2).flatten(1, 2)[:, index]  # B, windows, S, C
        k = k.unflatten(3, (heads, C // heads)).transpose(2, 3)
        logits = q * (C // heads) ** -.5 @ k.transpose(-2, -1) + bias
        if unseen is not None:
            logits = logits.masked_fill(unseen[:, None, None], -float('inf'))
        weights = merge_windows(logits.softmax(dim=-1).transpose(2, 3).flatten(3), w, H, W)
        return weights.unflatten(3, (heads, S))

    def _project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Query, key and value (B, windows, pixels, 3 * dim) of maps; key and value of each window's pooled token."""
        windows = partition_windows(x, self.window_size[0])
        if not torch.jit.is_scripting():
            if not is_plain(self.pool, nn.Linear) or not is_plain(self.qkv, nn.Linear):
                pooled = self.pool(windows.transpose(2, 3)).transpose(2, 3)
                return self.qkv(windows), self.qkv(pooled)[..., self.dim:]
        pooled = self.pool.weight @ windows + self.pool.bias  # B, windows, 1, dim
        bias: Optional[torch.Tensor] = self.qkv.bias
        if bias is not None:
            bias = bias[self.dim:]
        return self.qkv(windows), F.linear(pooled, self.qkv.weight[self.dim:], bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        w = self.window_size[0]
        qkv, pooled = self._project(x)
        dropout_p = self.attn_drop_rate if self.training else 0.
        x = attend_windows(
            qkv,
            pooled,
            self._bias(merged=dropout_p == 0.),  # dropout falls on each of two equal keys
            self.steps,
            self.places,
            self.bounded,
            (H + w - 1) // w,
            (W + w - 1) // w,
            dropout_p,
            self.fused_attn,
        )
        x = self.proj_drop(self.proj(x))
        return merge_windows(x, w, H, W)
