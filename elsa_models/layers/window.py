"""Swin's window-attention block for maps whose size is known only when they come."""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse


class WindowBlock(SwinTransformerBlock):
    """timm's `SwinTransformerBlock`, which with `dynamic_mask` treats every map as a block built for its size would.

    timm keeps the shift of the size that it was built for: at 224 pixels the last stage of Swin is one window, so
    its blocks would not shift on larger maps either. The mask comes from comparisons alone, which export takes.
    """

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        window_h, window_w = self.window_size
        pad_h, pad_w = (window_h - H % window_h) % window_h, (window_w - W % window_w) % window_w
        shift_h, shift_w = self.shift_size
        symbolic = False  # a shift that must not be branched on
        if self.dynamic_mask:
            shift_h, shift_w = self._dynamic_shift(H, W)
            if not torch.jit.is_scripting():
                symbolic = isinstance(shift_h, torch.SymInt) or isinstance(shift_w, torch.SymInt)
        shifted = symbolic or shift_h > 0 or shift_w > 0
        mask: Optional[torch.Tensor] = None
        if not self.dynamic_mask:
            mask = self.attn_mask
        elif shifted:
            mask = self._make_mask(H + pad_h, W + pad_w, shift_h, shift_w, x.dtype, x.device)

        if shifted:
            x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        windows = window_partition(x, self.window_size).view(-1, self.window_area, C)
        windows = self.attn(windows, mask=mask)
        windows = windows.view(-1, window_h, window_w, C)
        x = window_reverse(windows, self.window_size, H + pad_h, W + pad_w)[:, :H, :W, :].contiguous()
        if shifted:
            x = torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2))
        return x

    def _dynamic_shift(self, H: int, W: int) -> Tuple[int, int]:
        if self.always_partition:
            return self.shift_size
        window_h, window_w = self.window_size
        if self.target_shift_size[0] == 0 and self.target_shift_size[1] == 0:
            return 0, 0
        # half a window, or none where one window covers the map
        count_h, count_w = (H - 1) // window_h, (W - 1) // window_w
        if torch.jit.is_scripting():
            return window_h // 2 * min(count_h, 1), window_w // 2 * min(count_w, 1)
        return window_h // 2 * torch.sym_min(count_h, 1), window_w // 2 * torch.sym_min(count_w, 1)

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
