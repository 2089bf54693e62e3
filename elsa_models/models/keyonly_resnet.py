"""Key-only ResNet

Convolutions and key-only attention in turn, in every stage of a ResNet. The idea of the alternation is that of the
abstract of `Rethinking Query-Key Pairwise Interactions in Vision Transformers` (https://arxiv.org/abs/2207.00188),
whose models are described publicly nowhere. These are ours, and its numbers do not hold for them.
"""
from typing import Any, Dict, Tuple, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from ..layers.mixers.key_only import KeyOnlyAttention
from ._checkpoint import build_model, check_keys, unwrap
from ._family import Family, register_family
from ._resnet import MixerResNet, count_batches

__all__ = ['KeyOnlyResNet']  # model_registry will add each entrypoint fn to this


class KeyOnlyResNet(MixerResNet):
    """A ResNet in whose stages every second bottleneck has key-only attention, the others a 3x3 convolution."""

    def __init__(
            self,
            depths: Tuple[int, ...] = (3, 4, 6, 3),
            widths: Tuple[int, ...] = (256, 512, 1024, 2048),
            stem_width: int = 64,
            num_heads: int = 8,
            kernel_size: int = 7,
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
            depths: Blocks in each of the four stages, which begin with a convolution.
            widths: Channels of each stage's output; convolutions and attention have a quarter of them.
            stem_width: Channels of the stem.
            num_heads: Attention heads.
            kernel_size: Odd side of the neighbourhood that attention means over.
            img_size: Height and width in pixels. Nothing depends on it: images may be of any size from 32.
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
        def mixer(dim: int, feat_size: Tuple[int, int], **dd) -> nn.Module:
            return KeyOnlyAttention(dim, num_heads, kernel_size, **dd)

        super().__init__(
            mixers=[tuple([mixer if j % 2 else None for j in range(depth)]) for depth in depths],
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


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to the model. Nothing is resampled: no weight depends on the size of images.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names of the model; those of the classifier are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown.
    """
    out = count_batches(unwrap(state_dict), model)
    check_keys(out, model, optional='head.fc.')
    return out


def _create_keyonly_resnet(variant: str, pretrained: bool = False, **kwargs) -> KeyOnlyResNet:
    return build_model(KeyOnlyResNet, variant, pretrained, feature_cfg=dict(flatten_sequential=True), **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'head.fc',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'keyonly_resnet50': _cfg(),
    'test_keyonly': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def keyonly_resnet50(pretrained: bool = False, **kwargs) -> KeyOnlyResNet:
    """ResNet-50 with key-only attention in every second bottleneck, a design of ours: 22.1 M parameters, 3.5 GMACs."""
    return _create_keyonly_resnet('keyonly_resnet50', pretrained, **dict(dict(depths=(3, 4, 6, 3)), **kwargs))


@register_model
def test_keyonly(pretrained: bool = False, **kwargs) -> KeyOnlyResNet:
    """A small key-only ResNet for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(img_size=64, depths=(2, 2, 2, 2), widths=(64, 96, 128, 192), stem_width=16, num_heads=4)
    return _create_keyonly_resnet('test_keyonly', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='keyonly_resnet',
    module=__name__,
    model_cls=KeyOnlyResNet,
    filter_fn=checkpoint_filter_fn,
    marks=('saliency.weight',),
    first_conv='stem.conv1.conv',
))
