"""Local and global window attention side by side, as in the LG-Transformer.

Paper: `Local-to-Global Self-Attention in Vision Transformers` - https://arxiv.org/abs/2107.04735

Its authors released neither code nor weights. This is reconstructed from the abstract and the parameter count: that
several paths of window attention, from local to global, run in parallel in each stage is known; how coarse maps are
made and joined is not, and is an argument here.
"""
from typing import List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..arguments import check_map, pair, whole_number
from .mixer import Mixer
from .window import WindowAttention

POOLS = ('avg', 'max')
UPSAMPLES = ('bilinear', 'nearest')


def pool_map(x: torch.Tensor, ratio: int, pool: str) -> torch.Tensor:
    """Pool maps (B, H, W, C) to (B, ceil(H / ratio), ceil(W / ratio), C); what lies beyond the map does not count."""
    x = x.permute(0, 3, 1, 2)
    if pool == 'max':
        x = F.max_pool2d(x, ratio, ratio, ceil_mode=True)
    else:
        x = F.avg_pool2d(x, ratio, ratio, ceil_mode=True, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def pool_map_to(x: torch.Tensor, size: Tuple[int, int], pool: str) -> torch.Tensor:
    """Pool maps (B, h, w, C) to (B, H, W, C) for the size (H, W), over areas as equal as can be."""
    x = x.permute(0, 3, 1, 2)
    x = F.adaptive_max_pool2d(x, size) if pool == 'max' else F.adaptive_avg_pool2d(x, size)
    return x.permute(0, 2, 3, 1)


def upsample_map(x: torch.Tensor, H: int, W: int, mode: str) -> torch.Tensor:
    """Resize maps (B, h, w, C) to (B, H, W, C)."""
    x = x.permute(0, 3, 1, 2)
    x = F.interpolate(x, [H, W], mode=mode, align_corners=False if mode == 'bilinear' else None)
    return x.permute(0, 2, 3, 1)


# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('check_map')
torch.fx.wrap('upsample_map')


class LocalGlobalAttention(Mixer):
    """A sum of window attentions on the map and on coarser ones, each with projections and position table of its own.

    A path of ratio r pools the map r x r, attends within windows, and resizes the result to the map. With windows of
    one size throughout, coarser paths see further; one whose windows cover its whole map is global. The sum of a
    single path of ratio 1 is Swin's attention.

    Windows keep their size on maps that are smaller, which are padded, and shift along those sides that are larger.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            feat_size: Tuple[int, int],
            ratios: Sequence[int] = (1,),
            window_size: Union[int, Tuple[int, int]] = 7,
            shift: bool = False,
            pool: str = 'avg',
            upsample: str = 'bilinear',
            global_path: bool = False,
            dynamic: bool = False,
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
            feat_size: Height and width of the map.
            ratios: Sides of the map per side of each path's map.
            window_size: Height and width of the windows.
            shift: Shift the windows by half their size.
            pool: How coarse maps are made, 'avg' or 'max'.
            upsample: How they are resized, 'bilinear' or 'nearest'.
            global_path: The last of several paths pools to one window, whatever the size of the map.
            dynamic: Take maps of any size.
            qkv_bias: Add a bias to query, key and value.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is none of those above.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if len(ratios) == 0:
            raise ValueError('ratios: got none, must be one for each path.')
        if pool not in POOLS:
            raise ValueError(f'pool: got {pool!r}, must be one of {POOLS}.')
        if upsample not in UPSAMPLES:
            raise ValueError(f'upsample: got {upsample!r}, must be one of {UPSAMPLES}.')
        self.dim = whole_number('dim', dim)
        self.ratios = tuple([whole_number('ratios', r) for r in ratios])
        self.window_size = pair('window_size', window_size)
        self.pool = pool
        self.upsample = upsample
        self.has_global_path = global_path and len(self.ratios) > 1
        self.paths = nn.ModuleList([
            WindowAttention(
                dim,
                num_heads,
                feat_size=size,
                window_size=self.window_size,
                shift=shift,
                dynamic=dynamic,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop,
                **dd,
            )
            for size in self._path_sizes(feat_size)])
        self.proj_drop = nn.Dropout(proj_drop)

    def _path_sizes(self, feat_size: Tuple[int, int]) -> List[Tuple[int, int]]:
        """Height and width of each path's map, at least a window's: `WindowAttention` cuts windows to its map."""
        (H, W), (window_h, window_w) = feat_size, self.window_size
        sizes = [(max((H + r - 1) // r, window_h), max((W + r - 1) // r, window_w)) for r in self.ratios]
        if self.has_global_path:
            sizes[-1] = self.window_size
        return sizes

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Change the size of map and windows; position tables are resampled to new windows.

        Args:
            feat_size: Height and width of the map.
            window_size: Height and width of the windows, None leaves them.
            always_partition: Must be None: windows shift where they do not cover the map.
        """
        if always_partition is not None:
            raise ValueError(f'always_partition: got {always_partition}, must be None.')
        if window_size is not None:
            self.window_size = pair('window_size', window_size)
        for path, size in zip(self.paths, self._path_sizes(feat_size)):
            assert isinstance(path, WindowAttention)
            path.set_input_size(size, self.window_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        out: Optional[torch.Tensor] = None
        for i, path in enumerate(self.paths):
            if self.has_global_path and i == len(self.ratios) - 1:
                y = upsample_map(path(pool_map_to(x, self.window_size, self.pool)), H, W, self.upsample)
            elif self.ratios[i] > 1:
                y = upsample_map(path(pool_map(x, self.ratios[i], self.pool)), H, W, self.upsample)
            else:
                y = path(x)
            out = y if out is None else out + y
        assert out is not None
        return self.proj_drop(out)
