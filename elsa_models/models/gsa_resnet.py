"""GSA-ResNet

A PyTorch impl of `Global Self-Attention Networks for Image Recognition` - https://arxiv.org/abs/2010.03019: ResNets
whose 3x3 convolutions are global self-attention in linear time. Written from the paper. No weights were ever released.
"""
from functools import partial
from typing import Any, Dict, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers.mixers.gsa import GlobalSelfAttention, fit_positions
from ._checkpoint import build_model, check_keys, unwrap
from ._family import Family, register_family
from ._resnet import MixerResNet, check_table, count_batches, join_qkv

__all__ = ['GsaResNet']  # model_registry will add each entrypoint fn to this


class GsaResNet(MixerResNet):
    """A ResNet with global self-attention in every bottleneck."""

    def __init__(
            self,
            depths: Tuple[int, ...] = (3, 4, 6, 3),
            widths: Tuple[int, ...] = (256, 512, 1024, 2048),
            stem_width: int = 64,
            num_heads: int = 8,
            norm: str = 'between',
            share_norm: bool = False,
            beyond: str = 'zero',
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
            widths: Channels of each stage's output; attention has a quarter of them.
            stem_width: Channels of the stem.
            num_heads: Attention heads.
            norm: Where the batch norm of attention to positions is: 'between' columns and rows, 'after' both, 'none'.
            share_norm: Heads share a batch norm of one head's channels.
            beyond: What larger maps find in the tables of positions: 'zero' beyond the largest distance; or 'resample',
                the table stretched to the map and divided by as much.
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
        mixer = partial(GlobalSelfAttention, num_heads=num_heads, norm=norm, share_norm=share_norm, beyond=beyond)
        super().__init__(
            mixers=[(mixer,) * depth for depth in depths],
            widths=widths,
            stem_width=stem_width,
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


def fit_tables(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit the tables of positions in a checkpoint, by distance, to those of the model's `GlobalSelfAttention`.

    Raises:
        WeightsError: A table is no table of distances.
    """
    out, targets = dict(state_dict), model.state_dict()
    for name, x in state_dict.items():
        if name.endswith(('.rel_col', '.rel_row')):
            check_table(name, x, x.shape[0])
            mixer: Any = model.get_submodule(name.rpartition('.')[0])
            out[name] = fit_positions(x, (targets[name].shape[0] + 1) // 2, mixer.beyond)
    return out


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to the model.

    Tables of positions are fitted by distance: smaller ones take the central rows, larger ones what the model's
    `beyond` says.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown, or a table is no table of distances.
    """
    out = count_batches(join_qkv(unwrap(state_dict)), model)
    check_keys(out, model, optional='head.fc.')
    return fit_tables(out, model)


def _create_gsa_resnet(variant: str, pretrained: bool = False, **kwargs) -> GsaResNet:
    return build_model(GsaResNet, variant, pretrained, feature_cfg=dict(flatten_sequential=True), **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'head.fc',
        'paper_name': 'Global Self-Attention Networks for Image Recognition', 'paper_ids': 'arXiv:2010.03019',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'gsa_resnet26': _cfg(),
    'gsa_resnet38': _cfg(),
    'gsa_resnet50': _cfg(),
    'gsa_resnet101': _cfg(),
    'test_gsa_resnet': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def gsa_resnet26(pretrained: bool = False, **kwargs) -> GsaResNet:
    """GSA-ResNet-26 of the paper: 10.4 M parameters, 2.3 GMACs at 224."""
    return _create_gsa_resnet('gsa_resnet26', pretrained, **dict(dict(depths=(1, 2, 4, 1)), **kwargs))


@register_model
def gsa_resnet38(pretrained: bool = False, **kwargs) -> GsaResNet:
    """GSA-ResNet-38 of the paper: 14.2 M parameters, 3.0 GMACs at 224."""
    return _create_gsa_resnet('gsa_resnet38', pretrained, **dict(dict(depths=(2, 3, 5, 2)), **kwargs))


@register_model
def gsa_resnet50(pretrained: bool = False, **kwargs) -> GsaResNet:
    """GSA-ResNet-50 of the paper: 18.1 M parameters, 3.6 GMACs at 224."""
    return _create_gsa_resnet('gsa_resnet50', pretrained, **dict(dict(depths=(3, 4, 6, 3)), **kwargs))


@register_model
def gsa_resnet101(pretrained: bool = False, **kwargs) -> GsaResNet:
    """GSA-ResNet-101 of the paper: 30.4 M parameters, 6.1 GMACs at 224."""
    return _create_gsa_resnet('gsa_resnet101', pretrained, **dict(dict(depths=(3, 4, 23, 3)), **kwargs))


@register_model
def test_gsa_resnet(pretrained: bool = False, **kwargs) -> GsaResNet:
    """A small GSA-ResNet for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(img_size=64, depths=(1, 1, 1, 1), widths=(64, 96, 128, 192), stem_width=16, num_heads=4)
    return _create_gsa_resnet('test_gsa_resnet', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='gsa_resnet',
    module=__name__,
    model_cls=GsaResNet,
    filter_fn=checkpoint_filter_fn,
    to_own_names=join_qkv,
    marks=('rel_col', 'rel_row'),
    first_conv='stem.conv1.conv',
))
