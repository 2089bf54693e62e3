"""Swin's window-attention block for maps whose size is known only when they come."""
from typing import Optional, Tuple

import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse

from .patch import pad_map, sizes_are_open

torch.fx.wrap('pad_map')


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

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        window_h, window_w = self.window_size
        padded_h, padded_w = (H + window_h - 1) // window_h * window_h, (W + window_w - 1) // window_w * window_w
        shift_h, shift_w = self.shift_size
        shifted = shift_h > 0 or shift_w > 0
        mask: Optional[torch.Tensor] = None
        if self.dynamic_mask:
            shift_h, shift_w, shifted = self._dynamic_shift(H, W)
            if shifted:
                mask = self._make_mask(padded_h, padded_w, shift_h, shift_w, x.dtype, x.device)
        else:
            mask = self.attn_mask

        period_h, period_w = H, W  # of the cyclic shift
        if self.pad_before_shift:
            x = pad_map(x, padded_h, padded_w)
            period_h, period_w = padded_h, padded_w
        if shifted:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
        x = pad_map(x, padded_h, padded_w)
        windows = window_partition(x, self.window_size).view(-1, self.window_area, C)
        windows = self.attn(windows, mask=mask)
        windows = windows.view(-1, window_h, window_w, C)
        x = window_reverse(windows, self.window_size, padded_h, padded_w)
        return self._uncover(x, H, W, period_h, period_w, shift_h, shift_w)

    def _uncover(
            self,
            x: torch.Tensor,
            H: int,
            W: int,
            period_h: int,
            period_w: int,
            shift_h: int,
            shift_w: int,
    ) -> torch.Tensor:
        """Take padding and shift off a map; its first period_h x period_w pixels were shifted."""
        if not torch.jit.is_scripting():
            if self.dynamic_mask and sizes_are_open():
                # a crop is a view, and compiles anew for maps on which it is contiguous
                rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
                return x.index_select(1, (rows - shift_h) % period_h).index_select(
                    2, (columns - shift_w) % period_w)
        if shift_h > 0 or shift_w > 0:
            x = torch.roll(x[:, :period_h, :period_w, :], shifts=(shift_h, shift_w), dims=(1, 2))
        return x[:, :H, :W, :].contiguous()

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
        rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
        region_h = (rows >= H - self.window_size[0]).int() + (rows >= H - shift_h).int()
        region_w = (columns >= W - self.window_size[1]).int() + (columns >= W - shift_w).int()
        region = (3 * region_h[:, None] + region_w[None, :]).view(1, H, W, 1)
        region = window_partition(region, self.window_size).view(-1, self.window_area)
        return (region[:, None, :] != region[:, :, None]).to(dtype) * -100.


@torch.jit.unused
def _at_most_one(size: int) -> int:
    # torch.jit.trace has tensors for sizes
    return size.clamp(max=1) if isinstance(size, torch.Tensor) else torch.sym_min(size, 1)
