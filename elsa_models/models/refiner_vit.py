"""Refiner-ViT

A vision transformer whose attention maps are handed on from block to block, and refined by convolutions on the way.

Paper: `Refiner: Refining Self-attention for Vision Transformers` - https://arxiv.org/abs/2106.03714

The paper describes a refinement in every block. What the authors released refines in every second block the maps of the
block before, which alone fits the published numbers of parameters, and is what is here. Their code has no licence: this
file was written from a description of it, and gives its outputs.
"""
import logging
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.modules.module as hooks
from timm.layers import (
    DropPath,
    LayerScale,
    Mlp,
    get_device_dtype,
    resample_patch_embed,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import get_init_weights_vit
from torch.nn.utils import fuse_conv_bn_weights

from ..layers import check_size, pad_map
from ..layers.arguments import check_images, is_plain, pair, whole_number
from ..layers.block import drop_path_rates
from ..layers.mixers.refined import MapAttention, RefinedAttention, is_recorded
from ..layers.sizes import resample_positions, sizes_are_open
from ._checkpoint import build_model, check_keys, fit_positions, unwrap
from ._family import Family, register_family
from ._token_labels import TokenLabelModel

__all__ = ['RefinerVit']  # model_registry will add each entrypoint fn to this

_logger = logging.getLogger(__name__)

_int_or_pair = Union[int, Tuple[int, int]]

_POOLS = ('', 'avg', 'token')
# how positions are resized, by name: mode of torch's interpolate, align_corners, antialias
_INTERPOLATIONS = ('bicubic_antialias', 'bicubic', 'bilinear_corners')
_STEM_STRIDE = 2


def resample_tokens(
        pos_embed: torch.Tensor,
        grid_h: int,
        grid_w: int,
        H: int,
        W: int,
        interpolation: str,
) -> torch.Tensor:
    """Resize positions (1, 1 + grid_h * grid_w, C), that of the class token first, to (1, 1 + H * W, C).

    Args:
        pos_embed: Positions.
        grid_h: Rows of their grid.
        grid_w: Columns of their grid.
        H: New rows.
        W: New columns.
        interpolation: 'bicubic_antialias' is timm's, 'bicubic' that of the authors' fine-tuning, 'bilinear_corners',
            which aligns corners, an option of theirs in the network.
    """
    if not sizes_are_open():
        if grid_h == H and grid_w == W:
            return pos_embed
    C = pos_embed.shape[2]
    grid = pos_embed[:, 1:].reshape(1, grid_h, grid_w, C)
    if interpolation == 'bicubic_antialias':
        grid = resample_positions(grid, H, W)
    else:
        corners = interpolation == 'bilinear_corners'
        mode = 'bilinear' if corners else 'bicubic'
        planes = grid.permute(0, 3, 1, 2)
        if planes.dtype == torch.float16 or planes.dtype == torch.bfloat16:
            planes = planes.float()
        planes = F.interpolate(planes, size=[H, W], mode=mode, align_corners=corners)
        grid = planes.permute(0, 2, 3, 1).to(grid.dtype)
    return torch.cat([pos_embed[:, :1], grid.reshape(1, H * W, C)], dim=1)


# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('check_images')
torch.fx.wrap('check_size')
torch.fx.wrap('pad_map')
torch.fx.wrap('resample_tokens')


class RefinerStem(nn.Module):
    """Three convolutions, the first of stride 2, and one that makes patches, for images of any size.

    Images whose sides the patch size does not divide are padded with zeros on the right and at the bottom.
    """

    def __init__(
            self,
            img_size: _int_or_pair,
            patch_size: int = 16,
            in_chans: int = 3,
            hidden_dims: Tuple[int, int, int] = (32, 64, 128),
            embed_dim: int = 384,
            strict_img_size: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Height and width in pixels.
            patch_size: Patch size in pixels, even.
            in_chans: Number of image channels.
            hidden_dims: Channels of the three convolutions.
            embed_dim: Channels of the output.
            strict_img_size: Require the input to match img_size.

        Raises:
            ValueError: A size is no whole number, or patch_size is odd.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        img_size, patch_size = self._check_sizes(img_size, patch_size)
        self.strict_img_size = strict_img_size
        self._set_size(img_size, patch_size)
        self.conv1 = nn.Conv2d(in_chans, hidden_dims[0], 7, stride=_STEM_STRIDE, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dims[0], **dd)
        self.conv2 = nn.Conv2d(hidden_dims[0], hidden_dims[1], 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dims[1], **dd)
        self.conv3 = nn.Conv2d(hidden_dims[1], hidden_dims[2], 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(hidden_dims[2], **dd)
        self.act = nn.ReLU(inplace=True)
        kernel_size = patch_size // _STEM_STRIDE
        self.proj = nn.Conv2d(hidden_dims[2], embed_dim, kernel_size, stride=kernel_size, **dd)

    @staticmethod
    def _check_sizes(img_size: _int_or_pair, patch_size: int) -> Tuple[Tuple[int, int], int]:
        patch_size = whole_number('patch_size', patch_size)
        if patch_size % _STEM_STRIDE != 0:
            raise ValueError(f'patch_size: got {patch_size}, must be an even number.')
        return pair('img_size', img_size), patch_size

    def _set_size(self, img_size: Tuple[int, int], patch_size: int) -> None:
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = ((img_size[0] + patch_size - 1) // patch_size, (img_size[1] + patch_size - 1) // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def set_input_size(self, img_size: Optional[_int_or_pair] = None, patch_size: Optional[int] = None) -> None:
        """Change the size of image or patches; the projection is resampled to new patches.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.

        Raises:
            ValueError: A size is not as in the constructor; nothing has changed then.
        """
        img_size, patch_size = self._check_sizes(
            self.img_size if img_size is None else img_size,
            self.patch_size if patch_size is None else patch_size,
        )
        if patch_size != self.patch_size:
            kernel_size = (patch_size // _STEM_STRIDE, patch_size // _STEM_STRIDE)
            weight = self.proj.weight
            with torch.no_grad():
                resampled = resample_patch_embed(weight, list(kernel_size))
            self.proj.weight = nn.Parameter(resampled, requires_grad=weight.requires_grad)
            self.proj.kernel_size = self.proj.stride = kernel_size
        self._set_size(img_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to (B, ceil(H / patch_size), ceil(W / patch_size), embed_dim)."""
        check_images(x, getattr(self.conv1, 'in_channels', None))
        B, C, H, W = x.shape
        if self.strict_img_size:
            check_size(H, W, self.img_size[0], self.img_size[1])
        p = self.patch_size
        x = pad_map(x.permute(0, 2, 3, 1), (H + p - 1) // p * p, (W + p - 1) // p * p).permute(0, 3, 1, 2)
        if torch.jit.is_scripting():
            x = self.act(self.bn1(self.conv1(x)))
            x = self.act(self.bn2(self.conv2(x)))
            x = self.act(self.bn3(self.conv3(x)))
        else:
            for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
                x = self.act(self._normalised(conv, bn, x))
        return self.proj(x).permute(0, 2, 3, 1)

    @torch.jit.unused
    def _normalised(self, conv: nn.Module, bn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`bn(conv(x))`. Inference folds them: the maps here are the largest of the model, and one less is kept."""
        if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d) or not self._folds(conv, bn, x):
            return bn(conv(x))
        assert bn.running_mean is not None and bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)

    @torch.jit.unused
    def _folds(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: torch.Tensor) -> bool:
        plain = is_plain(conv, nn.Conv2d) and is_plain(bn, nn.BatchNorm2d)
        if not plain or torch.is_grad_enabled() or is_recorded(x):
            return False
        exact = conv.weight.dtype in (torch.float32, torch.float64)
        return exact and not bn.training and bn.running_mean is not None


class RefinerBlock(nn.Module):
    """`x + 2 * attn(norm1(x), maps)`, then `x + 2 * ls2(mlp(norm2(x)))`.

    The authors halve x before the norms, and double what is added. Half of x with an eps is x with four times the eps.
    """

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float = 3.,
            init_values: float = 1e-5,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            norm_eps: float = 1e-6,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            attn: Maps tokens and the maps of the block before to tokens and maps.
            mlp_ratio: Hidden channels of the MLP per channel.
            init_values: Initial factor of the MLP's output.
            proj_drop: Dropout rate of the MLP; attn has its own.
            drop_path: Stochastic depth rate of both branches.
            act_layer: Activation of the MLP.
            norm_layer: Normalisation, called with the number of channels and eps.
            norm_eps: The eps for half of x.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.norm1 = norm_layer(dim, eps=4. * norm_eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, eps=4. * norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.ls2 = LayerScale(dim, init_values=init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(
            self,
            x: torch.Tensor,
            maps: Optional[torch.Tensor] = None,
            may_overwrite: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map tokens (B, N, dim) and maps (B, num_heads, N, N) of the block before to tokens and maps handed on.

        With may_overwrite these may be in the place of the given ones.
        """
        if may_overwrite:
            out, maps = self.attn(self.norm1(x), maps, may_overwrite)
        else:
            out, maps = self.attn(self.norm1(x), maps)
        x = x + 2. * self.drop_path1(out)
        x = x + 2. * self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, maps


class RefinerVit(TokenLabelModel):
    """Refiner-ViT.

    Blocks 0, 2, 4, ... compute maps, to which they add a share of those before; blocks 1, 3, 5, ... apply these maps
    refined. Beside the class token's classifier there is one of the others, `aux_head`, whose maximum counts half.
    """
    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
            self,
            img_size: _int_or_pair = 224,
            patch_size: int = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            stem_dims: Tuple[int, int, int] = (32, 64, 128),
            embed_dim: int = 384,
            depth: int = 16,
            num_heads: int = 12,
            mlp_ratio: float = 3.,
            qkv_bias: bool = True,
            refine_ratio: float = 3.,
            init_values: float = 1e-5,
            pos_interpolation: str = 'bicubic_antialias',
            strict_img_size: bool = True,
            dynamic_img_size: bool = False,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            act_layer: Type[nn.Module] = nn.GELU,
            use_aux_head: bool = True,
            use_mix_token: bool = False,
            weight_init: str = '',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            img_size: Input height and width in pixels, any; what pads them to multiples of patch_size is tokens too.
            patch_size: Patch size in pixels, even.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type, 'token', 'avg' or ''.
            stem_dims: Channels of the three convolutions before the patches.
            embed_dim: Channels.
            depth: Blocks.
            num_heads: Attention heads.
            mlp_ratio: Hidden channels of the MLPs per channel.
            qkv_bias: Add a bias to query, key and value.
            refine_ratio: Expanded maps in a refinement per head.
            init_values: Initial factor of the MLPs' outputs.
            pos_interpolation: How positions are resized: 'bicubic_antialias' as in timm, 'bicubic' or
                'bilinear_corners', see `resample_tokens`.
            strict_img_size: Require the input to match img_size.
            dynamic_img_size: Accept any input size. Same as strict_img_size=False.
            drop_rate: Dropout rate of the classifier.
            pos_drop_rate: Dropout rate after the position embedding.
            proj_drop_rate: Dropout rate of the outputs of attention and MLPs.
            attn_drop_rate: Dropout rate of maps, not of refined ones.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            norm_layer: Normalisation layer, called with the number of channels and eps.
            act_layer: Activation of the MLPs.
            use_aux_head: Classify every token as well; `forward` adds half of the tokens' maximum to the logits.
            use_mix_token: Mix the images of a batch in `forward_train`; `forward` never does.
            weight_init: Weight init mode, 'skip' to leave it out.

        Raises:
            ValueError: An argument is none of those above, or two of them contradict.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        embed_dim, depth = whole_number('embed_dim', embed_dim), whole_number('depth', depth)
        self._check_pool(global_pool)
        if pos_interpolation not in _INTERPOLATIONS:
            raise ValueError(f'pos_interpolation: got {pos_interpolation!r}, must be one of {_INTERPOLATIONS}.')
        if len(stem_dims) != 3:
            raise ValueError(f'stem_dims: got {len(stem_dims)} values, must be three.')
        if use_mix_token and global_pool != 'token':
            raise ValueError(f'use_mix_token: got True, must be False for global_pool={global_pool!r}, not \'token\'.')
        strict_img_size = strict_img_size and not dynamic_img_size
        self.dynamic_img_size = not strict_img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.pos_interpolation = pos_interpolation
        self.mix_token = use_mix_token
        self.beta = 1.
        self.pooling_scale = 1
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.patch_embed: RefinerStem = RefinerStem(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            hidden_dims=stem_dims,
            embed_dim=embed_dim,
            strict_img_size=strict_img_size,
            **dd,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        attn_args = dict(dim=embed_dim, num_heads=num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd)
        blocks = []
        for i, rate in enumerate(drop_path_rates(drop_path_rate, [depth])[0]):
            attn: nn.Module
            if i % 2 == 0:
                attn = MapAttention(attn_drop=attn_drop_rate, **attn_args)
            else:
                attn = RefinedAttention(refine_ratio=refine_ratio, **attn_args)
            blocks.append(RefinerBlock(
                dim=embed_dim,
                attn=attn,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                proj_drop=proj_drop_rate,
                drop_path=rate,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            ))
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=self.patch_embed.patch_size, module=f'blocks.{i}') for i in range(depth)]

        self.norm = norm_layer(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.use_aux_head = use_aux_head
        self.aux_head = nn.Linear(embed_dim, num_classes, **dd) if use_aux_head and num_classes > 0 else None

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        self._reset_tokens()
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _reset_tokens(self) -> None:
        trunc_normal_(self.pos_embed, std=.02)
        trunc_normal_(self.cls_token, std=.02)

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise the model: linear layers as vision transformers, convolutions as PyTorch.

        Args:
            mode: Initialisation of timm's vision transformers, that of the constructor if empty.
            needs_reset: Also draw what constructors have drawn; needed after `to_empty()`.
        """
        self._reset_tokens()
        named_apply(get_init_weights_vit(mode or self.weight_init_mode, needs_reset=needs_reset), self)

    @torch.jit.ignore
    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in _POOLS:
            raise ValueError(f'global_pool: got {global_pool!r}, must be one of {_POOLS}.')

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        """Token and positions."""
        return {'pos_embed', 'cls_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Groups of parameters from the image to the classifier, as those of timm's vision transformers.

        Args:
            coarse: Blocks are groups either way.
        """
        return dict(
            stem=r'^cls_token|pos_embed|patch_embed',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them, pair of blocks by pair.

        Statistics of the batch norms count once, which plain checkpointing does not see to.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier of the class token."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier, and the aux head where there is one.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: New global pooling type, None keeps it.

        Raises:
            ValueError: The pooling type is unknown.
        """
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        self.aux_head = None
        if self.use_aux_head and num_classes > 0:
            self.aux_head = nn.Linear(self.num_features, num_classes, **dd)
            self.aux_head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: Optional[_int_or_pair] = None, patch_size: Optional[int] = None) -> None:
        """Change the size of image or patches; positions and patch embedding are resampled.

        With the number of tokens the statistics of the maps change. Those that training has left belong to the number
        before: train on, or find them anew by `elsa_models.reestimate_batch_norm`. A warning says so.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.

        Raises:
            ValueError: A size is not as in the constructor; nothing has changed then.
        """
        grid_h, grid_w = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        H, W = self.patch_embed.grid_size
        if (H, W) != (grid_h, grid_w):
            with torch.no_grad():
                pos_embed = resample_tokens(self.pos_embed, grid_h, grid_w, H, W, self.pos_interpolation)
            self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
            if H * W != grid_h * grid_w and self._has_statistics():
                _warn_of_statistics(1 + grid_h * grid_w, 1 + H * W)
        for info in self.feature_info:
            info['reduction'] = self.patch_embed.patch_size
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    @torch.jit.ignore
    def _has_statistics(self) -> bool:
        counts = [x for name, x in self.blocks.named_buffers() if name.endswith('num_batches_tracked')]
        return any(not x.is_meta and bool(x > 0) for x in counts)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (B, H, W, C) to tokens (B, 1 + H * W, C) with positions, the class token first."""
        B, H, W, C = x.shape
        pos_embed: torch.Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid_h, grid_w = self.patch_embed.grid_size
            pos_embed = resample_tokens(pos_embed, grid_h, grid_w, H, W, self.pos_interpolation)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(x + pos_embed)

    @torch.jit.ignore
    def _forward_pair(
            self,
            start: int,
            x: torch.Tensor,
            maps: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        for block in self.blocks[start:start + 2]:
            x, maps = block(x, maps)
        return x, maps

    @torch.jit.unused
    def _maps_are_its_own(self) -> bool:
        """Whether no hook or foreign module sees the maps on their way, and might keep them."""
        layers = [m for block in self.blocks for m in (block, getattr(block, 'attn', None))]
        own = all(type(m) in (RefinerBlock, MapAttention, RefinedAttention) for m in layers)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.blocks.modules())
        return own and not hooked and not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks

    def forward_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (B, H, W, C) to normalised tokens (B, 1 + H * W, C), the class token first."""
        x = self._embed(x)
        maps: Optional[torch.Tensor] = None
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for i in range(0, len(self.blocks), 2):
                x, maps = checkpoint(self._forward_pair, i, x, maps)
        elif not torch.jit.is_scripting() and self._maps_are_its_own():
            for block in self.blocks:
                x, maps = block(x, maps, True)
        else:
            for block in self.blocks:
                x, maps = block(x, maps)
        return self.norm(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to normalised tokens (B, 1 + N, C), the class token first."""
        return self.forward_patches(self.patch_embed(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens (B, 1 + N, C) to logits (B, num_classes), or with pre_logits to what the classifier is given."""
        pooled = x
        if self.global_pool == 'avg':
            pooled = x[:, 1:].mean(dim=1)
        elif self.global_pool == 'token':
            pooled = x[:, 0]
        pooled = self.head_drop(pooled)
        if pre_logits:
            return pooled
        out = self.head(pooled)
        if self.aux_head is not None and self.global_pool != '':
            out = out + 0.5 * self.aux_head(self.head_drop(x[:, 1:])).max(dim=1)[0]
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            return_attention: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Maps of features after each block.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return the class token (B, 1, C) beside each, as a tuple.
            norm: Apply the final norm to all.
            stop_early: Stop after the last block that is taken.
            output_fmt: 'NCHW', or 'NLC' for tokens without the class token.
            intermediates_only: Return the features only.
            return_attention: Return the attention (B, num_heads, 1 + N, 1 + N) that the block applied to its values
                beside each, as the last of a tuple: maps as they are handed on in blocks 0, 2, 4, ..., refined ones in
                blocks 1, 3, 5, ... Rows are queries and do not sum to 1.

        Returns:
            Features (B, C, H, W) or (B, H * W, C), alone or in tuples, or the tokens of `forward_features` and these.

        Raises:
            ValueError: output_fmt is none of the two.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt: got \'{output_fmt}\', must be \'NCHW\' or \'NLC\'.')
        intermediates: List[torch.Tensor] = []
        attentions: List[torch.Tensor] = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self.patch_embed(x)
        B, H, W, C = x.shape
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            blocks = self.blocks
        else:
            blocks = self.blocks[:max_index + 1]
        maps: Optional[torch.Tensor] = None
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, maps = checkpoint(block, x, maps)
            else:
                x, maps = block(x, maps)
            if i in take_indices:
                intermediates.append(self.norm(x) if norm else x)
                if not torch.jit.is_scripting() and return_attention:
                    attentions.append(_applied_maps(block, maps))

        prefix_tokens = [y[:, :1] for y in intermediates]
        intermediates = [y[:, 1:] for y in intermediates]
        if output_fmt == 'NCHW':
            intermediates = [y.reshape(B, H, W, C).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        if not torch.jit.is_scripting() and (return_prefix_tokens or return_attention):
            columns = [intermediates]
            columns += [prefix_tokens] if return_prefix_tokens else []
            columns += [attentions] if return_attention else []
            intermediates = _rows(columns)
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what the features of the given blocks do not need.

        Args:
            indices: Take last n blocks if int, select matching indices if sequence.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifiers.

        Returns:
            Indices of the blocks that are taken.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices


def _applied_maps(block: nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """What a block applied to its values, of the maps that it handed on: in every second one these refined."""
    refine = getattr(block.attn, 'refine', None)
    return maps if refine is None else refine(maps)


def _rows(columns: List[List[torch.Tensor]]) -> List[Any]:
    """Tuples, each of one entry of every column."""
    return list(zip(*columns))


def _warn_of_statistics(before: int, after: int) -> None:
    _logger.warning(
        'Statistics of the batch norms on attention maps belong to %d tokens, there are %d now: accuracy is lost until '
        'the model is trained on, or elsa_models.reestimate_batch_norm(model, batches) has seen a few hundred images.',
        before, after)


# the authors' names of modules, and ours
_AUTHORS_NAMES = {
    '.attn.DLA.conv_exp.': '.attn.refine.expand.',
    '.attn.DLA.bn1.': '.attn.refine.bn1.',
    '.attn.DLA.depth_sep_conv.': '.attn.refine.conv.',
    '.attn.DLA.bn2.': '.attn.refine.bn2.',
    '.attn.DLA.conv_pro.': '.attn.refine.reduce.',
    '.attn.DLA.bn3.': '.attn.refine.bn3.',
    '.attn.adapt_bn.': '.attn.refine.bn4.',
}


def is_authors(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has the names of the authors' release."""
    return any('.attn.DLA.' in name for name in state_dict)


def to_own_names(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Give a state dict of the authors' the names of ours; others stay as they are."""
    if not is_authors(state_dict):
        return dict(state_dict)
    refined = {name.partition('.DLA.')[0] for name in state_dict if '.attn.DLA.' in name}
    out = {}
    for name, x in state_dict.items():
        for theirs, ours in _AUTHORS_NAMES.items():
            name = name.replace(theirs, ours)
        prefix, _, leaf = name.rpartition('.qkv.')
        if prefix in refined:  # blocks without queries and keys, for all their name
            name = f'{prefix}.v.{leaf}'
        if name.endswith('.mlp.scale_channel'):
            name = name.replace('.mlp.scale_channel', '.ls2.gamma')
        out[name] = x
    return out


def _source_grid(num_patches: int, model: RefinerVit) -> Optional[Tuple[int, int]]:
    """Grid of a checkpoint's positions: the one that its config names, the model's, or a square."""
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    p = model.patch_embed.patch_size
    grids = [model.patch_embed.grid_size]
    if size is not None:
        h, w = pair('img_size', size)
        grids.insert(0, ((h + p - 1) // p, (w + p - 1) // p))
    for grid in grids:
        if grid[0] * grid[1] == num_patches:
            return grid
    side = int(num_patches ** .5 + .5)
    return (side, side) if side * side == num_patches else None


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: RefinerVit) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint, ours or the authors', to the model's names and input size.

    Positions are resampled to the model's grid, as its pos_interpolation says, and the patch embedding to its patch
    size. An aux head that the model does without is dropped; one that the file lacks is for the caller to judge, as the
    classifiers are.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model.

    Raises:
        WeightsError: Entries are missing or unknown; all are listed.
    """
    out = {
        k: fit_positions(k, x, model) for k, x in to_own_names(unwrap(state_dict)).items()
        if model.aux_head is not None or not k.startswith('aux_head.')}
    pos_embed = out.get('pos_embed')
    if pos_embed is not None and pos_embed.dim() == 3 and pos_embed.shape[2] == model.embed_dim:
        H, W = model.patch_embed.grid_size
        grid = _source_grid(pos_embed.shape[1] - 1, model)
        if grid is not None:
            out['pos_embed'] = resample_tokens(pos_embed, grid[0], grid[1], H, W, model.pos_interpolation)
            if pos_embed.shape != out['pos_embed'].shape:
                _warn_of_statistics(pos_embed.shape[1], 1 + H * W)
    check_keys(out, model, optional=('head.', 'aux_head.'))
    return out


def _create_refiner_vit(variant: str, pretrained: bool = False, **kwargs) -> RefinerVit:
    out_indices = kwargs.pop('out_indices', 3)
    return build_model(
        RefinerVit,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(size: int = 224, **kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': None,
        'crop_pct': 1., 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': (.5, .5, .5), 'std': (.5, .5, .5),
        'first_conv': 'patch_embed.conv1', 'classifier': ('head', 'aux_head'),
        'paper_name': 'Refiner: Refining Self-attention for Vision Transformers', 'paper_ids': 'arXiv:2106.03714',
        'origin_url': 'https://github.com/zhoudaquan/Refiner_ViT',
        **kwargs,
    }


# crops are the authors', but for 1.13 of the large models: that would resize to 198 pixels and pad to 224
default_cfgs = generate_default_cfgs({
    'refiner_vit_small_patch16_224': _cfg(crop_pct=.9),
    'refiner_vit_small_patch16_384': _cfg(384),
    'refiner_vit_medium_patch16_224': _cfg(),
    'refiner_vit_medium_patch16_384': _cfg(384),
    'refiner_vit_large_patch16_224': _cfg(),
    'refiner_vit_large_patch16_384': _cfg(384),
    'refiner_vit_large_patch16_448': _cfg(448),
    'test_refiner_vit': _cfg(64),
})

_SMALL = dict(embed_dim=384, depth=16, num_heads=12)
_MEDIUM = dict(embed_dim=420, depth=32, num_heads=12)
_LARGE = dict(embed_dim=512, depth=32, num_heads=16)


@register_model
def refiner_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-S at 224: 25.4 M parameters, 6.8 GMACs."""
    return _create_refiner_vit('refiner_vit_small_patch16_224', pretrained, **dict(_SMALL, **kwargs))


@register_model
def refiner_vit_small_patch16_384(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-S at 384: 25.6 M parameters, 24.1 GMACs."""
    return _create_refiner_vit('refiner_vit_small_patch16_384', pretrained, **dict(_SMALL, **kwargs))


@register_model
def refiner_vit_medium_patch16_224(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-M at 224: 55.5 M parameters, 13.5 GMACs."""
    return _create_refiner_vit('refiner_vit_medium_patch16_224', pretrained, **dict(_MEDIUM, **kwargs))


@register_model
def refiner_vit_medium_patch16_384(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-M at 384: 55.6 M parameters, 48.2 GMACs."""
    return _create_refiner_vit('refiner_vit_medium_patch16_384', pretrained, **dict(_MEDIUM, **kwargs))


@register_model
def refiner_vit_large_patch16_224(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-L at 224: 81.2 M parameters, 19.2 GMACs."""
    return _create_refiner_vit('refiner_vit_large_patch16_224', pretrained, **dict(_LARGE, **kwargs))


@register_model
def refiner_vit_large_patch16_384(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-L at 384: 81.3 M parameters, 68.5 GMACs."""
    return _create_refiner_vit('refiner_vit_large_patch16_384', pretrained, **dict(_LARGE, **kwargs))


@register_model
def refiner_vit_large_patch16_448(pretrained: bool = False, **kwargs) -> RefinerVit:
    """Refiner-ViT-L at 448: 81.5 M parameters, 102.4 GMACs."""
    return _create_refiner_vit('refiner_vit_large_patch16_448', pretrained, **dict(_LARGE, **kwargs))


@register_model
def test_refiner_vit(pretrained: bool = False, **kwargs) -> RefinerVit:
    """A small Refiner-ViT for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(img_size=64, patch_size=8, stem_dims=(16, 32, 64), embed_dim=64, depth=4, num_heads=4)
    return _create_refiner_vit('test_refiner_vit', pretrained, **dict(model_args, **kwargs))


# the paper's, trained with token labels of an NFNet; the last with the aux head
_TOP1 = {
    'refiner_vit_small_patch16_224': 83.6,
    'refiner_vit_small_patch16_384': 84.6,
    'refiner_vit_medium_patch16_224': 84.6,
    'refiner_vit_medium_patch16_384': 85.6,
    'refiner_vit_large_patch16_224': 84.9,
    'refiner_vit_large_patch16_384': 85.8,
    'refiner_vit_large_patch16_448': 86.0,
}

register_family(Family(
    name='refiner_vit',
    module=__name__,
    model_cls=RefinerVit,
    filter_fn=checkpoint_filter_fn,
    to_own_names=to_own_names,
    is_authors=is_authors,
    top1=_TOP1,
    first_conv='patch_embed.conv1',
    classifiers=('head', 'aux_head'),
))
