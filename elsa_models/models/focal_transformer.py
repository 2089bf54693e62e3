"""Focal Transformer

A PyTorch impl of the classification models of `Focal Self-attention for Local-Global Interactions in Vision
Transformers` - https://arxiv.org/abs/2107.00641 (NeurIPS 2021): a hierarchy like Swin's whose windows also see their
surround and pooled windows around them. Written from a description of the authors' first release
(https://github.com/microsoft/Focal-Transformer, MIT), whose weights it reads. Not FocalNet, which timm has.
"""
import math
import re
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers import ConvDownsample, FocalAttention, OverlapPatchEmbed, PaddedPatchEmbed
from ..layers.arguments import pair, per_stage, whole_number
from ..layers.mixers.focal import resize_grid, resize_pool
from ._checkpoint import WeightsError, build_model, check_keys, fit_positions, unwrap
from ._family import Family, register_family
from ._swin_like import SwinLike, Windows, stage_windows

__all__ = ['FocalTransformer']  # model_registry will add each entrypoint fn to this

_int_or_pair = Union[int, Tuple[int, int]]


class FocalTransformer(SwinLike):
    """Focal Transformer.

    With the default arguments it takes images of any size with the same parameters, and is the authors' model for
    those of 224 pixels a side or of two such images side by side. For other sizes theirs have other parameters: a
    surround in the last stage from 256 pixels on (`expand_sizes=(3, 3, 3, 3)` here), smaller windows where a side of a
    stage's map is shorter than 7 (`shrink_window=True` here). As theirs, it loses the last row or column of a map of
    odd sides between stages, unless `use_conv_embed` or `pad_odd` is on.
    """
    scales_windows = False

    def __init__(
            self,
            img_size: _int_or_pair = 224,
            patch_size: int = 4,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            embed_dim: int = 96,
            depths: Tuple[int, ...] = (2, 2, 6, 2),
            num_heads: Tuple[int, ...] = (3, 6, 12, 24),
            window_size: Windows = 7,
            expand_sizes: Optional[Union[int, Sequence[int]]] = None,
            focal_windows: Union[int, Sequence[int]] = (7, 5, 3, 1),
            wrap: bool = True,
            shrink_window: bool = False,
            use_conv_embed: bool = False,
            pad_odd: bool = False,
            strict_img_size: bool = True,
            dynamic_img_size: bool = False,
            mlp_ratio: Union[float, Tuple[float, ...]] = 4.,
            qkv_bias: bool = True,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.1,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            weight_init: str = '',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input height and width in pixels, any size.
            patch_size: Patch size in pixels.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type.
            embed_dim: Channels of the first stage, doubled by each further one.
            depths: Blocks in each stage.
            num_heads: Attention heads in each stage.
            window_size: Side of the windows, for all stages or one per stage. They keep it at every image size.
            expand_sizes: Width of the surround in pixels, for all stages or one per stage; half the window, rounded
                down, and none in the last stage if None.
            focal_windows: Side, in windows, of the region whose pooled windows are seen, odd, for all stages or one
                per stage.
            wrap: Let the surround wrap round the map, as the authors' does; without, nothing is seen beyond an edge.
            shrink_window: As in the authors' models, the shorter side of a stage's map is the side of its windows, and
                there is no surround, where it is not longer than they are. Parameters then depend on img_size.
            use_conv_embed: Overlapping convolutions as patch embedding (7 x 7) and between stages (3 x 3).
            pad_odd: Pad maps of odd sides between stages, whose last row or column is lost otherwise; convolutions
                that overlap lose none.
            strict_img_size: Require the input to match img_size.
            dynamic_img_size: Accept any input size. Same as strict_img_size=False.
            mlp_ratio: Hidden channels of the MLPs per channel, for all stages or one per stage.
            qkv_bias: Add a bias to query, key and value.
            drop_rate: Dropout rate of the classifier.
            proj_drop_rate: Dropout rate of attention and MLP outputs.
            attn_drop_rate: Dropout rate of attention weights.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            norm_layer: Normalisation layer.
            weight_init: Weight init mode, 'skip' to leave it out.

        Raises:
            ValueError: An argument is none of those above, or shrink_window and dynamic_img_size are both on.
        """
        num_stages = len(depths)
        windows = stage_windows(window_size, num_stages)
        if any(h != w for h, w in windows):
            raise ValueError(f'window_size: got {window_size}, must be square windows.')
        if expand_sizes is None:
            expand_sizes = [w // 2 for w, _ in windows[:-1]] + [0]
        expand_sizes = [whole_number('expand_sizes', e, 0) for e in per_stage('expand_sizes', expand_sizes, num_stages)]
        focal_windows = per_stage('focal_windows', focal_windows, num_stages)
        if shrink_window and (dynamic_img_size or not strict_img_size):
            raise ValueError(
                'shrink_window: got True together with dynamic_img_size, must be False: parameters depend on the image '
                'size with the one, and not with the other.')
        full = [(w, e) for (w, _), e in zip(windows, expand_sizes)]
        args: Dict[str, Any] = dict(wrap=wrap, qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)

        def mixer(stage: int, dim: int, num_heads: int, index: int, feat_size: Tuple[int, int], **dd) -> FocalAttention:
            window, expand = _shrink(*full[stage], feat_size) if shrink_window else full[stage]
            return FocalAttention(dim, num_heads, window, expand, focal_windows[stage], **args, **dd)

        super().__init__(
            mixers=[partial(mixer, i) for i in range(num_stages)],
            depths=depths,
            num_heads=num_heads,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            window_size=windows,
            strict_img_size=strict_img_size,
            dynamic_img_size=dynamic_img_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=OverlapPatchEmbed if use_conv_embed else PaddedPatchEmbed,
            downsample_layer=partial(ConvDownsample, overlap=use_conv_embed, pad_odd=pad_odd),
            norm_layer=norm_layer,
            weight_init=weight_init,
            device=device,
            dtype=dtype,
        )

        self.shrink_window = shrink_window
        self._full_windows = full
        self._ref_window_sizes = tuple([attn.window_size for attn in self._first_attentions()])

    @torch.jit.ignore
    def _first_attentions(self) -> List[FocalAttention]:
        """The first of each stage, whose windows are those of all."""
        return [next(m for m in stage.modules() if isinstance(m, FocalAttention)) for stage in self.layers]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """The tables of biases, as in the authors' training."""
        tables = ('relative_position_bias_table', 'surround_bias', 'pooled_bias')
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    @torch.jit.ignore
    def set_input_size(
            self,
            img_size: Optional[_int_or_pair] = None,
            patch_size: Optional[_int_or_pair] = None,
            window_size: Optional[Windows] = None,
    ) -> None:
        """Change the size of image, patches or windows. No other parameter depends on the first two.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.
            window_size: New windows, for all stages or one per stage, whose tables are resampled; None leaves them.

        Raises:
            ValueError: A value is none of those above, windows with a surround were to change, whose table cannot be
                resampled, or with shrink_window those for the new size are others. Nothing has changed then.
        """
        attns = self._first_attentions()
        if window_size is not None:
            for attn, sides in zip(attns, stage_windows(window_size, len(attns))):
                attn.check_window_size(sides)
        if self.shrink_window:
            if window_size is not None:
                raise ValueError(f'window_size: got {window_size}, must be None with shrink_window.')
            sides = self.patch_embed.img_size if img_size is None else pair('img_size', img_size)
            patch = self.patch_embed.patch_size if patch_size is None else pair('patch_size', patch_size)
            feat_size = ((sides[0] + patch[0] - 1) // patch[0], (sides[1] + patch[1] - 1) // patch[1])
            for attn, stage, full in zip(attns, self._stages(), self._full_windows):
                feat_size = stage.output_size(feat_size)
                window, expand = _shrink(*full, feat_size)
                if (window, expand) != (attn.window_size[0], attn.expand_size):
                    raise ValueError(
                        f'img_size: got {img_size}, for which a stage would have windows of {window} and a surround of '
                        f'{expand} pixels, not {attn.window_size[0]} and {attn.expand_size}. With shrink_window, '
                        f'create the model with this img_size.')
        super().set_input_size(img_size=img_size, patch_size=patch_size, window_size=window_size)


def _shrink(window: int, expand: int, feat_size: Tuple[int, int]) -> Tuple[int, int]:
    """Side of the windows and width of the surround that the authors' blocks have on a map."""
    return (min(feat_size), 0) if min(feat_size) <= window else (window, expand)


_AUTHORS_RENAMES = (
    (r'\.pool_layers\.0\.', '.attn.pool.'),
    (r'\.relative_position_bias_table_to_neighbors$', '.surround_bias'),
    (r'\.relative_position_bias_table_to_windows\.0$', '.pooled_bias'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    # their stages end with the downsampling that ours begin with
    (r'^layers\.(\d+)\.downsample\.', lambda m: f'layers.{int(m.group(1)) + 1}.downsample.'),
)
_SAVED_BUFFERS = ('.relative_position_index', '.relative_position_index_0', '.valid_ind_rolled')  # recomputed here


def is_authors(state_dict: Dict[str, Any]) -> bool:
    """Whether a state dict has the names of the authors' Focal Transformer."""
    return any(k.endswith('.pool_layers.0.weight') for k in state_dict)


def to_own_names(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of a Focal Transformer, the authors' or ours, in our names and without saved buffers."""
    if not is_authors(state_dict):
        return dict(state_dict)
    out = {}
    for key, x in state_dict.items():
        if key.endswith(_SAVED_BUFFERS):
            continue
        for pattern, name in _AUTHORS_RENAMES:
            key = re.sub(pattern, name, key)
        out[key] = x
    return out


def _fit(name: str, x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """An entry, resampled to the windows of the model where it can be.

    Raises:
        WeightsError: It is the table of a surround of another size.
    """
    target = model.state_dict().get(name)
    if target is None or x.shape == target.shape or x.dim() != target.dim():
        return x
    if name.endswith('.pooled_bias') and x.shape[0] == target.shape[0]:
        return resize_grid(x, math.isqrt(target.shape[1]))
    if name.endswith('.pool.weight'):
        return resize_pool(x, math.isqrt(target.shape[1]))
    if name.endswith('.surround_bias') and x.shape[1] == target.shape[1]:
        raise WeightsError(
            f'checkpoint does not fit: {name} has shape {tuple(x.shape)} instead of {tuple(target.shape)}. It holds a '
            f'bias for each pixel and key, which cannot be resampled to other windows: create the model with those of '
            f'the checkpoint.')
    if name == 'patch_embed.proj.weight' and isinstance(model.patch_embed, OverlapPatchEmbed):
        return x
    return fit_positions(name, x, model)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint of ours or of the authors to the model.

    Nothing depends on the size of the image. Tables of biases and weights of pooling are resampled to other windows,
    and a patch embedding to another patch size, unless patches overlap.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown; all are listed. Or the surround is another.
    """
    out = to_own_names(unwrap(state_dict))
    surrounds = [{k for k in entries if k.endswith('.surround_bias')} for entries in (out, model.state_dict())]
    differing = {k.split('.')[1] for k in surrounds[0] ^ surrounds[1]}
    if differing and len(surrounds[0]) > 0 and {k for k in out if k.endswith('.pooled_bias')}:
        raise WeightsError(
            f'checkpoint does not fit: only one of it and the model has a surround in stage {", ".join(differing)} '
            f'(counted from 0). The authors\' models have one where both sides of a map exceed the window: for theirs '
            f'of 256 pixels and more create the model with expand_sizes=(3, 3, 3, 3).')
    out = {k: _fit(k, x, model) for k, x in out.items()}
    check_keys(out, model, optional='head.fc.')
    return out


def _create_focal(variant: str, pretrained: bool = False, **kwargs) -> FocalTransformer:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['depths']))))
    return build_model(
        FocalTransformer,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head.fc',
        'license': 'mit', 'origin_url': 'https://github.com/microsoft/Focal-Transformer',
        'paper_name': 'Focal Self-attention for Local-Global Interactions in Vision Transformers',
        'paper_ids': 'arXiv:2107.00641', 'notes': ('the authors\' are not online any more',),
        **kwargs,
    }


# the authors' store is closed: their weights are for those who have the files
default_cfgs = generate_default_cfgs({
    'focal_tiny_patch4_window7_224': _cfg(),
    'focal_small_patch4_window7_224': _cfg(),
    'focal_base_patch4_window7_224': _cfg(),
    'focal_tiny_useconv_patch4_window7_224': _cfg(),
    'focal_small_useconv_patch4_window7_224': _cfg(),
    'focal_base_useconv_patch4_window7_224': _cfg(),
    'test_focal': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})

_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=.2)
_SMALL = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=.3)
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=.5)


@register_model
def focal_tiny_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-T of the paper: 28.9 M parameters, 4.9 GMACs at 224."""
    return _create_focal('focal_tiny_patch4_window7_224', pretrained, **dict(_TINY, **kwargs))


@register_model
def focal_small_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-S of the paper: 51.1 M parameters, 9.4 GMACs at 224."""
    return _create_focal('focal_small_patch4_window7_224', pretrained, **dict(_SMALL, **kwargs))


@register_model
def focal_base_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-B of the paper: 89.8 M parameters, 16.3 GMACs at 224."""
    return _create_focal('focal_base_patch4_window7_224', pretrained, **dict(_BASE, **kwargs))


@register_model
def focal_tiny_useconv_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-T with overlapping convolutions between stages: 30.8 M parameters, 5.2 GMACs at 224."""
    model_args = dict(_TINY, use_conv_embed=True)
    return _create_focal('focal_tiny_useconv_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def focal_small_useconv_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-S with overlapping convolutions between stages: 53.1 M parameters, 9.7 GMACs at 224."""
    model_args = dict(_SMALL, use_conv_embed=True)
    return _create_focal('focal_small_useconv_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def focal_base_useconv_patch4_window7_224(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """Focal-B with overlapping convolutions between stages: 93.3 M parameters, 16.8 GMACs at 224."""
    model_args = dict(_BASE, use_conv_embed=True)
    return _create_focal('focal_base_useconv_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def test_focal(pretrained: bool = False, **kwargs) -> FocalTransformer:
    """A small Focal Transformer for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(
        img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=3,
        focal_windows=(5, 3, 3, 1), mlp_ratio=3.)
    return _create_focal('test_focal', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='focal_transformer',
    module=__name__,
    model_cls=FocalTransformer,
    filter_fn=checkpoint_filter_fn,
    to_own_names=to_own_names,
    is_authors=is_authors,
    marks=('pooled_bias',),
    top1=dict(
        focal_tiny_patch4_window7_224=82.2,
        focal_small_patch4_window7_224=83.6,
        focal_base_patch4_window7_224=84.0,
        focal_tiny_useconv_patch4_window7_224=82.7,
        focal_small_useconv_patch4_window7_224=83.8,
        focal_base_useconv_patch4_window7_224=84.2,
    ),
    dense_args=dict(pad_odd=True),
))
