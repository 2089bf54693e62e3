"""Swin's attention within windows, for maps whose size may be known only when they come.

Paper: `Swin Transformer: Hierarchical Vision Transformer using Shifted Windows` - https://arxiv.org/abs/2103.14030
"""
from typing import Optional, Tuple, Union, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table, trunc_normal_, use_fused_attn
from timm.models.swin_transformer import get_relative_position_index

from ..arguments import check_map, pair
from ..sizes import pad_map, sizes_are_open
from .mixer import Mixer

# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('check_map')
torch.fx.wrap('pad_map')


def pixels_by_window(
        H: int,
        W: int,
        window_h: int,
        window_w: int,
        device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Row and column (H * W) of each pixel of a map of whole windows, window by window."""
    area, across = window_h * window_w, W // window_w
    places = torch.arange(H * W, device=device)
    window, pixel = places // area, places % area
    window_row = window // across  # no remainder by a size, which does not export to ONNX
    window_column = window - window_row * across
    return window_row * window_h + pixel // window_w, window_column * window_w + pixel % window_w


def window_places(
        rows: torch.Tensor,
        columns: torch.Tensor,
        W: int,
        window_h: int,
        window_w: int,
) -> torch.Tensor:
    """The inverse: where pixels are among those of all windows, in maps of width W; the last may be cut short."""
    window = rows // window_h * ((W + window_w - 1) // window_w) + columns // window_w
    return window * (window_h * window_w) + rows % window_h * window_w + columns % window_w


def rows_and_columns(H: int, W: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Row and column (H * W) of each pixel of a map."""
    pixels = torch.arange(H * W, device=device)
    rows = pixels // W
    return rows, pixels - rows * W


class WindowMixer(Mixer):
    """What all mixers within windows share: cutting maps into windows, of which every other block's are shifted.

    The window is cut to a map that is smaller than it, and a side that one window covers is not shifted. With `dynamic`
    that is decided for every map anew, where timm keeps the shift of the size that it was built for: at 224 pixels the
    last stage of Swin is one window, so its blocks would not shift on larger maps either. The mask comes from
    comparisons alone, which export takes.

    Maps that windows do not divide are shifted and then padded, as timm does. With `pad_before_shift` they are padded
    and then shifted, as the detection code of Swin's and ELSA's authors does: the padding lies elsewhere, so pixels
    meet in other windows, and the mask, which is made for the padded map, is exact.

    Of a map that one window covers on one side alone, such as 7 x 14 pixels of the last stage at 224 x 448, the other
    side is shifted, as timm does. Without `shift_each_side` it is not, as in the classification code of the authors.
    """

    def __init__(
            self,
            feat_size: Tuple[int, int],
            window_size: Union[int, Tuple[int, int]] = 7,
            shift: bool = False,
            always_partition: bool = False,
            pad_before_shift: bool = False,
            shift_each_side: bool = True,
            dynamic: bool = False,
    ) -> None:
        """
        Args:
            feat_size: Height and width of the map.
            window_size: Height and width of the windows, at most those of the map.
            shift: Shift the windows by half their size.
            always_partition: Neither cut the window to the map nor leave out the shift.
            pad_before_shift: Pad first, then shift.
            shift_each_side: Shift along every side that one window does not cover; otherwise only where one covers
                neither side.
            dynamic: Take maps of any size.
        """
        super().__init__()
        self.shift = shift
        self.always_partition = always_partition
        self.pad_before_shift = pad_before_shift
        self.shift_each_side = shift_each_side
        self.dynamic = dynamic
        self._set_window(feat_size, pair('window_size', window_size))
        self.register_buffer('relative_position_index', None, persistent=False)
        self.register_buffer('attn_mask', None, persistent=False)

    def _set_window(self, feat_size: Tuple[int, int], window_size: Tuple[int, int]) -> None:
        H, W = feat_size
        window_h, window_w = window_size
        shift_h, shift_w = (window_h // 2, window_w // 2) if self.shift else (0, 0)
        if not self.always_partition:
            covered_h, covered_w = H <= window_h, W <= window_w
            if not self.shift_each_side:
                covered_h = covered_w = covered_h or covered_w
            shift_h, shift_w = 0 if covered_h else shift_h, 0 if covered_w else shift_w
            window_h, window_w = min(H, window_h), min(W, window_w)
        self.feat_size, self.window_size, self.shift_size = (H, W), (window_h, window_w), (shift_h, shift_w)
        self.window_area = window_h * window_w

    def _init_buffers(self, dtype: torch.dtype, device: torch.device) -> None:
        self.relative_position_index = get_relative_position_index(*self.window_size, device=device)
        self.attn_mask = None
        if not self.dynamic and any(self.shift_size):
            padded_h, padded_w = self._padded(*self.feat_size)
            self.attn_mask = self._make_mask(padded_h, padded_w, *self.shift_size, dtype, device)

    def _resize_windows(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]],
            always_partition: Optional[bool],
    ) -> Optional[Tuple[int, int]]:
        """Take another size of map and windows; the former windows, or None where they have not changed."""
        if always_partition is not None:
            self.always_partition = always_partition
        old_size = self.window_size
        self._set_window(feat_size, old_size if window_size is None else window_size)
        return old_size if self.window_size != old_size else None

    def _resize_table(self, table: nn.Parameter, old_size: Tuple[int, int]) -> nn.Parameter:
        """A table (offsets, n) of windows of `old_size`, resampled to the windows there are now."""
        window_h, window_w = self.window_size
        with torch.no_grad():
            resized = resize_rel_pos_bias_table(
                table,
                new_window_size=self.window_size,
                new_bias_shape=((2 * window_h - 1) * (2 * window_w - 1), table.shape[1]),
                old_window_size=old_size,
            )
        return nn.Parameter(resized, requires_grad=table.requires_grad)

    def _padded(self, H: int, W: int) -> Tuple[int, int]:
        """Height and width in whole windows."""
        window_h, window_w = self.window_size
        return (H + window_h - 1) // window_h * window_h, (W + window_w - 1) // window_w * window_w

    def _partition(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor], int, int]:
        """Shift maps (B, H, W, C) and cut them into windows (windows, area, C); also their mask, and the shifts."""
        B, H, W, C = x.shape
        padded_h, padded_w = self._padded(H, W)
        shift_h, shift_w = self.shift_size
        shifted = shift_h > 0 or shift_w > 0
        mask: Optional[torch.Tensor] = None
        if self.dynamic:
            shift_h, shift_w, shifted = self._dynamic_shift(H, W)
            if shifted:
                mask = self._make_mask(padded_h, padded_w, shift_h, shift_w, x.dtype, x.device)
        else:
            mask = self.attn_mask
        if self.dynamic and sizes_are_open():
            x = pad_map(x, padded_h, padded_w)
            if self.pad_before_shift:
                H, W = padded_h, padded_w
            return self._gather_windows(x, H, W, shift_h, shift_w), mask, shift_h, shift_w

        if self.pad_before_shift:
            x = pad_map(x, padded_h, padded_w)
        if shifted:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
        x = pad_map(x, padded_h, padded_w)
        window_h, window_w = self.window_size
        rows, columns = padded_h // window_h, padded_w // window_w
        x = x.view(B, rows, window_h, columns, window_w, C).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(B * rows * columns, self.window_area, C), mask, shift_h, shift_w

    def _merge(self, windows: torch.Tensor, B: int, H: int, W: int, shift_h: int, shift_w: int) -> torch.Tensor:
        """The inverse of `_partition`: maps (B, H, W, C) from windows (windows, area, C)."""
        padded_h, padded_w = self._padded(H, W)
        period_h, period_w = (padded_h, padded_w) if self.pad_before_shift else (H, W)  # of the cyclic shift
        if self.dynamic and sizes_are_open():
            return self._gather_map(windows, B, H, W, period_h, period_w, shift_h, shift_w)

        window_h, window_w = self.window_size
        C = windows.shape[2]
        x = windows.view(B, padded_h // window_h, padded_w // window_w, window_h, window_w, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, padded_h, padded_w, C)
        x = x[:, :period_h, :period_w, :].contiguous()
        if shift_h > 0 or shift_w > 0:
            x = torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2))
        return x[:, :H, :W, :].contiguous() if self.pad_before_shift else x

    # Where sizes are open, views and crops would compile anew for maps of one row or column of windows, and for those
    # that need no padding. Gathering serves all. Remainders by a size do not export to ONNX.

    def _gather_windows(self, x: torch.Tensor, H: int, W: int, shift_h: int, shift_w: int) -> torch.Tensor:
        """Shift the first (H, W) pixels of padded maps (B, H', W', C) and cut these into (windows, area, C)."""
        window_h, window_w = self.window_size
        rows, columns = pixels_by_window(x.shape[1], x.shape[2], window_h, window_w, x.device)
        rows = torch.where(rows < H, _wrapped(rows + shift_h, H), rows)
        columns = torch.where(columns < W, _wrapped(columns + shift_w, W), columns)
        x = x.flatten(1, 2).index_select(1, rows * x.shape[2] + columns)
        return x.view(-1, self.window_area, x.shape[2])

    def _gather_map(
            self,
            windows: torch.Tensor,
            B: int,
            H: int,
            W: int,
            period_h: int,
            period_w: int,
            shift_h: int,
            shift_w: int,
    ) -> torch.Tensor:
        """The inverse of `_gather_windows`, without padding: (B, H, W, C); the shift wraps at the periods."""
        window_h, window_w = self.window_size
        rows, columns = rows_and_columns(H, W, windows.device)
        rows = _wrapped(rows + (period_h - shift_h), period_h)
        columns = _wrapped(columns + (period_w - shift_w), period_w)
        place = window_places(rows, columns, W, window_h, window_w)
        C = windows.shape[2]
        return windows.reshape(B, -1, C).index_select(1, place).view(B, H, W, C)

    def _dynamic_shift(self, H: int, W: int) -> Tuple[int, int, bool]:
        """Shifts of a map, and whether there may be any: where they are symbolic, that must not be branched on."""
        if self.always_partition or not self.shift:
            shift_h, shift_w = self.shift_size
            return shift_h, shift_w, shift_h > 0 or shift_w > 0
        # half a window, or none where one window covers the map
        window_h, window_w = self.window_size
        further_h, further_w = (H - 1) // window_h, (W - 1) // window_w
        if sizes_are_open():
            further_h, further_w = _at_most_one(further_h), _at_most_one(further_w)
        else:
            further_h, further_w = min(further_h, 1), min(further_w, 1)
        if not self.shift_each_side:
            further_h = further_w = further_h * further_w
        shift_h, shift_w = window_h // 2 * further_h, window_w // 2 * further_w
        return shift_h, shift_w, sizes_are_open() or shift_h > 0 or shift_w > 0

    def _make_mask(
            self,
            H: int,
            W: int,
            shift_h: int,
            shift_w: int,
            dtype: torch.dtype,
            device: torch.device,
    ) -> torch.Tensor:
        """Bias (windows, area, area) that keeps pixels apart which only the cyclic shift has brought together."""
        window_h, window_w = self.window_size
        rows, columns = pixels_by_window(H, W, window_h, window_w, device)
        region_h = (rows >= H - window_h).int() + (rows >= H - shift_h).int()
        region_w = (columns >= W - window_w).int() + (columns >= W - shift_w).int()
        region = (3 * region_h + region_w).view(-1, self.window_area)
        return (region[:, None, :] != region[:, :, None]).to(dtype) * -100.


