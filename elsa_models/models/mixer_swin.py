"""One Swin Transformer for the comparison of mixers

`What Limits the Performance of Local Self-attention?` - https://arxiv.org/abs/2112.12786 compares window attention,
neighbourhood attention, dynamic filters and depthwise convolution within Swin-T, as settings of one form. Here are
these and others, in every stage of the same network; nothing else differs.
"""
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers import (
    ElsaAttention,
    GlobalSelfAttention,
    KeyOnlyAttention,
    LocalGlobalAttention,
    UnifiedNeighbourhoodAttention,
    UnifiedWindowAttention,
)
from ..layers.arguments import per_stage
from ..layers.mixers.unified import REGIONS
from ._checkpoint import build_model, check_keys, fit_positions, unwrap
from ._family import Family, register_family
from ._swin_like import SwinLike, Windows, stage_windows
from .gsa_resnet import fit_tables

__all__ = ['MixerSwin']  # model_registry will add each entrypoint fn to this

_int_or_pair = Union[int, Tuple[int, int]]


def _unified(region: str, terms: Sequence[str], normalisation: str = 'softmax') -> Dict[str, Any]:
    return dict(region=region, terms=terms, normalisation=normalisation)


# settings of the unified form, which arguments of the model override; head_dim takes the place of num_heads
UNIFIED = {
    'window': _unified('window', ('qk',)),
    'window_bias': _unified('window', ('qk', 'r')),  # Swin
    'window_all': _unified('window', ('qk', 'qr', 'rk', 'r')),
    'window_filter': _unified('window', ('qr',), 'filter'),
    'neighbourhood': _unified('neighbourhood', ('qk',)),
    'neighbourhood_bias': _unified('neighbourhood', ('qk', 'r')),
    'neighbourhood_all': _unified('neighbourhood', ('qk', 'qr', 'rk', 'r')),
    'sasa': _unified('neighbourhood', ('qk', 'qr')),
    'dynamic_filter': _unified('neighbourhood', ('qr',), 'filter'),
    'depthwise': dict(_unified('neighbourhood', ('r',), 'identity'), head_dim=1),
}
OTHERS = ('elsa', 'elsa_no_ghost', 'elsa_query', 'key_only', 'gsa', 'lg')  # from their own files
MIXERS = (*UNIFIED, *OTHERS)
# parameters that depend on nothing but the relative position, of whatever mixer
_POSITIONS = (
    'relative_position_bias_table', 'relative_key_table', 'relative_query_table', 'rel_row', 'rel_col', 'ghost_add')
_SWITCHES = ('region', 'terms', 'normalisation', 'border', 'scale')


class MixerSwin(SwinLike):
    """A Swin Transformer with the same mixer in every block."""
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
            mixer: str = 'window_bias',
            kernel_size: int = 7,
            window_size: Windows = 7,
            region: Optional[str] = None,
            terms: Optional[Sequence[str]] = None,
            normalisation: Optional[str] = None,
            border: Optional[str] = None,
            scale: Optional[float] = None,
            strict_img_size: bool = True,
            dynamic_img_size: bool = False,
            mlp_ratio: Union[float, Tuple[float, ...]] = 4.,
            qkv_bias: bool = True,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
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
            num_heads: Heads in each stage; the mixer 'depthwise' has one for each channel.
            mixer: One of `MIXERS`. Those of `UNIFIED` are settings of the paper's form, which further arguments change.
            kernel_size: Side of neighbourhoods in pixels, odd, for mixers that have any.
            window_size: For mixers within windows, an int or (h, w) for all stages or one per stage, shifted by
                half their size in every other block on maps that are larger.
            region: 'window' or 'neighbourhood', as the mixer says if None.
            terms: Terms of the logits, some of 'qk', 'qr', 'rk' and 'r', as the mixer says if None.
            normalisation: 'softmax', 'identity' or 'filter', as the mixer says if None.
            border: Of neighbourhoods: 'zero' or 'mask', 'zero' if None.
            scale: Factor of queries, the root of 1 / channels of a head if None.
            strict_img_size: Require the input to match img_size.
            dynamic_img_size: Accept any input size. Same as strict_img_size=False.
            mlp_ratio: Hidden channels of the MLPs per channel, for all stages or one per stage.
            qkv_bias: Add a bias to query, key and value, where the mixer has a choice.
            drop_rate: Dropout rate of the classifier.
            proj_drop_rate: Dropout rate of mixer and MLP outputs, where the mixer has any.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            norm_layer: Normalisation layer.
            weight_init: Weight init mode, 'skip' to leave it out.

        Raises:
            ValueError: An argument is none of those above, or does not apply to the mixer.
        """
        num_stages = len(depths)
        if mixer not in MIXERS:
            raise ValueError(f'mixer: got {mixer!r}, must be one of {", ".join(map(repr, MIXERS))}.')
        switches = dict(zip(_SWITCHES, (region, terms, normalisation, border, scale)))
        switches = {k: x for k, x in switches.items() if x is not None}
        args = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate)
        windows = stage_windows(window_size, num_stages)
        dynamic = dynamic_img_size or not strict_img_size
        if mixer in UNIFIED:
            settings = {**UNIFIED[mixer], **switches}
            windowed = settings['region'] == 'window'  # which the factory takes out
            factory = _unified_factory(settings, kernel_size, windows, dynamic, args)
        elif switches:
            raise ValueError(f'{next(iter(switches))}: does not apply to the mixer {mixer!r}.')
        else:
            windowed = mixer == 'lg'
            factory = _other_factory(mixer, kernel_size, windows, dynamic, args)
        super().__init__(
            mixers=[partial(factory, i) for i in range(num_stages)],
            depths=depths,
            num_heads=num_heads,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            window_size=windows if windowed else None,
            strict_img_size=strict_img_size,
            dynamic_img_size=dynamic_img_size,
            mlp_ratio=per_stage('mlp_ratio', mlp_ratio, num_stages),
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            weight_init=weight_init,
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Whatever depends on the relative position alone, so that no mixer is held back by it more than another."""
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in _POSITIONS}


