"""A hierarchical transformer in the shape of Swin's, around any mixers.

Names of modules and parameters are those of timm's `SwinTransformer`, and so is what can be asked of the model.
"""
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, PatchEmbed, get_device_dtype
from timm.models import checkpoint_seq, named_apply
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import get_init_weights_vit

from ..layers import MixerBlock, PaddedPatchEmbed, PaddedPatchMerging
from ..layers.arguments import pair, per_stage, whole_number
from ..layers.block import drop_path_rates
from ._family import arguments_of

_int_or_pair = Union[int, Tuple[int, int]]
Windows = Union[_int_or_pair, Sequence[_int_or_pair]]  # for all stages or one per stage

# (dim, num_heads, index=, feat_size=, device=, dtype=) to a mixer; the index counts the blocks of the stage, feat_size
# is height and width of its map
MixerFactory = Callable[..., nn.Module]


def stage_windows(window_size: Windows, num_stages: int) -> Tuple[Tuple[int, int], ...]:
    """Height and width of each stage's windows; two whole numbers are those of all stages.

    Raises:
        ValueError: They are no positive whole numbers, or of another number of stages.
    """
    if not isinstance(window_size, (list, tuple)) or (
            len(window_size) == 2 and not isinstance(window_size[0], (list, tuple))):
        window_size = (pair('window_size', window_size),) * num_stages
    return tuple([pair('window_size', w) for w in per_stage('window_size', window_size, num_stages)])


def _downsampled(downsample: nn.Module, feat_size: Tuple[int, int]) -> Tuple[int, int]:
    """Height and width of a map after a downsampling, which may say so itself and else rounds up."""
    if isinstance(downsample, nn.Identity):
        return feat_size
    output_size = getattr(downsample, 'output_size', None)
    if output_size is not None:
        return output_size(feat_size)
    return (feat_size[0] + 1) // 2, (feat_size[1] + 1) // 2