class WindowAttention(WindowMixer):
    """Swin's attention within windows, with a bias for each relative position. See `WindowMixer`."""
    fused_attn: torch.jit.Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int,
            feat_size: Tuple[int, int],
            window_size: Union[int, Tuple[int, int]] = 7,
            shift: bool = False,
            always_partition: bool = False,
            pad_before_shift: bool = False,
            shift_each_side: bool = True,
            dynamic: bool = False,
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
            feat_size: Height and width of the map.
            window_size: Height and width of the windows, at most those of the map.
            shift: Shift the windows by half their size.
            always_partition: Neither cut the window to the map nor leave out the shift.
            pad_before_shift: Pad first, then shift.
            shift_each_side: Shift along every side that one window does not cover; otherwise only where one covers
                neither side.
            dynamic: Take maps of any size.
            qkv_bias: Add a bias to query, key and value.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: num_heads does not divide dim.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(feat_size, window_size, shift, always_partition, pad_before_shift, shift_each_side, dynamic)
        if dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {dim} channels.')
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim ** -0.5
        self.fused_attn = use_fused_attn(experimental=True)

        window_h, window_w = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window_h - 1) * (2 * window_w - 1), num_heads, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the position table and the buffers."""
        trunc_normal_(self.relative_position_bias_table, std=.02)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds. timm calls this after `to_empty()`."""
        table = self.relative_position_bias_table
        self._init_buffers(table.dtype, table.device)

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Change the size of map and windows; the position table is resampled to new windows.

        Args:
            feat_size: Height and width of the map.
            window_size: Height and width of the windows, None leaves them.
            always_partition: As in the constructor, None leaves it.
        """
        old_size = self._resize_windows(feat_size, window_size, always_partition)
        if old_size is not None:
            self.relative_position_bias_table = self._resize_table(self.relative_position_bias_table, old_size)
        self.init_non_persistent_buffers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        windows, mask, shift_h, shift_w = self._partition(x)
        q, k, v = self._project(windows)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self._bias(q, mask), dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            x = self.attn_drop(self._weights(q, k, mask)) @ v
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return self._merge(x, B, H, W, shift_h, shift_w)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights (B, H, W, num_heads, window area) of each pixel over those of its window."""
        B, H, W, C = x.shape
        windows, mask, shift_h, shift_w = self._partition(x)
        q, k, _ = self._project(windows)
        weights = self._weights(q, k, mask).transpose(1, 2).flatten(2)
        return self._merge(weights, B, H, W, shift_h, shift_w).unflatten(-1, (self.num_heads, self.window_area))

    def _project(self, windows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value (windows, heads, area, channels) of windows (windows, area, dim)."""
        n, area, _ = windows.shape
        qkv = self.qkv(windows).reshape(n, area, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def _position_bias(self) -> torch.Tensor:
        index = self.relative_position_index.view(-1)
        bias = self.relative_position_bias_table[index].view(self.window_area, self.window_area, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)  # 1, heads, area, area

    def _bias(self, q: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Summand of the logits of all windows at once, as fused attention takes it."""
        bias = self._position_bias()
        if mask is not None:
            bias = bias + mask.unsqueeze(1)  # windows of a map, heads, area, area
            bias = bias.repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
        return bias

    def _weights(self, q: torch.Tensor, k: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Attention weights (windows, heads, area, area)."""
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self._position_bias()
        if mask is not None:
            attn = attn.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.flatten(0, 1)
        return attn.softmax(dim=-1)


@torch.jit.unused
def _wrapped(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places on a circle of `size`, of which none is further than one round away."""
    return torch.where(places < size, places, places - size)


@torch.jit.unused
def _at_most_one(size: int) -> int:
    # torch.jit.trace has tensors for sizes
    return size.clamp(max=1) if isinstance(size, torch.Tensor) else cast(int, torch.sym_min(size, 1))