def _unified_factory(
        settings: Dict[str, Any],
        kernel_size: int,
        windows: Sequence[Tuple[int, int]],
        dynamic: bool,
        args: Dict[str, Any],
) -> Callable[..., nn.Module]:
    region, head_dim = settings.pop('region'), settings.pop('head_dim', None)
    if region not in REGIONS:
        raise ValueError(f'region: got {region!r}, must be one of {", ".join(map(repr, REGIONS))}.')
    if region == 'window' and 'border' in settings:
        raise ValueError("border: does not apply to windows, must be None for region='window'.")

    def factory(stage: int, dim: int, num_heads: int, index: int, feat_size: Tuple[int, int], **dd) -> nn.Module:
        num_heads = num_heads if head_dim is None else dim // head_dim
        if region == 'neighbourhood':
            return UnifiedNeighbourhoodAttention(dim, num_heads, kernel_size, **settings, **args, **dd)
        return UnifiedWindowAttention(
            dim,
            num_heads,
            feat_size,
            windows[stage],
            shift=index % 2 == 1,
            dynamic=dynamic,
            **settings,
            **args,
            **dd,
        )

    return factory


def _other_factory(
        mixer: str,
        kernel_size: int,
        windows: Sequence[Tuple[int, int]],
        dynamic: bool,
        args: Dict[str, Any],
) -> Callable[..., nn.Module]:
    def factory(stage: int, dim: int, num_heads: int, index: int, feat_size: Tuple[int, int], **dd) -> nn.Module:
        if mixer == 'gsa':
            return GlobalSelfAttention(dim, num_heads, feat_size, **dd)
        if mixer == 'lg':
            return LocalGlobalAttention(  # on the map and, but for the last stage, on one window that it is pooled to
                dim,
                num_heads,
                feat_size,
                ratios=(1, 2) if stage + 1 < len(windows) else (1,),
                window_size=windows[stage],
                shift=index % 2 == 1,
                global_path=True,
                dynamic=dynamic,
                **args,
                **dd,
            )
        if mixer == 'key_only':
            return KeyOnlyAttention(dim, num_heads, kernel_size, **dd)
        gamma = 0. if mixer == 'elsa_no_ghost' else 1.
        return ElsaAttention(
            dim, num_heads, kernel_size, gamma=gamma, hadamard=mixer != 'elsa_query', **args, **dd)

    return factory


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to a model with the same mixer: patch embedding and tables of positions are resampled.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the shapes of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown, or a table is no table of distances.
    """
    out = {k: fit_positions(k, x, model) for k, x in unwrap(state_dict).items()}
    check_keys(out, model, optional='head.fc.')
    return fit_tables(out, model)


def _create_mixer_swin(variant: str, pretrained: bool = False, **kwargs) -> MixerSwin:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['depths']))))
    return build_model(
        MixerSwin,
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
        'paper_name': 'What Limits the Performance of Local Self-attention?', 'paper_ids': 'arXiv:2112.12786',
        **kwargs,
    }


# for training: there are no weights
default_cfgs = generate_default_cfgs({
    'mixer_swin_tiny': _cfg(),
    'test_mixer_swin': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def mixer_swin_tiny(pretrained: bool = False, **kwargs) -> MixerSwin:
    """Swin-T with the mixer `mixer=...` in every block, window attention with biases by default: 28.3 M parameters."""
    model_args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_mixer_swin('mixer_swin_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def test_mixer_swin(pretrained: bool = False, **kwargs) -> MixerSwin:
    """A small one for the study and for tests: under 1 M parameters, 64 pixels."""
    model_args = dict(
        img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=5, window_size=4,
        mlp_ratio=3.)
    return _create_mixer_swin('test_mixer_swin', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='mixer_swin',
    module=__name__,
    model_cls=MixerSwin,
    filter_fn=checkpoint_filter_fn,
))