class MixerStage(nn.Module):
    """Blocks of any kind on (B, H, W, C), after an optional downsampling."""
    __jit_unused_properties__ = ['output_resolution']

    def __init__(
            self,
            downsample: nn.Module,
            blocks: Sequence[nn.Module],
            input_resolution: Tuple[int, int],
    ) -> None:
        """
        Args:
            downsample: Halves maps, or an identity. Sides are rounded up, unless it has a method `output_size`, which
                says otherwise.
            blocks: Maps of (B, H, W, C) to the same.
            input_resolution: Height and width of the map that enters the stage.
        """
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.input_resolution = input_resolution
        self.grad_checkpointing = False

    @property
    def output_resolution(self) -> Tuple[int, int]:
        """Height and width of the map that leaves the stage."""
        return self.output_size(self.input_resolution)

    @torch.jit.ignore
    def output_size(self, feat_size: Tuple[int, int]) -> Tuple[int, int]:
        """Height and width of the map that leaves the stage, for those of one that enters."""
        return _downsampled(self.downsample, feat_size)

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Follow the model to another input size.

        Args:
            feat_size: Height and width of the map that enters the stage.
            window_size: Height and width of the windows of mixers that have any.
            always_partition: Cut into windows and shift even where one window covers the map; None leaves it.
        """
        self.input_resolution = feat_size
        for block in self.blocks:
            set_input_size = getattr(block, 'set_input_size', None)
            if set_input_size is not None:
                set_input_size(self.output_resolution, window_size, always_partition)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, C) to the stage's resolution and channels."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x


class SwinLike(nn.Module):
    """Patch embedding, stages of blocks with downsampling between them, norm, pooling and classifier.

    Attributes:
        scales_windows: Whether windows grow and shrink with the map when `set_input_size` names none.
    """
    scales_windows = True

    def __init__(
            self,
            mixers: Sequence[MixerFactory],
            depths: Sequence[int],
            num_heads: Sequence[int],
            img_size: _int_or_pair = 224,
            patch_size: _int_or_pair = 4,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 96,
            window_size: Optional[Windows] = None,
            strict_img_size: bool = True,
            dynamic_img_size: bool = False,
            mlp_ratio: Union[float, Sequence[float]] = 4.,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            embed_layer: Callable[..., PatchEmbed] = PaddedPatchEmbed,
            downsample_layer: Callable[..., nn.Module] = PaddedPatchMerging,
            block_layer: Union[Callable[..., nn.Module], Sequence[Callable[..., nn.Module]]] = MixerBlock,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            weight_init: str = '',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            mixers: Makes the mixers of each stage, see `MixerFactory`.
            depths: Blocks in each stage.
            num_heads: Attention heads in each stage.
            img_size: Input height and width in pixels, any size.
            patch_size: Patch size in pixels.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type.
            embed_dim: Channels of the first stage, doubled by each further one.
            window_size: Windows that `set_input_size` is to scale with the map, as `stage_windows` takes them; None for
                mixers without windows. The mixers' factories know those of the constructor.
            strict_img_size: Require the input to match img_size.
            dynamic_img_size: Accept any input size. Same as strict_img_size=False.
            mlp_ratio: Hidden channels of the MLPs per channel, for all stages or one per stage.
            drop_rate: Dropout rate of the classifier.
            proj_drop_rate: Dropout rate of MLP outputs.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            embed_layer: Patch embedding, with arguments, `grid_size` and `set_input_size` as of timm's `PatchEmbed`.
            downsample_layer: Between stages, called with the channels of its input and its output and norm_layer.
            block_layer: Block around a mixer, called as `MixerBlock`, for all stages or one per stage.
            norm_layer: Normalisation layer.
            weight_init: Weight init mode, 'skip' to leave it out.

        Raises:
            ValueError: An argument is none of those above.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_stages = len(depths)
        for name, values in (('num_heads', num_heads), ('mixers', mixers)):
            if len(values) != num_stages:
                raise ValueError(f'{name}: got {len(values)} values, must be one for each of {num_stages} stages.')
        mlp_ratio = per_stage('mlp_ratio', mlp_ratio, num_stages)
        block_layer = per_stage('block_layer', block_layer, num_stages)
        embed_dim = whole_number('embed_dim', embed_dim)
        depths = tuple([whole_number('depths', d) for d in depths])
        patch_size = pair('patch_size', patch_size)
        strict_img_size = strict_img_size and not dynamic_img_size
        self.dynamic_img_size = not strict_img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = 'NHWC'
        self.num_layers = num_stages
        self.embed_dim = embed_dim
        self.num_features = embed_dim * 2 ** (num_stages - 1)

        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            strict_img_size=strict_img_size,
            output_fmt='NHWC',
            **dd,
        )
        # set_input_size() scales the windows with the patch grid
        self._ref_window_sizes = None if window_size is None else stage_windows(window_size, num_stages)
        H, W = self.patch_embed.grid_size
        self._ref_grid_size = resolution = (H, W)

        drop_path = drop_path_rates(drop_path_rate, depths)
        layers = []
        self.feature_info: List[Dict[str, Any]] = []
        for i in range(num_stages):
            dim = embed_dim * 2 ** i
            downsample = downsample_layer(dim // 2, dim, norm_layer=norm_layer, **dd) if i > 0 else nn.Identity()
            feat_size = _downsampled(downsample, resolution)
            blocks = [
                block_layer[i](
                    dim,
                    mixers[i](dim, num_heads[i], index=j, feat_size=feat_size, **dd),
                    mlp_ratio=mlp_ratio[i],
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for j, rate in enumerate(drop_path[i])]
            layers.append(MixerStage(downsample, blocks, resolution))
            resolution = feat_size
            reduction = max(patch_size) * 2 ** i
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f'layers.{i}'))
        self.layers = nn.Sequential(*layers)

        self.norm = norm_layer(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **dd,
        )
        self.head_hidden_size = self.head.num_features

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def _stages(self) -> List[MixerStage]:
        return [module for module in self.layers.modules() if isinstance(module, MixerStage)]

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise the model: linear layers as Swin's authors do, mixers as they say.

        Args:
            mode: Initialisation of timm's vision transformers, that of the constructor if empty.
            needs_reset: Also draw what constructors have drawn; needed after `to_empty()`.
        """
        mode = mode or self.weight_init_mode
        head_bias = -math.log(self.num_classes) if 'nlhb' in mode else 0.
        named_apply(get_init_weights_vit(mode, head_bias=head_bias, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Relative position tables, as in timm's Swin."""
        return {name for name, _ in self.named_parameters() if name.endswith('relative_position_bias_table')}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r'^patch_embed',
            blocks=r'^layers\.(\d+)' if coarse else [
                (r'^layers\.(\d+).downsample', (0,)),
                (r'^layers\.(\d+)\.\w+\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: New global pooling type, None keeps it.
        """
        self.num_classes = num_classes
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(
            self,
            img_size: Optional[_int_or_pair] = None,
            patch_size: Optional[_int_or_pair] = None,
            window_size: Optional[Windows] = None,
            window_ratio: Optional[Union[int, Sequence[int]]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Change the size of image, patches or windows; what depends on sizes is resampled.

        Without window_size and window_ratio, windows are scaled with the patch grid, so that at the current size
        nothing changes.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.
            window_size: New windows, an int or (h, w) for all stages or one per stage. Overrides window_ratio.
            window_ratio: Divisor of the patch grid before downsampling, for all stages or one per stage.
            always_partition: Cut into windows and shift even where one window covers the map, None leaves it.

        Raises:
            ValueError: A value is none of those above, or is for windows and there are none. Nothing has changed then.
        """
        num_stages, windowed = len(self.layers), self._ref_window_sizes is not None
        for name, value in (
                ('window_size', window_size), ('window_ratio', window_ratio), ('always_partition', always_partition)):
            if value is not None and not windowed:
                raise ValueError(f'{name}: got {value!r}, must be None for {type(self).__name__}, without windows.')
        if always_partition is not None and 'always_partition' not in arguments_of(type(self)):
            raise ValueError(
                f'always_partition: got {always_partition!r}, must be None for {type(self).__name__}, with no such '
                f'argument.')
        windows: Optional[Tuple[Tuple[int, int], ...]] = None
        ratios: List[int] = []
        if window_size is not None:
            windows = stage_windows(window_size, num_stages)
        elif window_ratio is not None:
            ratios = [whole_number('window_ratio', r) for r in per_stage('window_ratio', window_ratio, num_stages)]
        if img_size is not None or patch_size is not None:
            self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if patch_size is not None:
            for i, info in enumerate(self.feature_info):
                info['reduction'] = max(self.patch_embed.patch_size) * 2 ** i
        H, W = self.patch_embed.grid_size

        if ratios:
            windows = tuple([(max(1, H // r), max(1, W // r)) for r in ratios])
        if windows is not None:
            self._ref_window_sizes, self._ref_grid_size = windows, (H, W)  # later calls scale these
        elif self._ref_window_sizes is not None and self.scales_windows:
            ref_h, ref_w = self._ref_grid_size
            windows = tuple([(max(1, h * H // ref_h), max(1, w * W // ref_w)) for h, w in self._ref_window_sizes])
        else:
            windows = self._ref_window_sizes

        resolution = (H, W)
        for i, stage in enumerate(self._stages()):
            stage.set_input_size(resolution, None if windows is None else windows[i], always_partition)
            resolution = stage.output_resolution
        # for models that are built anew
        further: Dict[str, Any] = dict(window_size=windows, always_partition=always_partition) if windowed else {}
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size, **further)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Maps after each stage.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the last stage, whose width it has.
            stop_early: Stop after the last stage that is taken.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the maps only.

        Returns:
            Maps (B, C, H, W), or the features of `forward_features` and the maps.

        Raises:
            ValueError: output_fmt is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f'output_fmt: got \'{output_fmt}\', must be \'NCHW\'.')
        intermediates = []
        num_stages = len(self.layers)
        take_indices, max_index = feature_take_indices(num_stages, indices)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.layers
        else:
            stages = self.layers[:max_index + 1]
        x = self.patch_embed(x)
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                x_inter = self.norm(x) if norm and i == num_stages - 1 else x
                intermediates.append(x_inter.permute(0, 3, 1, 2).contiguous())

        if intermediates_only:
            return intermediates

        if i == num_stages - 1:
            x = self.norm(x)

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the maps of the given stages do not need.

        Args:
            indices: Take last n stages if int, select matching indices if sequence.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            Indices of the stages that are taken.
        """
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        prune_end = max_index < len(self.layers) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()
        self.layers = self.layers[:max_index + 1]
        if self._ref_window_sizes is not None:
            self._ref_window_sizes = self._ref_window_sizes[:max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to the normalised map of the last stage, (B, h, w, C)."""
        return self.norm(self.layers(self.patch_embed(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map (B, h, w, C) to logits (B, num_classes), or to what the last linear layer takes."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
