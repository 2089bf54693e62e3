"""Patch embeddings and downsampling for maps of any size, padded on the right and at the bottom."""
import math
from typing import Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import Format, PatchEmbed, nchw_to, resample_patch_embed, to_2tuple
from timm.models import volo
from timm.models.swin_transformer import PatchMerging

from .arguments import check_images, pair, whole_number
from .sizes import check_size, pad_map, sizes_are_open

_int_or_pair = Union[int, Tuple[int, int]]

_CONV_STEM_PATCHES = (4, 8, 16)  # sizes that VOLO's stem has


def _check_token(H: int, W: int, min_size: int) -> None:
    """Require images of at least min_size pixels a side."""
    if not sizes_are_open() and (H < min_size or W < min_size):
        raise ValueError(f'input: got {H} x {W} pixels, must be at least {min_size} x {min_size}, one token.')


# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('_check_token')
torch.fx.wrap('check_images')
torch.fx.wrap('check_size')
torch.fx.wrap('pad_map')


class PaddedPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed`, whose grid counts the patches that padding completes.

    timm pads as well (`dynamic_img_pad`), but takes the grid of a fixed image size by rounding down.
    """
    output_fmt: Format  # TorchScript reads the annotations of this class alone

    def __init__(
            self,
            img_size: Optional[_int_or_pair] = 224,
            patch_size: int = 16,
            **kwargs,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels, None takes any.
            patch_size: Side of a patch in pixels.
            **kwargs: Others of timm's `PatchEmbed`.
        """
        super().__init__(img_size, patch_size, dynamic_img_pad=True, **kwargs)

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
        check_images(x, getattr(self.proj, 'in_channels', None))
        B, C, H, W = x.shape
        if self.img_size is not None and self.strict_img_size:
            check_size(H, W, self.img_size[0], self.img_size[1])
        patch_h, patch_w = self.patch_size
        grid_h, grid_w = (H + patch_h - 1) // patch_h, (W + patch_w - 1) // patch_w
        x = pad_map(x.permute(0, 2, 3, 1), grid_h * patch_h, grid_w * patch_w).permute(0, 3, 1, 2)
        x = nchw_to(self.proj(x), self.output_fmt)
        return self.norm(x)


class PaddedPatchMerging(PatchMerging):
    """timm's `PatchMerging`, with sizes as `sizes` wants them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        B, H, W, C = x.shape
        half_h, half_w = (H + 1) // 2, (W + 1) // 2
        x = pad_map(x, half_h * 2, half_w * 2)
        x = x.reshape(B, half_h, 2, half_w, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)  # column before row
        return self.reduction(self.norm(x))


class PaddedConvStem(volo.PatchEmbed):
    """VOLO's patch embedding for images of any size.

    Images whose sides the patch size does not divide are padded with zeros on the right and at the bottom.
    """

    def __init__(
            self,
            img_size: _int_or_pair,
            patch_size: int = 8,
            in_chans: int = 3,
            hidden_dim: int = 64,
            embed_dim: int = 192,
            strict_img_size: bool = True,
            token_stride: int = 2,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels.
            patch_size: Patch size in pixels, 4, 8 or 16.
            in_chans: Number of image channels.
            hidden_dim: Channels of the convolutions before the projection.
            embed_dim: Channels of the output.
            strict_img_size: Require the input to match img_size.
            token_stride: Patches per side of a token of the last stage; the input must cover one token.

        Raises:
            ValueError: patch_size is none of the three, or img_size is smaller than a token.
        """
        dd = {'device': device, 'dtype': dtype}
        img_size, patch_size = self._check_sizes(img_size, patch_size, token_stride)
        super().__init__(
            stem_conv=True,
            stem_stride=2,
            patch_size=patch_size,
            in_chans=in_chans,
            hidden_dim=hidden_dim,
            embed_dim=embed_dim,
            **dd,
        )
        self.in_chans = in_chans
        self.strict_img_size = strict_img_size
        self.token_stride = token_stride
        self._set_size(img_size, patch_size)

    @staticmethod
    def _check_sizes(img_size: _int_or_pair, patch_size: int, token_stride: int) -> Tuple[Tuple[int, int], int]:
        patch_size = whole_number('patch_size', patch_size)
        if patch_size not in _CONV_STEM_PATCHES:
            raise ValueError(f'patch_size: got {patch_size}, must be one of {_CONV_STEM_PATCHES}.')
        return pair('img_size', img_size, patch_size * token_stride), patch_size  # at least one token

    def _set_size(self, img_size: Tuple[int, int], patch_size: int) -> None:
        self.img_size = img_size
        self.patch_size = patch_size
        self.min_size = patch_size * self.token_stride
        self.grid_size = tuple([math.ceil(s / patch_size) for s in img_size])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def set_input_size(self, img_size: Optional[_int_or_pair] = None, patch_size: Optional[int] = None) -> None:
        """Change the size of image or patches; the projection is resampled to new patches.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.

        Raises:
            ValueError: A size is not as in the constructor; nothing has changed then.
        """
        img_size, patch_size = self._check_sizes(
            self.img_size if img_size is None else img_size,
            self.patch_size if patch_size is None else patch_size,
            self.token_stride,
        )
        if patch_size != self.patch_size:
            kernel_size = to_2tuple(patch_size // 2)
            weight = self.proj.weight
            with torch.no_grad():
                resampled = resample_patch_embed(weight, list(kernel_size))
            self.proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = kernel_size
        self._set_size(img_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, ceil(H / patch_size), ceil(W / patch_size), embed_dim)."""
        check_images(x, self.in_chans)
        B, C, H, W = x.shape
        if self.strict_img_size:
            check_size(H, W, self.img_size[0], self.img_size[1])
        _check_token(H, W, self.min_size)
        p = self.patch_size
        x = pad_map(x.permute(0, 2, 3, 1), (H + p - 1) // p * p, (W + p - 1) // p * p).permute(0, 3, 1, 2)
        if self.conv is not None:
            x = self.conv(x)
        return self.proj(x).permute(0, 2, 3, 1)


class PaddedDownsample(volo.Downsample):
    """VOLO's halving of a map, with odd sides padded by a zero on the right or at the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), C')."""
        B, H, W, C = x.shape
        x = pad_map(x, (H + 1) // 2 * 2, (W + 1) // 2 * 2)
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OverlapPatchEmbed(PaddedPatchEmbed):
    """Patch embedding whose convolution sees 2 * patch_size - 1 pixels a side, 7 x 7 for patches of 4."""

    def __init__(
            self,
            img_size: Optional[_int_or_pair] = 224,
            patch_size: int = 4,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels, None takes any.
            patch_size: Side of a patch in pixels.
            **kwargs: Others of timm's `PatchEmbed`.
        """
        super().__init__(img_size, patch_size, device=device, dtype=dtype, **kwargs)
        old = self.proj
        kernel_size = tuple([2 * p - 1 for p in self.patch_size])
        self.proj = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel_size,
            stride=self.patch_size,
            padding=tuple([p // 2 for p in self.patch_size]),
            bias=old.bias is not None,
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[_int_or_pair] = None,
            patch_size: Optional[_int_or_pair] = None,
    ) -> None:
        """Change the size of the image.

        Raises:
            ValueError: The patch size is another: a convolution whose patches overlap is not resampled.
        """
        if patch_size is not None and pair('patch_size', patch_size) != tuple(self.patch_size):
            raise ValueError(
                f'patch_size: got {patch_size}, must be {tuple(self.patch_size)}: overlapping patches have no other.')
        super().set_input_size(img_size=img_size)


def _pad_for_halving(x: torch.Tensor, pad_odd: bool) -> torch.Tensor:
    # (B, H, W, C): to even sides, or else to sides that a 2 x 2 convolution has any output for
    H, W = x.shape[1], x.shape[2]
    if pad_odd:
        return pad_map(x, (H + 1) // 2 * 2, (W + 1) // 2 * 2)
    if not sizes_are_open():
        return pad_map(x, max(H, 2), max(W, 2))
    return x


torch.fx.wrap('_pad_for_halving')


class ConvDownsample(nn.Module):
    """Halving of a map by a convolution with a norm after it, 2 x 2 or, overlapping, 3 x 3.

    2 x 2 convolutions lose the last row or column of maps of odd sides, unless `pad_odd` is on; 3 x 3 ones round up.
    """

    def __init__(
            self,
            dim: int,
            out_dim: int,
            overlap: bool = False,
            pad_odd: bool = False,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of the input.
            out_dim: Channels of the output.
            overlap: Convolve 3 x 3 pixels, not 2 x 2.
            pad_odd: Pad maps of odd sides on the right and at the bottom before 2 x 2 convolutions.
            norm_layer: Normalisation, called with the number of channels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.overlap = overlap
        self.pad_odd = pad_odd
        self.proj = nn.Conv2d(dim, out_dim, 3 if overlap else 2, stride=2, padding=1 if overlap else 0, **dd)
        self.norm = norm_layer(out_dim, **dd)

    @torch.jit.ignore
    def output_size(self, feat_size: Tuple[int, int]) -> Tuple[int, int]:
        """Height and width of the output for those of a map."""
        if self.overlap or self.pad_odd:
            return (feat_size[0] + 1) // 2, (feat_size[1] + 1) // 2
        return max(feat_size[0] // 2, 1), max(feat_size[1] // 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, h, w, out_dim), sides halved."""
        if not self.overlap:
            x = _pad_for_halving(x, self.pad_odd)
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
