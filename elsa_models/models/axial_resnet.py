"""Axial-ResNet

A PyTorch impl of the classification models of `Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation` -
https://arxiv.org/abs/2003.07853: ResNets whose 3x3 convolutions are attention along the height, then along the width.
Written from the paper; reads the weights of the authors' release (https://github.com/csrhddlam/axial-deeplab,
Apache-2.0).
"""
import re
from functools import partial
from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers.axis import fit_table
from ..layers.mixers.axial import AxialAttention
from ._checkpoint import build_model, check_keys, unwrap
from ._family import Family, register_family
from ._resnet import MixerResNet, check_table, count_batches

__all__ = ['AxialResNet']  # model_registry will add each entrypoint fn to this

_NUM_HEADS = 8  # of all the authors' models
_TABLES = ('.rel_query', '.rel_key', '.rel_value')


class AxialResNet(MixerResNet):
    """A ResNet with axial attention in every bottleneck."""

    def __init__(
            self,
            depths: Tuple[int, ...] = (3, 4, 6, 3),
            width_factor: float = 0.5,
            num_heads: int = 8,
            pool: str = 'average',
            table_length: Optional[int] = None,
            beyond: str = 'clamp',
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
            depths: Blocks in each of the four stages.
            width_factor: Of all channels: 0.5 for S, 0.75 for M, 1 for L, 2 for XL.
            num_heads: Attention heads.
            pool: How attention takes strides: 'average' as the authors' PyTorch version, 'stride' as the paper.
            table_length: Pixels that all tables of positions cover, 255 in the authors' TensorFlow version; as many as
                maps of img_size have if None.
            beyond: What larger maps find in the tables: 'clamp', the value of the largest distance; or 'resample', the
                table stretched to the map.
            img_size: Height and width in pixels that the tables are made for. Images may be of any size from 32.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type.
            output_stride: Stride of the last stage: 8, 16 or 32. Later strides are left out.
            drop_rate: Dropout rate of the classifier.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            zero_init_last: Start with blocks that are their shortcuts.

        Raises:
            ValueError: An argument is none of those above.
        """
        if not width_factor > 0:
            raise ValueError(f'width_factor: got {width_factor!r}, must be positive.')
        mixer = partial(AxialAttention, num_heads=num_heads, pool=pool, table_length=table_length, beyond=beyond)
        super().__init__(
            mixers=[(mixer,) * depth for depth in depths],
            widths=[int(width * width_factor) for width in (256, 512, 1024, 2048)],
            bottle_ratio=0.5,
            stem_width=int(64 * width_factor),
            mixer_strides=True,
            norm_after_mixer=False,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            output_stride=output_stride,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            device=device,
            dtype=dtype,
        )


# the authors' names; `hight` is theirs
_RENAMES = (
    (r'^conv1\.', 'stem.conv1.conv.'),
    (r'^bn1\.', 'stem.conv1.bn.'),
    (r'^fc\.', 'head.fc.'),
    (r'^layer(\d+)\.', lambda m: f'stages.{int(m.group(1)) - 1}.'),
    (r'\.conv_down\.', '.conv1_1x1.conv.'),
    (r'^(stages\.\d+\.\d+)\.bn1\.', r'\1.conv1_1x1.bn.'),
    (r'\.hight_block\.', '.self_attn.height.'),
    (r'\.width_block\.', '.self_attn.width.'),
    (r'\.conv_up\.', '.conv3_1x1.conv.'),
    (r'^(stages\.\d+\.\d+)\.bn2\.', r'\1.conv3_1x1.bn.'),
    (r'\.downsample\.0\.', '.shortcut.conv.'),
    (r'\.downsample\.1\.', '.shortcut.bn.'),
)


def is_authors(state_dict: Dict[str, Any]) -> bool:
    """Whether a state dict has the names of the authors' PyTorch version."""
    return any(k.endswith('.qkv_transform.weight') for k in state_dict)


def _by_kind(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of query, key and value by head -> all queries, all keys, all values."""
    head_dim = x.shape[0] // num_heads // 2
    parts = x.unflatten(0, (num_heads, 2 * head_dim)).split([head_dim // 2, head_dim // 2, head_dim], dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def convert_authors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Rename and reorder the entries of the authors' PyTorch version. Their index of distances is left out.

    The order of channels and the direction of distances are those of their TensorFlow version here.
    """
    out = {}
    for key, x in state_dict.items():
        prefix, _, leaf = key.rpartition('.')
        for pattern, name in _RENAMES:
            key = re.sub(pattern, name, key)
        layer, _, norm = key.rpartition('.')[0].rpartition('.')
        is_count = leaf == 'num_batches_tracked'
        if leaf == 'flatten_index':
            continue
        elif norm in ('qkv_transform', 'bn_qkv'):
            similarity = state_dict.get(f'{prefix.rpartition(".")[0]}.bn_similarity.weight')
            num_heads = _NUM_HEADS if similarity is None else similarity.shape[0] // 3
            name = 'qkv' if norm == 'qkv_transform' else norm
            x = x.flatten(1) if x.dim() > 1 else x  # 1x1 convolution -> linear
            out[f'{layer}.{name}.{leaf}'] = x if is_count else _by_kind(x, num_heads)
        elif norm == 'bn_similarity':
            parts = (x,) * 3 if is_count else x.chunk(3)
            out.update({f'{layer}.{name}.{leaf}': part for name, part in zip(('bn_qk', 'bn_qr', 'bn_kr'), parts)})
        elif norm == 'bn_output':  # content and position alternate
            parts = (x,) * 2 if is_count else (x[0::2], x[1::2])
            out.update({f'{layer}.{name}.{leaf}': part for name, part in zip(('bn_content', 'bn_position'), parts)})
        elif leaf == 'relative':
            layer = key.rpartition('.')[0]
            query, key_, value = x.split([x.shape[0] // 4, x.shape[0] // 4, x.shape[0] // 2])
            out[f'{layer}.rel_query'], out[f'{layer}.rel_value'] = query.flip(1), value.flip(1)  # were query - key
            out[f'{layer}.rel_key'] = key_
        else:
            out[key] = x
    return out


def to_own_names(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of ours or of the authors, in the names of the models."""
    return convert_authors(state_dict) if is_authors(state_dict) else dict(state_dict)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint of ours or of the authors to the model.

    Tables of positions are fitted by distance: smaller ones take the central columns, larger ones what the model's
    `beyond` says.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown, or a table is no table of distances.
    """
    out = count_batches(to_own_names(unwrap(state_dict)), model)
    check_keys(out, model, optional='head.fc.')
    targets = model.state_dict()
    for name, x in out.items():
        if name.endswith(_TABLES):
            check_table(name, x, x.shape[-1])
            layer: Any = model.get_submodule(name.rpartition('.')[0])
            out[name] = fit_table(x, (targets[name].shape[-1] + 1) // 2, layer.beyond)
    return out


def _create_axial_resnet(variant: str, pretrained: bool = False, **kwargs) -> AxialResNet:
    return build_model(AxialResNet, variant, pretrained, feature_cfg=dict(flatten_sequential=True), **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0', 'origin_url': 'https://github.com/csrhddlam/axial-deeplab',
        'paper_name': 'Axial-DeepLab: Stand-Alone Axial-Attention for Panoptic Segmentation',
        'paper_ids': 'arXiv:2003.07853',
        **kwargs,
    }


# the authors' training checkpoint, which elsa_models.hub downloads and converts
default_cfgs = generate_default_cfgs({
    'axial_resnet26s.jhu_in1k': _cfg(url='https://www.cs.jhu.edu/~hwang157/axial26s.pth'),
    'axial_resnet50s': _cfg(),
    'axial_resnet50m': _cfg(),
    'axial_resnet50l': _cfg(),
    'test_axial_resnet': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def axial_resnet26s(pretrained: bool = False, **kwargs) -> AxialResNet:
    """Axial-ResNet-26-S, of which the authors released weights: 5.9 M parameters, 1.8 GMACs at 224."""
    model_args = dict(depths=(1, 2, 4, 1), width_factor=0.5)
    return _create_axial_resnet('axial_resnet26s', pretrained, **dict(model_args, **kwargs))


@register_model
def axial_resnet50s(pretrained: bool = False, **kwargs) -> AxialResNet:
    """Axial-ResNet-S of the paper, with a stem of convolution: 11.6 M parameters, 2.8 GMACs at 224."""
    model_args = dict(depths=(3, 4, 6, 3), width_factor=0.5)
    return _create_axial_resnet('axial_resnet50s', pretrained, **dict(model_args, **kwargs))


@register_model
def axial_resnet50m(pretrained: bool = False, **kwargs) -> AxialResNet:
    """Axial-ResNet-M of the paper, with a stem of convolution: 25.2 M parameters, 6.0 GMACs at 224."""
    model_args = dict(depths=(3, 4, 6, 3), width_factor=0.75)
    return _create_axial_resnet('axial_resnet50m', pretrained, **dict(model_args, **kwargs))


@register_model
def axial_resnet50l(pretrained: bool = False, **kwargs) -> AxialResNet:
    """Axial-ResNet-L of the paper, with a stem of convolution: 44.0 M parameters, 10.2 GMACs at 224."""
    model_args = dict(depths=(3, 4, 6, 3), width_factor=1.)
    return _create_axial_resnet('axial_resnet50l', pretrained, **dict(model_args, **kwargs))


@register_model
def test_axial_resnet(pretrained: bool = False, **kwargs) -> AxialResNet:
    """A small Axial-ResNet for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(img_size=64, depths=(1, 1, 1, 1), width_factor=0.125, num_heads=4)
    return _create_axial_resnet('test_axial_resnet', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='axial_resnet',
    module=__name__,
    model_cls=AxialResNet,
    filter_fn=checkpoint_filter_fn,
    to_own_names=to_own_names,
    is_authors=is_authors,
    marks=('rel_query',),
    first_conv='stem.conv1.conv',
    top1=dict(axial_resnet26s=75.8, axial_resnet50s=77.5),
))
