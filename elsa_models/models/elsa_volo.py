"""ELSA-VOLO

The VOLO variant of `What Limits the Performance of Local Self-attention?` - https://arxiv.org/abs/2112.12786: the
Outlookers of VOLO's first stage give way to Enhanced Local Self-Attention, the rest is `VOLO: Vision Outlooker for
Visual Recognition` - https://arxiv.org/abs/2106.13112.

The authors published results of ELSA-VOLO-D1 and D5, but neither code nor weights. What the paper does not say is
inferred from the defaults of their released attention and from VOLO, and is an argument of `ElsaVolo`.
"""
import math
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, resample_abs_pos_embed_nhwc, trunc_normal_
from timm.models import checkpoint_seq, generate_default_cfgs, named_apply, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import get_init_weights_vit
from timm.models.volo import ClassBlock, Transformer

from ..layers import ElsaBlock, PaddedConvStem, PaddedDownsample
from ..layers.arguments import per_stage, whole_number
from ..layers.block import drop_path_rates
from ..layers.sizes import resample_positions
from ._checkpoint import build_model, check_keys, fit_positions, unwrap
from ._family import Family, register_family
from ._token_labels import TokenLabelModel

__all__ = ['ElsaVolo']  # model_registry will add each entrypoint fn to this

_int_or_pair = Union[int, Tuple[int, int]]

_POOLS = ('', 'avg', 'token')

# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('resample_positions')


