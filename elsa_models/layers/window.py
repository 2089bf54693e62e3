"""Swin's window-attention block for maps whose size is known only when they come."""
from typing import Optional, Tuple

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse

from .patch import pad_map, sizes_are_open


def _without_empty(x: torch.Tensor) -> torch.Tensor:
    """Maps (B, H, W, C), or one of zeros in place of none, on which timm's attention fails."""
    if torch.jit.is_scripting() or not sizes_are_open():
        if x.shape[0] == 0:
            return torch.cat([x, x.new_zeros([1, x.shape[1], x.shape[2], x.shape[3]])])  # on the way of gradients
    return x


def _first(x: torch.Tensor, B: int) -> torch.Tensor:
    """The first B maps."""
    if torch.jit.is_scripting() or not sizes_are_open():
        if x.shape[0] != B:
            return x[:B]
    return x


# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('pad_map')
torch.fx.wrap('_without_empty')
torch.fx.wrap('_first')


class WindowBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock`, which with `dynamic_mask` treats every map as a block built for its size would.

    timm keeps the shift of the size that it was built for: at 224 pixels the last stage of Swin is one window, so
    its blocks would not shift on larger maps either. The mask comes from comparisons alone, which export takes.

    Maps that windows do not divide are shifted and then padded, as timm does. With `pad_before_shift` they are padded
    and then shifted, as the detection code of Swin's and ELSA's authors does: the padding lies elsewhere, so pixels
    meet in other windows, and the mask, which is made for the padded map, is exact.
    """

    def __init__(self, *args, pad_before_shift: bool = False, **kwargs) -> None:
        """
        Args:
            *args: Of timm's block.
            pad_before_shift: Pad first, then shift.
            **kwargs: Of timm's block.
        """
        super().__init__(*args, **kwargs)
        self.pad_before_shift = pad_before_shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim)."""
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        x = _without_empty(x)
        window_h, window_w = self.window_size
        padded_h, padded_w = (H + window_h - 1) // window_h * window_h, (W + window_w - 1) // window_w * window_w
        period_h, period_w = (padded_h, padded_w) if self.pad_before_shift else (H, W)  # of the cyclic shift
        shift_h, shift_w = self.shift_size
        shifted = shift_h > 0 or shift_w > 0
        mask: Optional[torch.Tensor] = None
        if self.dynamic_mask:
            shift_h, shift_w, shifted = self._dynamic_shift(H, W)
            if shifted:
                mask = self._make_mask(padded_h, padded_w, shift_h, shift_w, x.dtype, x.device)
        else:
            mask = self.attn_mask
        if not torch.jit.is_scripting():
            if self.dynamic_mask and sizes_are_open():
                x = pad_map(x, padded_h, padded_w)
                windows = self._gather_windows(x, period_h, period_w, shift_h, shift_w)
                windows = self.attn(windows, mask=mask)
                return self._gather_map(windows, B, H, W, period_h, period_w, shift_h, shift_w)

        if self.pad_before_shift:
            x = pad_map(x, padded_h, padded_w)
        if shifted:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
        x = pad_map(x, padded_h, padded_w)
        windows = window_partition(x, self.window_size).view(-1, self.window_area, C)
        windows = self.attn(windows, mask=mask)
        windows = windows.view(-1, window_h, window_w, C)
        x = window_reverse(windows, self.window_size, padded_h, padded_w)
        x = x[:, :period_h, :period_w, :].contiguous()
        if shifted:
            x = torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2))
        if self.pad_before_shift:
            x = x[:, :H, :W, :].contiguous()
        return _first(x, B)

    # Where sizes are open, views and crops would compile anew for maps of one row or column of windows, and for those
    # that need no padding. Gathering serves all. Remainders by a size do not export to ONNX.

    def _gather_windows(self, x: torch.Tensor, H: int, W: int, shift_h: int, shift_w: int) -> torch.Tensor:
        """Shift the first (H, W) pixels of padded maps (B, H', W', C) and cut these into (windows, area, C)."""
        rows, columns = self._pixels_by_window(x.shape[1], x.shape[2], x.device)
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
        pixels = torch.arange(H * W, device=windows.device)
        rows = pixels // W
        columns = pixels - rows * W
        rows = _wrapped(rows + (period_h - shift_h), period_h)
        columns = _wrapped(columns + (period_w - shift_w), period_w)
        window = rows // window_h * ((W + window_w - 1) // window_w) + columns // window_w
        place = window * self.window_area + rows % window_h * window_w + columns % window_w
        C = windows.shape[2]
        return windows.reshape(B, -1, C).index_select(1, place).view(B, H, W, C)

    def _pixels_by_window(self, H: int, W: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
        """Row and column (H * W) of each pixel of a map of whole windows, window by window."""
        window_h, window_w = self.window_size
        places = torch.arange(H * W, device=device)
        window, pixel, across = places // self.window_area, places % self.window_area, W // window_w
        window_row = window // across
        window_column = window - window_row * across
        return window_row * window_h + pixel // window_w, window_column * window_w + pixel % window_w

    def _dynamic_shift(self, H: int, W: int) -> Tuple[int, int, bool]:
        """Shifts of a map, and whether there may be any: where they are symbolic, that must not be branched on."""
        target_h, target_w = self.target_shift_size
        if self.always_partition or (target_h == 0 and target_w == 0):
            shift_h, shift_w = self.shift_size
            return shift_h, shift_w, shift_h > 0 or shift_w > 0
        # half a window, or none where one window covers the map
        window_h, window_w = self.window_size
        further_h, further_w = (H - 1) // window_h, (W - 1) // window_w
        if not torch.jit.is_scripting():
            if sizes_are_open():
                return window_h // 2 * _at_most_one(further_h), window_w // 2 * _at_most_one(further_w), True
        shift_h, shift_w = window_h // 2 * min(further_h, 1), window_w // 2 * min(further_w, 1)
        return shift_h, shift_w, shift_h > 0 or shift_w > 0

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
        rows, columns = self._pixels_by_window(H, W, device)
        region_h = (rows >= H - self.window_size[0]).int() + (rows >= H - shift_h).int()
        region_w = (columns >= W - self.window_size[1]).int() + (columns >= W - shift_w).int()
        region = (3 * region_h + region_w).view(-1, self.window_area)
        return (region[:, None, :] != region[:, :, None]).to(dtype) * -100.


@torch.jit.unused
def _wrapped(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places on a circle of `size`, of which none is further than one round away."""
    return torch.where(places < size, places, places - size)


@torch.jit.unused
def _at_most_one(size: int) -> int:
    # torch.jit.trace has tensors for sizes
    return size.clamp(max=1) if isinstance(size, torch.Tensor) else torch.sym_min(size, 1)
