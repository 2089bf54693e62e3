"""ELSA-Swin

A PyTorch impl of the classification models of `What Limits the Performance of Local Self-attention?` -
https://arxiv.org/abs/2112.12786: a Swin Transformer whose first three stages hold Enhanced Local Self-Attention and
whose last keeps Swin's window attention. Written from the paper; reads the weights of the authors' release
(https://github.com/damo-cv/ELSA, MIT).
"""
import re
from functools import partial
from typing import Any, Dict, Optional, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers import ElsaAttention, MixerBlock, WindowAttention
from ..layers.arguments import per_stage
from ._checkpoint import build_model, check_keys, fit_positions, unwrap
from ._family import Family, register_family
from ._swin_like import SwinLike, Windows, stage_windows

__all__ = ['ElsaSwin']  # model_registry will add each entrypoint fn to this

_int_or_pair = Union[int, Tuple[int, int]]

class ElsaSwin(SwinLike):
    """ELSA-Swin."""

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
            local_stages: Optional[Tuple[bool, ...]] = None,
            kernel_size: Union[int, Tuple[int, ...]] = 7,
            dilation: Union[int, Tuple[int, ...]] = 1,
            group_width: int = 8,
            lam: int = 0,
            gamma: float = 1.,
            qk_scale: float = 1.,
            window_size: Windows = 7,
            always_partition: bool = False,
            pad_before_shift: bool = False,
            shift_each_side: bool = True,
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
            local_stages: Stages that hold ELSA blocks, the rest hold window attention; all but the last if None.
            kernel_size: Side of ELSA's neighbourhood in pixels, odd, for all stages or one per stage.
            dilation: Distance between ELSA's taps in pixels, for all stages or one per stage.
            group_width: Channels per group of ELSA's K x K convolution.
            lam: Exponent of the ghost head's factor, a whole number.
            gamma: Weight of the ghost head's summand.
            qk_scale: Factor of the Hadamard product.
            window_size: Window size, an int or (h, w) for all stages or one per stage.
            always_partition: Cut into windows and shift even where one window covers the map.
            pad_before_shift: Pad maps that windows do not divide before the shift, not after it. With this,
                always_partition and dynamic_img_size, the last stage does at every size what that of the authors'
                detection backbone does; their classifier takes no such sizes.
            shift_each_side: Shift windows along every side of a map that one does not cover, as timm's Swin does. The
                authors' classifier shifts only where one covers neither side: their weights give their logits at sizes
                such as 224 x 448 with False.
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
        if local_stages is None:
            local_stages = (True,) * (num_stages - 1) + (False,)
        if len(local_stages) != num_stages:
            raise ValueError(
                f'local_stages: got {len(local_stages)} values, must be one for each of {num_stages} stages.')
        kernel_size = per_stage('kernel_size', kernel_size, num_stages)
        dilation = per_stage('dilation', dilation, num_stages)
        window_size = stage_windows(window_size, num_stages)
        args: Dict[str, Any] = dict(qkv_bias=qkv_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate)
        elsa_args = dict(group_width=group_width, lam=lam, gamma=gamma, qk_scale=qk_scale, **args)
        window_args = dict(
            always_partition=always_partition,
            pad_before_shift=pad_before_shift,
            shift_each_side=shift_each_side,
            dynamic=dynamic_img_size or not strict_img_size,
            **args,
        )

        def elsa(stage: int, dim: int, num_heads: int, index: int, feat_size: Tuple[int, int], **dd) -> ElsaAttention:
            return ElsaAttention(dim, num_heads, kernel_size[stage], dilation[stage], **elsa_args, **dd)

        def window(stage: int, dim: int, num_heads: int, index: int, **kwargs) -> WindowAttention:
            return WindowAttention(
                dim, num_heads, window_size=window_size[stage], shift=index % 2 == 1, **window_args, **kwargs)

        super().__init__(
            mixers=[partial(elsa if local else window, i) for i, local in enumerate(local_stages)],
            depths=depths,
            num_heads=num_heads,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            window_size=window_size,
            strict_img_size=strict_img_size,
            dynamic_img_size=dynamic_img_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            # as the authors draw the MLPs beside ELSA
            block_layer=[partial(MixerBlock, mlp_init_std=.02) if local else MixerBlock for local in local_stages],
            norm_layer=norm_layer,
            weight_init=weight_init,
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """None: the authors decay ghost matrices and relative position biases (timm's Swin spares the latter)."""
        return set()


# names of Swin's authors, who merge patches at the end of a stage and have no module around the classifier
_SWIN_RENAMES = (
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^layers\.(\d+)\.downsample\.', lambda m: f'layers.{int(m.group(1)) + 1}.downsample.'),
)
_ELSA_RENAMES = (
    (r'\.attn\.pre_proj\.', '.attn.qkv.'),
    (r'\.attn\.attn\.0\.', '.attn.attn_conv.'),
    (r'\.attn\.attn\.2\.', '.attn.attn_logits.'),
    (r'\.attn\.post_proj\.', '.attn.proj.'),
    (r'\.attn\.rb$', '.attn.relative_position_bias_table'),
    *_SWIN_RENAMES,
)
_SAVED_BUFFERS = ('.relative_position_index', '.relative_id', '.attn_mask')  # recomputed here


def _rename(key: str, renames: Tuple) -> str:
    for pattern, name in renames:
        key = re.sub(pattern, name, key)
    return key


def is_authors(state_dict: Dict[str, Any]) -> bool:
    """Whether a state dict has the names of the authors' ELSA-Swin."""
    return any(k.endswith('.attn.post_proj.weight') for k in state_dict)


def convert_authors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Rename and reorder the entries of the authors' ELSA-Swin, layer by layer. Saved buffers are left out."""
    out = {}
    for key, x in state_dict.items():
        if key.endswith(_SAVED_BUFFERS):
            continue
        if key.endswith('.ghost_head'):  # (1, C, K, K): the summand; (2, 1, C, K, K): factor and summand
            prefix = key[:-len('ghost_head')]
            if x.dim() == 5:
                out[prefix + 'ghost_mul'], out[prefix + 'ghost_add'] = x[0, 0], x[1, 0]
            else:
                out[prefix + 'ghost_add'] = x[0]
            continue
        if key.endswith('.attn.rb'):
            x = x.t().flip(0)  # (heads, offsets) by key - query -> (offsets, heads) by query - key
        elif '.attn.pre_proj.' in key and key.rpartition('.pre_proj.')[0] + '.rb' in state_dict:
            v, q, k = x.chunk(3)
            x = torch.cat([q, k, v])
        elif key.endswith(('.pre_proj.weight', '.attn.2.weight')):
            x = x.flatten(1)  # 1x1 convolution -> linear
        out[_rename(key, _ELSA_RENAMES)] = x
    return out


def to_own_names(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of a Swin or ELSA-Swin, by whomever, in timm's names and without saved buffers."""
    if is_authors(state_dict):
        return convert_authors(state_dict)
    renames = _SWIN_RENAMES if 'layers.0.downsample.reduction.weight' in state_dict else ()
    return {_rename(k, renames): x for k, x in state_dict.items() if not k.endswith(_SAVED_BUFFERS)}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint of ours or of the authors to the model.

    Position tables are resampled to the model's windows and the patch embedding to its patch size.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown; all are listed.
    """
    out = {k: fit_positions(k, x, model) for k, x in to_own_names(unwrap(state_dict)).items()}
    check_keys(out, model, optional='head.fc.')
    return out


def _create_elsa_swin(variant: str, pretrained: bool = False, **kwargs) -> ElsaSwin:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['depths']))))
    return build_model(
        ElsaSwin,
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
        'license': 'mit', 'origin_url': 'https://github.com/damo-cv/ELSA',
        'paper_name': 'What Limits the Performance of Local Self-attention?', 'paper_ids': 'arXiv:2112.12786',
        **kwargs,
    }


# the authors' training checkpoints, which elsa_models.hub downloads and converts
default_cfgs = generate_default_cfgs({
    'elsa_swin_tiny.damo_in1k': _cfg(url='https://drive.google.com/uc?id=1eM0FsRNEDX-NncIEfvl4yXOAJawy2Ls0'),
    'elsa_swin_small.damo_in1k': _cfg(url='https://drive.google.com/uc?id=186PDbqrt2hEg8r5aH45D5D6bO-EWJgcO'),
    'elsa_swin_base.damo_in1k': _cfg(url='https://drive.google.com/uc?id=1J42asBqLb6iiKaYQaeoS2UpT7kUSjBr9'),
    'test_elsa_swin': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def elsa_swin_tiny(pretrained: bool = False, **kwargs) -> ElsaSwin:
    """ELSA-Swin-T of the paper: 29.1 M parameters, 4.8 GMACs at 224."""
    model_args = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), group_width=4)
    return _create_elsa_swin('elsa_swin_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def elsa_swin_small(pretrained: bool = False, **kwargs) -> ElsaSwin:
    """ELSA-Swin-S of the paper: 52.9 M parameters, 9.6 GMACs at 224."""
    model_args = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_elsa_swin('elsa_swin_small', pretrained, **dict(model_args, **kwargs))


@register_model
def elsa_swin_base(pretrained: bool = False, **kwargs) -> ElsaSwin:
    """ELSA-Swin-B of the paper: 92.7 M parameters, 16.7 GMACs at 224."""
    model_args = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_elsa_swin('elsa_swin_base', pretrained, **dict(model_args, **kwargs))


@register_model
def test_elsa_swin(pretrained: bool = False, **kwargs) -> ElsaSwin:
    """A small ELSA-Swin for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(
        img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=5, window_size=2,
        mlp_ratio=3.)
    return _create_elsa_swin('test_elsa_swin', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='elsa_swin',
    module=__name__,
    model_cls=ElsaSwin,
    filter_fn=checkpoint_filter_fn,
    to_own_names=to_own_names,
    is_authors=is_authors,
    relatives={f'elsa_swin_{size}': f'swin_{size}_patch4_window7_224.ms_in1k' for size in ('tiny', 'small', 'base')},
    marks=('attn_conv.weight',),
    top1=dict(elsa_swin_tiny=82.7, elsa_swin_small=83.5, elsa_swin_base=84.0),
    dense_args=dict(always_partition=True, pad_before_shift=True),
    reads_dense=True,
))