class ElsaVolo(TokenLabelModel):
    """ELSA-VOLO, with the names of timm's `VOLO`, whose global and class attention it holds."""
    pos_embed: Optional[torch.Tensor]

    def __init__(
            self,
            layers: Tuple[int, ...] = (4, 4, 8, 2),
            img_size: _int_or_pair = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            patch_size: int = 8,
            stem_hidden_dim: int = 64,
            embed_dims: Tuple[int, ...] = (192, 384, 384, 384),
            num_heads: Tuple[int, ...] = (6, 12, 12, 12),
            downsamples: Tuple[bool, ...] = (True, False, False, False),
            local_stages: Tuple[bool, ...] = (True, False, False, False),
            kernel_size: Union[int, Tuple[int, ...]] = 5,
            dilation: Union[int, Tuple[int, ...]] = 1,
            group_width: int = 8,
            lam: int = 1,
            gamma: float = 1.,
            qk_scale: float = 1.,
            local_qkv_bias: Optional[bool] = None,
            local_drop_path_rate: float = 0.,
            strict_img_size: bool = True,
            dynamic_img_size: bool = False,
            mlp_ratio: Union[float, Tuple[float, ...]] = 3.,
            qkv_bias: bool = False,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            num_class_blocks: int = 2,
            use_aux_head: bool = True,
            use_mix_token: bool = False,
            weight_init: str = '',
            device=None,
            dtype=None,
    ) -> None:
        """
        Published are the place of the ELSA blocks and the ImageNet top-1 of D1 and D5. Inferred, with medium
        confidence, are kernel_size, group_width, lam, gamma, qk_scale, local_qkv_bias, local_drop_path_rate, and that
        heads and MLP ratios of the first stage are VOLO's.

        Args:
            layers: Blocks in each stage.
            img_size: Input height and width in pixels, any size of at least one token.
            in_chans: Number of input image channels.
            num_classes: Number of classes for classification head.
            global_pool: Global pooling type, 'token', 'avg' or ''.
            patch_size: Patch size in pixels, 4, 8 or 16.
            stem_hidden_dim: Channels of the convolutions in the patch embedding.
            embed_dims: Channels of each stage.
            num_heads: Attention heads in each stage.
            downsamples: Halve the map after each stage.
            local_stages: Stages that hold ELSA blocks, the rest hold global attention. The position embedding is added
                before the first of the latter.
            kernel_size: Side of ELSA's neighbourhood in pixels, odd, for all stages or one per stage.
            dilation: Distance between ELSA's taps in pixels, for all stages or one per stage.
            group_width: Channels per group of ELSA's K x K convolution.
            lam: Exponent of the ghost head's factor, a whole number.
            gamma: Weight of the ghost head's summand.
            qk_scale: Factor of the Hadamard product.
            local_qkv_bias: Add a bias to query, key and value of ELSA blocks; as qkv_bias if None.
            local_drop_path_rate: As drop_path_rate, for the ELSA blocks, which VOLO's rate leaves out.
            strict_img_size: Require the input to match img_size.
            dynamic_img_size: Accept any input size. Same as strict_img_size=False.
            mlp_ratio: Hidden channels of the MLPs per channel, for all stages or one per stage.
            qkv_bias: Add a bias to query, key and value.
            drop_rate: Dropout rate of the classifier.
            pos_drop_rate: Dropout rate after the position embedding.
            attn_drop_rate: Dropout rate of attention weights.
            drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0 at the first.
            norm_layer: Normalisation layer.
            num_class_blocks: Class attention blocks; without any there is no class token.
            use_aux_head: Classify every token as well; `forward` adds half of the tokens' maximum to the logits.
            use_mix_token: Mix the images of a batch in `forward_train`; `forward` never does.
            weight_init: Weight init mode, 'skip' to leave it out.

        Raises:
            ValueError: An argument is none of those above, or two of them contradict.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        num_stages = len(layers)
        for name, values in (
                ('embed_dims', embed_dims),
                ('num_heads', num_heads),
                ('downsamples', downsamples),
                ('local_stages', local_stages),
        ):
            if len(values) != num_stages:
                raise ValueError(f'{name}: got {len(values)} values, must be one for each of {num_stages} stages.')
        if all(local_stages):
            raise ValueError('local_stages: got no stage of global attention, must be at least one.')
        if downsamples[-1]:
            raise ValueError('downsamples: got True for the last stage, must be False: nothing follows it.')
        for i in range(num_stages - 1):
            if embed_dims[i] != embed_dims[i + 1] and not downsamples[i]:
                raise ValueError(
                    f'embed_dims: got {embed_dims[i]} and {embed_dims[i + 1]} for stages {i} and {i + 1}, must be '
                    f'equal where downsamples has no True between them.')
        if num_class_blocks < 1 and (global_pool == 'token' or use_aux_head or use_mix_token):
            raise ValueError(
                'num_class_blocks: got 0, which leaves no class token. Must be at least 1 for global_pool=\'token\', '
                'use_aux_head and use_mix_token.')
        if use_mix_token and global_pool != 'token':
            raise ValueError(f'use_mix_token: got True, must be False for global_pool={global_pool!r}, not \'token\'.')
        self._check_pool(global_pool)
        kernel_size = per_stage('kernel_size', kernel_size, num_stages)
        dilation = per_stage('dilation', dilation, num_stages)
        mlp_ratio = per_stage('mlp_ratio', mlp_ratio, num_stages)
        layers = tuple([whole_number('layers', n) for n in layers])
        embed_dims = tuple([whole_number('embed_dims', dim) for dim in embed_dims])
        strict_img_size = strict_img_size and not dynamic_img_size
        self.dynamic_img_size = not strict_img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.mix_token = use_mix_token
        self.beta = 1.0  # MixToken draws the mixed share from Beta(beta, beta)
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.pooling_scale = 2 ** sum(downsamples)
        self.grad_checkpointing = False

        self.patch_embed: PaddedConvStem = PaddedConvStem(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            hidden_dim=stem_hidden_dim,
            embed_dim=embed_dims[0],
            strict_img_size=strict_img_size,
            token_stride=self.pooling_scale,
            **dd,
        )

        # VOLO spares its first stage stochastic depth; the rates of both kinds rise over all blocks
        drop_path = drop_path_rates(drop_path_rate, layers)
        local_drop_path = drop_path_rates(local_drop_path_rate, layers)
        network: List[nn.Module] = []
        self.stage_ends = []
        self.feature_info = []
        self._reductions = []  # in patches, of each stage
        first_global = local_stages.index(False)
        for i in range(num_stages):
            block_args: Dict[str, Any] = dict(
                dim=embed_dims[i],
                num_heads=num_heads[i],
                mlp_ratio=mlp_ratio[i],
                attn_drop=attn_drop_rate,
                norm_layer=norm_layer,
                **dd,
            )
            if i == first_global:
                self.pos_index = len(network)
            blocks: List[nn.Module]
            if local_stages[i]:
                elsa_args: Dict[str, Any] = dict(
                    kernel_size=kernel_size[i],
                    dilation=dilation[i],
                    group_width=group_width,
                    lam=lam,
                    gamma=gamma,
                    qk_scale=qk_scale,
                    qkv_bias=qkv_bias if local_qkv_bias is None else local_qkv_bias,
                )
                blocks = [ElsaBlock(drop_path=rate, **block_args, **elsa_args) for rate in local_drop_path[i]]
            else:
                blocks = [Transformer(drop_path=rate, qkv_bias=qkv_bias, **block_args) for rate in drop_path[i]]
            self.stage_ends.append(len(network))
            self._reductions.append(2 ** sum(downsamples[:i]))
            self.feature_info.append(dict(
                num_chs=embed_dims[i],
                reduction=self.patch_embed.patch_size * self._reductions[i],
                module=f'network.{len(network)}',
            ))
            network.append(nn.Sequential(*blocks))
            if downsamples[i]:
                network.append(PaddedDownsample(embed_dims[i], embed_dims[i + 1], 2, **dd))
        self.network = nn.ModuleList(network)
        # the final norm fits the stages from here on
        self.norm_index = max([0] + [j + 1 for j, m in enumerate(network) if isinstance(m, PaddedDownsample)])

        self._pos_reduction = self._reductions[first_global]
        self.pos_embed = nn.Parameter(torch.empty(1, *self._pos_grid(), embed_dims[first_global], **dd))
        self.pos_drop = nn.Dropout(p=pos_drop_rate)

        self.post_network, self.cls_token = None, None
        if num_class_blocks > 0:
            self.post_network = nn.ModuleList([
                ClassBlock(
                    embed_dims[-1],
                    num_heads[-1],
                    mlp_ratio=mlp_ratio[-1],
                    qkv_bias=qkv_bias,
                    attn_drop=attn_drop_rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for _ in range(num_class_blocks)])
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dims[-1], **dd))

        self.use_aux_head = use_aux_head
        self.aux_head = nn.Linear(self.num_features, num_classes, **dd) if use_aux_head and num_classes > 0 else None
        self.norm = norm_layer(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        self._reset_tokens()
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _reset_tokens(self) -> None:
        for x in (self.pos_embed, self.cls_token):
            if x is not None:
                trunc_normal_(x, std=.02)

    @torch.jit.ignore
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise the model: ELSA blocks as their authors do, the rest as VOLO.

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
    def _pos_grid(self) -> Tuple[int, int]:
        """Height and width of the position embedding, in tokens."""
        return tuple([math.ceil(s / self._pos_reduction) for s in self.patch_embed.grid_size])

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        """VOLO's tokens and positions; ghost matrices are decayed, as the authors do."""
        return {name for name in ('pos_embed', 'cls_token') if getattr(self, name) is not None}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r'^cls_token|pos_embed|patch_embed',
            blocks=[
                (r'^network\.(\d+)\.(\d+)', None),
                (r'^network\.(\d+)', (0,)),
            ],
            blocks2=[
                (r'^cls_token', (0,)),
                (r'^post_network\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them."""
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
            ValueError: The pooling type is unknown or needs a class token that the model lacks.
        """
        if global_pool is not None:
            self._check_pool(global_pool)
            if global_pool == 'token' and self.cls_token is None:
                raise ValueError('global_pool: got \'token\', must be \'avg\' or \'\' for a model without class token.')
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
        """Change the size of image or patches; position embedding and patch embedding are resampled.

        Args:
            img_size: New height and width in pixels, None leaves them.
            patch_size: New patch size in pixels, None leaves it.

        Raises:
            ValueError: A size is not as in the constructor; nothing has changed then.
        """
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is not None:
            with torch.no_grad():
                pos_embed = resample_abs_pos_embed_nhwc(self.pos_embed, list(self._pos_grid()))
            if pos_embed is not self.pos_embed:
                self.pos_embed = nn.Parameter(pos_embed, requires_grad=self.pos_embed.requires_grad)
        for info, reduction in zip(self.feature_info, self._reductions):
            info['reduction'] = self.patch_embed.patch_size * reduction
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _add_positions(self, x: torch.Tensor) -> torch.Tensor:
        pos_embed = self.pos_embed
        if pos_embed is not None:
            if self.dynamic_img_size:
                pos_embed = resample_positions(pos_embed, x.shape[1], x.shape[2])
            x = self.pos_drop(x + pos_embed)
        return x

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (B, H, W, C) through all stages to tokens (B, N, C')."""
        for idx, module in enumerate(self.network):
            if idx == self.pos_index:
                x = self._add_positions(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(module, x) if isinstance(module, nn.Sequential) else module(x)
            else:
                x = module(x)
        return x.flatten(1, 2)

    def forward_cls(self, x: torch.Tensor) -> torch.Tensor:
        """Put the class token before tokens (B, N, C) and let it attend to them: (B, 1 + N, C)."""
        assert self.cls_token is not None and self.post_network is not None
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.post_network:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to normalised tokens (B, 1 + N, C), the class token first."""
        return self.forward_patches(self.patch_embed(x))

    def forward_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (B, H, W, C) to normalised tokens (B, 1 + N, C'), the class token first."""
        x = self.forward_tokens(x)
        if self.post_network is not None:
            x = self.forward_cls(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens (B, 1 + N, C) to logits (B, num_classes), or to what the classifier takes.

        With an aux head, half of the largest of all tokens' logits is added for each class.
        """
        if self.global_pool == 'avg':
            pooled = x.mean(dim=1)
        elif self.global_pool == 'token':
            pooled = x[:, 0]
        else:
            pooled = x
        pooled = self.head_drop(pooled)
        x = self.head_drop(x)
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is not None and self.global_pool:
            logits = logits + 0.5 * self.aux_head(x[:, 1:]).max(1)[0]
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

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
            norm: Apply the final norm to the stages of its width.
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
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        take_indices = [self.stage_ends[i] for i in take_indices]
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            network = self.network
        else:
            network = self.network[:self.stage_ends[max_index] + 1]
        last_idx = len(self.network) - 1
        x = self.patch_embed(x)
        idx = 0
        for idx, module in enumerate(network):
            if idx == self.pos_index:
                x = self._add_positions(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(module, x) if isinstance(module, nn.Sequential) else module(x)
            else:
                x = module(x)
            if idx in take_indices:
                x_inter = self.norm(x) if norm and idx >= self.norm_index else x
                intermediates.append(x_inter.permute(0, 3, 1, 2).contiguous())

        if intermediates_only:
            return intermediates

        if idx == last_idx:  # class attention and norm follow the last stage
            x = x.flatten(1, 2)
            if self.post_network is not None:
                x = self.forward_cls(x)
            x = self.norm(x)

        return x, intermediates

    @torch.jit.ignore
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
            prune_head: Remove class attention and classifiers.

        Returns:
            Indices of the stages that are taken.
        """
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        end = self.stage_ends[max_index] + 1
        prune_end = end < len(self.network)
        self.network = self.network[:end]
        self.stage_ends = self.stage_ends[:max_index + 1]
        if end <= self.pos_index:
            self.pos_embed = None
        if prune_norm or end <= self.norm_index:
            self.norm = nn.Identity()
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.post_network = None
            self.cls_token = None
            self.use_aux_head = False  # it takes every token but the first, the class token
            self.reset_classifier(0, '')
        return take_indices


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to the model's input size.

    The position embedding is resampled to the model's grid and the patch embedding to its patch size. An aux head that
    the model does without is dropped.

    Args:
        state_dict: A state dict, or a training checkpoint that holds one.
        model: The model that is to be loaded.

    Returns:
        Entries in the names and shapes of the model; those of the classifiers are left for the caller to judge.

    Raises:
        WeightsError: Entries are missing or unknown; all are listed.
    """
    out = {
        k: fit_positions(k, x, model) for k, x in unwrap(state_dict).items()
        if model.aux_head is not None or not k.startswith('aux_head.')}
    check_keys(out, model, optional=('head.', 'aux_head.'))
    return out


def _create_elsa_volo(variant: str, pretrained: bool = False, **kwargs) -> ElsaVolo:
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs['layers']))))
    return build_model(
        ElsaVolo,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _cfg(size: int = 224, **kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, size, size), 'pool_size': None,
        'crop_pct': .96, 'interpolation': 'bicubic', 'fixed_input_size': True,
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.conv.0', 'classifier': ('head', 'aux_head'),
        'license': 'apache-2.0',
        'paper_name': 'What Limits the Performance of Local Self-attention?', 'paper_ids': 'arXiv:2112.12786',
        **kwargs,
    }


# sizes and crops are VOLO's
default_cfgs = generate_default_cfgs({
    'elsa_volo_d1_224': _cfg(),
    'elsa_volo_d1_384': _cfg(384, crop_pct=1.),
    'elsa_volo_d2_224': _cfg(),
    'elsa_volo_d2_384': _cfg(384, crop_pct=1.),
    'elsa_volo_d3_224': _cfg(),
    'elsa_volo_d3_448': _cfg(448, crop_pct=1.),
    'elsa_volo_d4_224': _cfg(),
    'elsa_volo_d4_448': _cfg(448, crop_pct=1.15),
    'elsa_volo_d5_224': _cfg(),
    'elsa_volo_d5_448': _cfg(448, crop_pct=1.15),
    'elsa_volo_d5_512': _cfg(512, crop_pct=1.15),
    'test_elsa_volo': _cfg(64),
})

_D1 = dict(layers=(4, 4, 8, 2), embed_dims=(192, 384, 384, 384), num_heads=(6, 12, 12, 12))
_D2 = dict(layers=(6, 4, 10, 4), embed_dims=(256, 512, 512, 512), num_heads=(8, 16, 16, 16))
_D3 = dict(layers=(8, 8, 16, 4), embed_dims=(256, 512, 512, 512), num_heads=(8, 16, 16, 16))
_D4 = dict(layers=(8, 8, 16, 4), embed_dims=(384, 768, 768, 768), num_heads=(12, 16, 16, 16))
_D5 = dict(
    layers=(12, 12, 20, 4), embed_dims=(384, 768, 768, 768), num_heads=(12, 16, 16, 16), mlp_ratio=4.,
    stem_hidden_dim=128)


@register_model
def elsa_volo_d1_224(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D1 at 224: 26.7 M parameters, 7.2 GMACs."""
    return _create_elsa_volo('elsa_volo_d1_224', pretrained, **dict(_D1, **kwargs))


@register_model
def elsa_volo_d1_384(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D1 at 384: 26.8 M parameters, 23.4 GMACs."""
    return _create_elsa_volo('elsa_volo_d1_384', pretrained, **dict(_D1, **kwargs))


@register_model
def elsa_volo_d2_224(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D2 at 224: 58.7 M parameters, 14.9 GMACs."""
    return _create_elsa_volo('elsa_volo_d2_224', pretrained, **dict(_D2, **kwargs))


@register_model
def elsa_volo_d2_384(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D2 at 384: 58.9 M parameters, 47.8 GMACs."""
    return _create_elsa_volo('elsa_volo_d2_384', pretrained, **dict(_D2, **kwargs))


@register_model
def elsa_volo_d3_224(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D3 at 224: 86.4 M parameters, 21.5 GMACs."""
    return _create_elsa_volo('elsa_volo_d3_224', pretrained, **dict(_D3, **kwargs))


@register_model
def elsa_volo_d3_448(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D3 at 448: 86.7 M parameters, 99.3 GMACs."""
    return _create_elsa_volo('elsa_volo_d3_448', pretrained, **dict(_D3, **kwargs))


@register_model
def elsa_volo_d4_224(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D4 at 224: 192.7 M parameters, 45.8 GMACs."""
    return _create_elsa_volo('elsa_volo_d4_224', pretrained, **dict(_D4, **kwargs))


@register_model
def elsa_volo_d4_448(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D4 at 448: 193.2 M parameters, 202.9 GMACs."""
    return _create_elsa_volo('elsa_volo_d4_448', pretrained, **dict(_D4, **kwargs))


@register_model
def elsa_volo_d5_224(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D5 at 224: 295.1 M parameters, 74.6 GMACs."""
    return _create_elsa_volo('elsa_volo_d5_224', pretrained, **dict(_D5, **kwargs))


@register_model
def elsa_volo_d5_448(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D5 at 448: 295.5 M parameters, 323.8 GMACs."""
    return _create_elsa_volo('elsa_volo_d5_448', pretrained, **dict(_D5, **kwargs))


@register_model
def elsa_volo_d5_512(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """ELSA-VOLO-D5 at 512: 295.7 M parameters, 436.5 GMACs."""
    return _create_elsa_volo('elsa_volo_d5_512', pretrained, **dict(_D5, **kwargs))


@register_model
def test_elsa_volo(pretrained: bool = False, **kwargs) -> ElsaVolo:
    """A small ELSA-VOLO for tests, demonstrations and small images: under 1 M parameters, 64 pixels."""
    model_args = dict(
        img_size=64, patch_size=4, stem_hidden_dim=16, layers=(2, 1, 2, 1), embed_dims=(48, 96, 96, 96),
        num_heads=(3, 6, 6, 6))
    return _create_elsa_volo('test_elsa_volo', pretrained, **dict(model_args, **kwargs))


register_family(Family(
    name='elsa_volo',
    module=__name__,
    model_cls=ElsaVolo,
    filter_fn=checkpoint_filter_fn,
    relatives={n: f'{n.removeprefix("elsa_")}.sail_in1k' for n in default_cfgs if not n.startswith('test_')},
    marks=('attn_conv.weight',),
    first_conv='patch_embed.conv.0',
    classifiers=('head', 'aux_head'),
    top1=dict(elsa_volo_d1_224=84.7, elsa_volo_d5_512=87.2),  # no others were published
))
