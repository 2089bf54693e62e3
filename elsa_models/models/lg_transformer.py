"""LG-Transformer

A PyTorch impl of `Local-to-Global Self-Attention in Vision Transformers` - https://arxiv.org/abs/2107.04735, as far as
it is known: reconstructed from the abstract and the parameter count. Its authors released neither code nor weights.

It is a Swin Transformer in whose blocks several window attentions, from local to global, run side by side.
"""
from functools import partial
from typing import Any, Dict, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers import LocalGlobalAttention
from ..layers.arguments import per_stage
from ._checkpoint import build_model
from ._family import Family, register_family
from ._swin_like import SwinLike, Windows, stage_windows
from .elsa_swin import to_own_names as to_swin_names

__all__ = ['LGTransformer']  # model_registry will add each entrypoint fn to this

_int_or_pair = Union[int, Tuple[int, int]]


class LGTransformer(SwinLike):
    """LG-Transformer, reconstructed from the abstract and the parameter count.

    That stages have several paths of window attention, from local to global, is known from the abstract. That each
    path has projections of its own, and that stages have 3, 3, 2 and 1 paths, follows from the published 32.6 M
    parameters of the tiny model. All else is a choice: the ratios of the paths, how maps are pooled and resized, that
    paths are summed, and that coarse ones shift their windows as Swin's does.

    With one path of ratio 1 in each stage it is Swin.
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
            ratios: Sequence[Sequence[int]] = ((1, 4, 8), (1, 2, 4), (1, 2), (1,)),
            pool: str = 'avg',
            upsample: str = 'bilinear',
            global_path: bool = False,
            window_size: Windows = 7,
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
            ratios: For each stage, the sides of its map per side of each path's map.
            pool: How the coarse maps are made, 'avg' or 'max'.
            upsample: How they are resized, 'bilinear' or 'nearest'.
            global_path: In stages of several paths, the last pools to one window at every image size, as the default
                ratios do at 224 pixels.
            window_size: Window size, an int or (h, w) for all stages or one per stage, the same at every image size.
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
            ValueError: An argument is none of those above.
        """
        num_stages = len(depths)
        windows = stage_windows(window_size, num_stages)
        ratios = per_stage('ratios', ratios, num_stages)
        args: Dict[str, Any] = dict(
            pool=pool,
            upsample=upsample,
            global_path=global_path,
            dynamic=dynamic_img_size or not strict_img_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate,
        )

        def mixer(stage: int, dim: int, num_heads: int, index: int, **kwargs) -> LocalGlobalAttention:
            return LocalGlobalAttention(
                dim,
                num_heads,
                ratios=ratios[stage],
                window_size=windows[stage],
                shift=index % 2 == 1,
                **args,
                **kwargs,
            )

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
            norm_layer=norm_layer,
            weight_init=weight_init,
            device=device,
            dtype=dtype,
        )


def to_own_names(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of an LG-Transformer or a Swin, whose attention is the path of ratio 1, in our names."""
    if any('.attn.paths.' in k for k in state_dict):
        return dict(state_dict)
    return {k.replace('.attn.', '.attn.paths.0.'): x for k, x in to_swin_names(state_dict).items()}


def _create_lg(variant: str, pretrained: bool = False, **kwargs) -> LGTransformer:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['depths']))))
    return build_model(
        LGTransformer,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .9, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head.fc',
        'paper_name': 'Local-to-Global Self-Attention in Vision Transformers', 'paper_ids': 'arXiv:2107.04735',
        'description': 'Reconstructed from the abstract and the parameter count.',
        'notes': ('none: reconstructed from the abstract and the parameter count',),
        **kwargs,
    }


# nobody has weights of these
default_cfgs = generate_default_cfgs({
    'lg_tiny_patch4_window7_224': _cfg(),
    'lg_small_patch4_window7_224': _cfg(),
    'test_lg': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def lg_tiny_patch4_window7_224(pretrained: bool = False, **kwargs) -> LGTransformer:
    """LG-T, reconstructed from the abstract and the parameter count: 32.6 M parameters, 4.8 GMACs at 224."""
    model_args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=.2)
    return _create_lg('lg_tiny_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def lg_small_patch4_window7_224(pretrained: bool = False, **kwargs) -> LGTransformer:
    """LG-S, reconstructed from the abstract and the parameter count of LG-T: 61.0 M parameters, 9.4 GMACs at 224."""
    model_args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=.3)
    return _create_lg('lg_small_patch4_window7_224', pretrained, **dict(model_args, **kwargs))


@register_model
def test_lg(pretrained: bool = False, **kwargs) -> LGTransformer:
    """A small LG-Transformer for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(
        img_size=64, embed_dim=24, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), ratios=((1, 2, 4), (1, 2), (1,), (1,)),
        window_size=4, mlp_ratio=3.)
    return _create_lg('test_lg', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='lg_transformer',
    module=__name__,
    model_cls=LGTransformer,
    to_own_names=to_own_names,
    relatives={
        f'lg_{size}_patch4_window7_224': f'swin_{size}_patch4_window7_224.ms_in1k' for size in ('tiny', 'small')},
    marks=('attn_conv.weight',),
    silenced=r'\.attn\.paths\.[1-9]\d*\.proj\.',
))
