"""Patch embedding for images of any size."""
import math
from typing import Optional, Tuple, Union

import torch
from timm.layers import Format, PatchEmbed, to_2tuple


class PaddedPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed`, whose grid counts the patches that padding completes.

    Images whose sides the patch size does not divide are padded with zeros on the right and at the bottom. timm pads
    as well (`dynamic_img_pad`), but still takes the grid of a fixed image size by rounding down.
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
        img_size = to_2tuple(img_size)
        if len(img_size) != 2 or min(img_size) < 1:
            raise ValueError(f'img_size: got {img_size}, must be one or two positive numbers of pixels.')
        grid_size = tuple([math.ceil(s / p) for s, p in zip(img_size, self.patch_size)])
        return tuple(img_size), grid_size, grid_size[0] * grid_size[1]
