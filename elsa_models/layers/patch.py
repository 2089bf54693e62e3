"""Patch embedding and merging for maps of any size, padded on the right and at the bottom.

Sizes are computed by rounding a quotient up, never by a remainder: where they are symbolic (torch.compile, export),
a chain of remainders through the stages takes minutes to simplify.
"""
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed, is_exporting, nchw_to, resample_abs_pos_embed_nhwc
from timm.models.swin_transformer import PatchMerging

from .arguments import check_images, pair


@torch.jit.unused
def sizes_are_open() -> bool:
    """Whether sizes are symbols of a graph in the making, whose values must not decide what the graph does."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def pad_map(x: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Pad maps (B, h, w, C) with zeros to (B, H, W, C)."""
    extra_h, extra_w = H - x.shape[1], W - x.shape[2]
    if torch.jit.is_scripting() or not sizes_are_open():
        if extra_h == 0 and extra_w == 0:
            return x  # F.pad would copy
    return F.pad(x, (0, 0, 0, extra_w, 0, extra_h))


def _cubic_weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    # new_size, size: the weights of torch's antialiased bicubic interpolation, Keys' kernel with a = -1/2
    step = size / torch.scalar_tensor(new_size, dtype=torch.float32, device=device)
    centers = (torch.arange(new_size, device=device) + .5) * step
    x = ((torch.arange(size, device=device) + .5 - centers[:, None]) / step.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def resample_positions(positions: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Resize a position embedding (1, h, w, C) to (1, H, W, C) as timm does.

    Exported, it is a product with the interpolation's weights on either side: of an antialiased bicubic Resize,
    OpenVINO makes something else, and most other runtimes nothing.
    """
    if not torch.jit.is_scripting():
        if is_exporting():
            rows = _cubic_weights(positions.shape[1], H, positions.device)
            columns = _cubic_weights(positions.shape[2], W, positions.device)
            x = (rows @ positions[0].float().flatten(1)).unflatten(1, (positions.shape[2], positions.shape[3]))
            return (columns @ x).to(positions.dtype).unsqueeze(0)  # columns, for each row
    return resample_abs_pos_embed_nhwc(positions, [H, W])


torch.fx.wrap('resample_positions')
torch.fx.wrap('pad_map')
torch.fx.wrap('check_images')


class PaddedPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed`, whose grid counts the patches that padding completes.

    timm pads as well (`dynamic_img_pad`), but takes the grid of a fixed image size by rounding down.
    """
    output_fmt: Format  # TorchScript reads the annotations of this class alone
    dynamic_img_pad: torch.jit.Final[bool]

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, dynamic_img_pad=True, **kwargs)

    def _init_img_size(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]],
    ) -> Tuple[Optional[Tuple[int, int]], Optional[Tuple[int, int]], Optional[int]]:
        if img_size is None:
            return None, None, None
        img_size = pair('img_size', img_size)
        grid_size = tuple([(s + p - 1) // p for s, p in zip(img_size, self.patch_size)])
        return img_size, grid_size, grid_size[0] * grid_size[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, ceil(H / patch), ceil(W / patch), embed_dim)."""
        check_images(x)
        B, C, H, W = x.shape
        if self.img_size is not None and self.strict_img_size:
            check_size(H, W, self.img_size[0], self.img_size[1])
        patch_h, patch_w = self.patch_size
        grid_h, grid_w = (H + patch_h - 1) // patch_h, (W + patch_w - 1) // patch_w
        x = pad_map(x.permute(0, 2, 3, 1), grid_h * patch_h, grid_w * patch_w).permute(0, 3, 1, 2)
        x = nchw_to(self.proj(x), self.output_fmt)
        return self.norm(x)


def check_size(H: int, W: int, expected_H: int, expected_W: int) -> None:
    """Require images of the model's size.

    Raises:
        ValueError: They are of another.
    """
    if torch.jit.is_scripting() or not torch.jit.is_tracing():
        if H != expected_H or W != expected_W:
            raise ValueError(
                f'input: got {H} x {W} pixels, must be {expected_H} x {expected_W}. set_input_size() changes the size, '
                f'a model created with dynamic_img_size=True takes any.')


torch.fx.wrap('check_size')


class PaddedPatchMerging(PatchMerging):
    """timm's `PatchMerging`, with sizes as said above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        B, H, W, C = x.shape
        half_h, half_w = (H + 1) // 2, (W + 1) // 2
        x = pad_map(x, half_h * 2, half_w * 2)
        x = x.reshape(B, half_h, 2, half_w, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)  # column before row
        return self.reduction(self.norm(x))
