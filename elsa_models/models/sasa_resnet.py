"""SASA-ResNet

A PyTorch impl of `Stand-Alone Self-Attention in Vision Models` - https://arxiv.org/abs/1906.05909: ResNets whose 3x3
convolutions are local self-attention. Written from the paper. No code or weights were ever released.
"""
from typing import Any, Dict, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model

from ..layers.arguments import whole_number
from ..layers.mixers.sasa import StandAloneSelfAttention
from ..layers.sizes import pad_map
from ._checkpoint import build_model, check_keys, unwrap
from ._family import Family, register_family
from ._resnet import MixerResNet, check_image_size, count_batches, join_qkv

__all__ = ['SasaResNet']  # model_registry will add each entrypoint fn to this

_STEMS = ('conv', 'attention')
_STEM_BLOCK = 4  # pixels a side

# leaves of symbolic traces
torch.fx.wrap('check_image_size')
torch.fx.wrap('pad_map')


class AttentionStem(nn.Module):
    """Attention within blocks of 4 x 4 pixels, batch norm, and the maximum over each block (paper, appendix).

    Every pixel attends to the 16 of its block. What a pixel of the block is worth depends on its place: its value is
    a mixture of linear maps, `v = sum_m softmax_m((row[a] + column[b]) . nu[m]) W[m] x`, the same for all heads.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            num_heads: int = 4,
            num_mixtures: int = 4,
            embed_dim: int = 16,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chans: Number of input image channels.
            dim: Channels of the output.
            num_heads: Heads, a divisor of dim.
            num_mixtures: Matrices that values are mixed of.
            embed_dim: Channels of the positions that mix them.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('stem_width', dim), whole_number('stem_heads', num_heads)
        num_mixtures = whole_number('stem_mixtures', num_mixtures)
        embed_dim = whole_number('stem_embed_dim', embed_dim)
        if dim % num_heads != 0:
            raise ValueError(f'stem_heads: got {num_heads}, must be a divisor of stem_width, which is {dim}.')
        self.in_chans = in_chans
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(dim, in_chans, **dd))
        self.key = nn.Parameter(torch.empty(dim, in_chans, **dd))
        self.value = nn.Parameter(torch.empty(num_mixtures, dim, in_chans, **dd))
        self.mixture = nn.Parameter(torch.empty(num_mixtures, embed_dim, **dd))
        self.embed_row = nn.Parameter(torch.empty(_STEM_BLOCK, embed_dim, **dd))
        self.embed_col = nn.Parameter(torch.empty(_STEM_BLOCK, embed_dim, **dd))
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.pool = nn.MaxPool2d(_STEM_BLOCK, ceil_mode=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that variances are kept; the paper says nothing."""
        for weight in (self.query, self.key, self.value):
            trunc_normal_(weight, std=weight.shape[-1] ** -.5)
        for weight in (self.mixture, self.embed_row, self.embed_col):
            trunc_normal_(weight, std=weight.shape[-1] ** -.25)  # products of order one
        self.bn.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, dim, ceil(H / 4), ceil(W / 4)).

        Raises:
            ValueError: Images are smaller than 32 pixels.
        """
        check_image_size(x, self.in_chans)
        B, C, H, W = x.shape
        G = self.num_heads
        n_h, n_w = (H + 3) // 4, (W + 3) // 4
        x = pad_map(x.permute(0, 2, 3, 1), 4 * n_h, 4 * n_w)
        x = x.reshape(B, n_h, 4, n_w, 4, C).permute(2, 4, 0, 1, 3, 5).reshape(16, B * n_h * n_w, C)
        places = (self.embed_row.unsqueeze(1) + self.embed_col).flatten(0, 1)
        mixing = (places @ self.mixture.t()).softmax(dim=-1)  # 16, num_mixtures
        value = (mixing @ self.value.flatten(1)).unflatten(-1, (-1, C))  # 16, dim, in_chans
        q, k, v = F.linear(x, self.query), F.linear(x, self.key), torch.bmm(x, value.transpose(1, 2))
        q = q.unflatten(-1, (G, -1)).permute(1, 2, 0, 3)  # blocks, heads, 16, channels
        k = k.unflatten(-1, (G, -1)).permute(1, 2, 3, 0)
        v = v.unflatten(-1, (G, -1)).permute(1, 2, 0, 3)
        x = (q @ k).softmax(dim=-1) @ v
        x = x.reshape(B, n_h, n_w, G, 4, 4, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, 4 * n_h, 4 * n_w, -1)
        x = x[:, :H, :W].permute(0, 3, 1, 2)
        return self.pool(self.bn(x))


class SasaResNet(MixerResNet):
    """A ResNet with stand-alone self-attention in its bottlenecks, or in those of its later stages."""

    def __init__(
            self,
            depths: Tuple[int, ...] = (3, 4, 6, 3),
            widths: Tuple[int, ...] = (256, 512, 1024, 2048),
            stem_width: int = 64,
            num_heads: int = 8,
            kernel_size: int = 7,
            border: str = 'zero',
            conv_stages: int = 0,
            stem: str = 'conv',
            stem_heads: int = 4,
            stem_mixtures: int = 4,
            stem_embed_dim: int = 16,
            img_size: Union[int, Tuple[int, int]] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: int = 32,
            drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
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
            kernel_size: Odd side of the neighbourhood that a pixel attends to.
            border: What pixels outside the map are: 'zero' keys and values of zero, or 'mask' left out.
            conv_stages: The first so many stages keep their 3x3 convolutions. The paper's best trade-off is 2.
            stem: 'conv', that of ResNets, or 'attention', with which the network has no spatial convolution at all.
            stem_heads: Heads of the attention stem.
            stem_mixtures: Matrices that the attention stem mixes values of. The paper does not say how many.
            stem_embed_dim: Channels of the positions that mix them. The paper does not say how many.
            img_size: Height and width in pixels. Nothing depends on it: images may be of any size from 32.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type.
            output_stride: Stride of the last stage: 8, 16 or 32. Later strides are left out.
            drop_rate: Dropout rate of the classifier.
            attn_drop_rate: Dropout rate of the attention weights.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            zero_init_last: Start with blocks that are their shortcuts.

        Raises:
            ValueError: An argument is none of those above.
        """
        if stem not in _STEMS:
            raise ValueError(f'stem: got {stem!r}, must be one of {", ".join(_STEMS)}.')
        if whole_number('conv_stages', conv_stages, 0) > len(depths):
            raise ValueError(f'conv_stages: got {conv_stages}, must be at most {len(depths)}, the number of stages.')

        def mixer(dim: int, feat_size: Tuple[int, int], **dd) -> nn.Module:
            return StandAloneSelfAttention(dim, num_heads, kernel_size, 1, border, attn_drop_rate, **dd)

        super().__init__(
            mixers=[(None if i < conv_stages else mixer,) * depth for i, depth in enumerate(depths)],
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
        if stem == 'attention':
            self.stem = AttentionStem(
                in_chans, stem_width, stem_heads, stem_mixtures, stem_embed_dim, device=device, dtype=dtype)
            self.feature_info[0] = dict(num_chs=stem_width, reduction=4, module='stem', stage=0)

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """See `MixerResNet.init_weights`; an attention stem initialises itself."""
        super().init_weights(mode, needs_reset)
        if isinstance(self.stem, AttentionStem):
            self.stem.reset_parameters()


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
    out = count_batches(join_qkv(unwrap(state_dict)), model)
    check_keys(out, model, optional='head.fc.')
    return out


def _create_sasa_resnet(variant: str, pretrained: bool = False, **kwargs) -> SasaResNet:
    return build_model(SasaResNet, variant, pretrained, feature_cfg=dict(flatten_sequential=True), **kwargs)


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': .875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1.conv', 'classifier': 'head.fc',
        'paper_name': 'Stand-Alone Self-Attention in Vision Models', 'paper_ids': 'arXiv:1906.05909',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'sasa_resnet26': _cfg(),
    'sasa_resnet38': _cfg(),
    'sasa_resnet50': _cfg(),
    'test_sasa_resnet': _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})


