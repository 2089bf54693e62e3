"""ResNets whose bottlenecks hold a mixer of maps where the 3x3 convolution was, on timm's ByobNet.

Names of parameters and everything after construction (features, pruning, classifier, checkpointing) are ByobNet's.
What ByobNet does not do is done here: maps of odd sizes, sizes that follow the images, mixers of maps (B, H, W, C).
"""
import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    ConvNormAct,
    DropPath,
    make_divisible,
)
from timm.models._input import update_model_input_size
from timm.models.byobnet import BottleneckBlock, ByobNet, LayerFn, Stem

from ..layers.arguments import check_images, pair, whole_number
from ..layers.block import drop_path_rates
from ..layers.sizes import sizes_are_open
from ._checkpoint import WeightsError

_MIN_SIZE = 32  # in pixels: one of the last stage
_STAGE_STRIDES = (1, 2, 2, 2)

# called with (dim, feat_size=, device=, dtype=), and with stride= too where the mixer does its own striding
MixerFactory = Callable[..., nn.Module]


def check_image_size(x: torch.Tensor, channels: Optional[int]) -> None:
    """Require images (B, channels, H, W), as `check_images` takes them, of at least 32 pixels in height and width.

    Raises:
        ValueError: They are smaller, or no such images, see `check_images`.
    """
    check_images(x, channels)
    if not sizes_are_open() and (x.shape[2] < 32 or x.shape[3] < 32):  # no globals in TorchScript
        raise ValueError(f'x: got images of {x.shape[2]} x {x.shape[3]} pixels, must be at least 32 x 32.')


torch.fx.wrap('check_image_size')


def count_batches(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Add the batches that norms have counted, none, to a state dict that leaves them out."""
    counts = {k: torch.zeros((), dtype=torch.long) for k in model.state_dict() if k.endswith('.num_batches_tracked')}
    return {**counts, **state_dict}


def join_qkv(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Join query, key and value of a state dict that has them by themselves, as linears or as 1x1 convolutions."""
    out = {}
    for key, x in state_dict.items():
        match = re.fullmatch(r'(.*\.self_attn\.)([qkv])\.weight', key)
        if match is None:
            out[key] = x
        elif match.group(2) == 'q':
            names = [f'{match.group(1)}{name}.weight' for name in 'qkv']
            if all(name in state_dict for name in names):
                out[f'{match.group(1)}qkv.weight'] = torch.cat([state_dict[name] for name in names]).flatten(1)
    return out


def check_table(name: str, table: torch.Tensor, num_distances: int) -> None:
    """Require that a checkpoint's table of positions has as many distances to either side.

    Raises:
        WeightsError: It has an even number of distances, or is no matrix.
    """
    if table.dim() != 2 or num_distances % 2 == 0:
        raise WeightsError(
            f'{name}: got shape {tuple(table.shape)}, must be a table of an odd number of distances, 2 * L - 1 for '
            f'maps of L pixels.')


class StemConv(ConvNormAct):
    """timm's `ConvNormAct`, which looks at its images first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, C, ceil(H / 2), ceil(W / 2)).

        Raises:
            ValueError: Images are smaller than 32 pixels.
        """
        check_image_size(x, getattr(self.conv, 'in_channels', None))
        x = self.conv(x)
        x = self.bn(x)
        return x


class MixerBottleneck(nn.Module):
    """1x1 convolution, mixer, pooling, 1x1 convolution and a shortcut; timm's `SelfAttnBlock` for any mixer.

    The mixer runs at the resolution that comes in. A stride of 2 is a mean over 2 x 2 pixels after it, over what there
    is of them at the edge of odd maps, so that these fit the strided shortcut.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            mixer: MixerFactory,
            feat_size: Tuple[int, int],
            stride: int = 1,
            bottle_ratio: float = 0.25,
            mixer_strides: bool = False,
            norm_after_mixer: bool = True,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels of the input.
            out_chs: Channels of the output.
            mixer: Builds the mixer.
            feat_size: Height and width of the map that comes in.
            stride: 1 or 2.
            bottle_ratio: Channels of the mixer per channel of the output, rounded to a multiple of 8.
            mixer_strides: The mixer is given the stride, in place of pooling.
            norm_after_mixer: Batch norm and ReLU after the mixer, or ReLU alone.
            drop_path: Stochastic depth rate.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim = make_divisible(out_chs * bottle_ratio)
        self.shortcut = None
        if stride != 1 or in_chs != out_chs:
            self.shortcut = ConvNormAct(in_chs, out_chs, 1, stride=stride, apply_act=False, **dd)
        self.conv1_1x1 = ConvNormAct(in_chs, dim, 1, **dd)
        self.self_attn: Any  # a mixer, with `reset_parameters`
        if mixer_strides:
            self.self_attn = mixer(dim, feat_size=feat_size, stride=stride, **dd)
        else:
            self.self_attn = mixer(dim, feat_size=feat_size, **dd)
        pools = stride != 1 and not mixer_strides
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False) if pools else nn.Identity()
        self.post_attn = BatchNormAct2d(dim, **dd) if norm_after_mixer else nn.ReLU()
        self.conv3_1x1 = ConvNormAct(dim, out_chs, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_chs, H, W) to (B, out_chs, ceil(H / stride), ceil(W / stride))."""
        # channels last in memory, by what vmap knows; a copy in the first block alone
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        shortcut = x
        x = self.conv1_1x1(x)
        x = self.self_attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.post_attn(self.pool(x))
        x = self.drop_path(self.conv3_1x1(x))
        if self.shortcut is not None:
            shortcut = self.shortcut(shortcut)
        return self.act(x + shortcut)


class MixerResNet(ByobNet):
    """A ResNet of `MixerBottleneck`s, of timm's bottlenecks, or of both.

    Families subclass it with constructors of their own. Images may be of any size from 32 pixels; `img_size` is the one
    that mixers make their tables for.
    """

    def __init__(
            self,
            mixers: Sequence[Sequence[Optional[MixerFactory]]],
            widths: Sequence[int] = (256, 512, 1024, 2048),
            bottle_ratio: float = 0.25,
            stem_width: int = 64,
            mixer_strides: bool = False,
            norm_after_mixer: bool = True,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: int = 32,
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            zero_init_last: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            mixers: For each block of each of the four stages what builds its mixer; None stands for a 3x3 convolution.
            widths: Channels of each stage's output.
            bottle_ratio: Channels of the mixers per channel of the output, rounded to multiples of 8.
            stem_width: Channels of the stem.
            mixer_strides: Mixers are given the stride, in place of pooling after them.
            norm_after_mixer: Batch norm and ReLU after each mixer, or ReLU alone.
            img_size: Height and width in pixels that mixers make their tables for.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type.
            output_stride: Stride of the last stage: 8, 16 or 32. Later strides are left out.
            drop_rate: Dropout rate of the classifier.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            zero_init_last: Start with blocks that are their shortcuts: the last batch norm's weight is 0.

        Raises:
            ValueError: An argument is none of those above.
        """
        nn.Module.__init__(self)  # every part that ByobNet.__init__ would build is built here
        dd = {'device': device, 'dtype': dtype}
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride: got {output_stride!r}, must be 8, 16 or 32.')
        depths = [len(stage) for stage in mixers]
        if len(depths) != len(_STAGE_STRIDES) or 0 in depths:
            raise ValueError(f'depths: got {tuple(depths)}, must be at least one block in each of 4 stages.')
        if len(widths) != len(_STAGE_STRIDES):
            raise ValueError(f'widths: got {len(widths)} values, must be one for each of 4 stages.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.img_size = pair('img_size', img_size, _MIN_SIZE)
        self._zero_init_last = zero_init_last
        self._strides = []
        reduction = 4
        for stride in _STAGE_STRIDES:
            self._strides.append(1 if reduction >= output_stride else stride)
            reduction *= self._strides[-1]

        layers = LayerFn(conv_norm_act=StemConv)
        self.stem = Stem(in_chans, stem_width, 7, pool='maxpool', num_rep=1, layers=layers, **dd)
        self.feature_info = [dict(num_chs=stem_width, reduction=2, module='stem.conv1', stage=0)]
        drop_path = drop_path_rates(drop_path_rate, depths)
        in_chs, reduction, stages = stem_width, 4, []
        sizes = self._feat_sizes(self.img_size, depths)
        for i, (factories, width) in enumerate(zip(mixers, widths)):
            blocks = []
            for j, mixer in enumerate(factories):
                block_args = dict(
                    in_chs=in_chs,
                    out_chs=whole_number('widths', width),
                    stride=self._strides[i] if j == 0 else 1,
                    bottle_ratio=bottle_ratio,
                    **dd,
                )
                block: nn.Module
                if mixer is None:
                    block = BottleneckBlock(downsample='conv1x1', drop_path_rate=drop_path[i][j], **block_args)
                else:
                    block = MixerBottleneck(
                        mixer=mixer,
                        feat_size=sizes[i][j],
                        mixer_strides=mixer_strides,
                        norm_after_mixer=norm_after_mixer,
                        drop_path=drop_path[i][j],
                        **block_args,
                    )
                blocks.append(block)
                in_chs = width
            stages.append(nn.Sequential(*blocks))
            reduction *= self._strides[i]
            self.feature_info.append(dict(num_chs=width, reduction=reduction, module=f'stages.{i}', stage=i + 1))
        self.feature_info[-1]['module'] = 'final_conv'
        self.stages = nn.Sequential(*stages)
        self.stage_ends = [f['stage'] for f in self.feature_info]
        self.num_features = in_chs
        self.final_conv = nn.Identity()
        head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head = head  # type: ignore[assignment]  # one of the two kinds of head that ByobNet has
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def _feat_sizes(self, img_size: Tuple[int, int], depths: Sequence[int]) -> List[List[Tuple[int, int]]]:
        """Height and width of the map that enters each block of each stage."""
        H, W = [(s + 3) // 4 for s in img_size]
        sizes = []
        for stride, depth in zip(self._strides, depths):
            out_size = ((H + stride - 1) // stride, (W + stride - 1) // stride)
            sizes.append([(H, W)] + [out_size] * (depth - 1))
            H, W = out_size
        return sizes

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise as timm's ResNets, and mixers as they do themselves.

        Args:
            mode: No other than ''.
            needs_reset: Batch norms and their statistics have to be set as well, as after `to_empty`.
        """
        if mode:
            raise ValueError(f"mode: got {mode!r}, must be ''.")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for block in (block for stage in self.stages for block in stage):
            if isinstance(block, MixerBottleneck):
                block.self_attn.reset_parameters()
            if self._zero_init_last:
                nn.init.zeros_(block.conv3_1x1.bn.weight)

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Make tables for another size of images. Any size may come before and after.

        Args:
            img_size: Height and width in pixels.

        Raises:
            ValueError: The size is smaller than 32 pixels, or no size.
        """
        img_size = pair('img_size', img_size, _MIN_SIZE)
        sizes = self._feat_sizes(img_size, [len(stage) for stage in self.stages])
        for stage, stage_sizes in zip(self.stages, sizes):
            for block, feat_size in zip(stage, stage_sizes):
                if isinstance(block, MixerBottleneck):
                    block.self_attn.set_input_size(feat_size)
        self.img_size = img_size
        update_model_input_size(self, img_size)