@register_model
def sasa_resnet26(pretrained: bool = False, **kwargs) -> SasaResNet:
    """SASA-ResNet-26 of the paper, with its convolutional stem: 10.3 M parameters, 2.2 GMACs at 224."""
    return _create_sasa_resnet('sasa_resnet26', pretrained, **dict(dict(depths=(1, 2, 4, 1)), **kwargs))


@register_model
def sasa_resnet38(pretrained: bool = False, **kwargs) -> SasaResNet:
    """SASA-ResNet-38 of the paper, with its convolutional stem: 14.2 M parameters, 2.8 GMACs at 224."""
    return _create_sasa_resnet('sasa_resnet38', pretrained, **dict(dict(depths=(2, 3, 5, 2)), **kwargs))


@register_model
def sasa_resnet50(pretrained: bool = False, **kwargs) -> SasaResNet:
    """SASA-ResNet-50 of the paper, with its convolutional stem: 18.0 M parameters, 3.4 GMACs at 224."""
    return _create_sasa_resnet('sasa_resnet50', pretrained, **dict(dict(depths=(3, 4, 6, 3)), **kwargs))


@register_model
def test_sasa_resnet(pretrained: bool = False, **kwargs) -> SasaResNet:
    """A small SASA-ResNet for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(img_size=64, depths=(1, 1, 1, 1), widths=(64, 96, 128, 192), stem_width=16, num_heads=4)
    return _create_sasa_resnet('test_sasa_resnet', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='sasa_resnet',
    module=__name__,
    model_cls=SasaResNet,
    filter_fn=checkpoint_filter_fn,
    to_own_names=join_qkv,
    marks=('rel_col', 'rel_row'),
    first_conv='stem.conv1.conv',
    top1=dict(sasa_resnet26=75.8, sasa_resnet38=77.1, sasa_resnet50=77.4),
))
