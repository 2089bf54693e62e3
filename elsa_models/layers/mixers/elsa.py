"""Enhanced Local Self-Attention.

Paper: `What Limits the Performance of Local Self-attention?` - https://arxiv.org/abs/2112.12786 (IJCV 2023)

Maps are (B, H, W, C) throughout, contiguous in C.
"""
from typing import Dict, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import trunc_normal_

from ...ops import local_attention
from ..arguments import check_map, is_plain, whole_number
from ..rotated_conv import RotatedDepthwiseConv2d, constant
from .mixer import Mixer

# leaves of symbolic traces
torch.fx.wrap('local_attention')
torch.fx.wrap('check_map')


class ElsaAttention(Mixer):
    """Local attention whose logits come from the Hadamard product of query and key (paper, section 3).

    A grouped K x K convolution and a 1 x 1 convolution turn `query * key` into one logit per head and tap: Hadamard
    attention. The ghost head then gives each channel of a head weights of its own, `mul ** lam * attention + gamma *
    add`, from two static matrices per layer.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 7,
            dilation: int = 1,
            qk_dim: Optional[int] = None,
            value_dim: Optional[int] = None,
            group_width: int = 8,
            lam: int = 0,
            gamma: float = 1.,
            qk_scale: float = 1.,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            hadamard: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of input and output.
            num_heads: Heads, a divisor of value_dim. Channels are head-major.
            kernel_size: Side of the neighbourhood in pixels, odd.
            dilation: Distance between neighbouring taps in pixels.
            qk_dim: Channels of query and key, a multiple of group_width; two thirds of dim, rounded up, if None.
            value_dim: Channels of the value, dim if None.
            group_width: Channels per group of the K x K convolution.
            lam: Exponent of the ghost head's factor, a whole number; 0 means no factor.
            gamma: Weight of the ghost head's summand; 0 means no summand.
            qk_scale: Factor of the Hadamard product.
            qkv_bias: Add a bias to query, key and value.
            attn_drop: Dropout rate of the attention weights.
            proj_drop: Dropout rate of the output.
            act_layer: Activation between the two convolutions.
            hadamard: Multiply query and key; otherwise there is no key, and the query takes the product's place.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, kernel_size is even, or lam is no whole
                number (the factor is drawn from N(0, 1), and a root of a negative number does not exist).
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        kernel_size, dilation = whole_number('kernel_size', kernel_size), whole_number('dilation', dilation)
        group_width, lam = whole_number('group_width', group_width), whole_number('lam', lam, 0)
        value_dim = dim if value_dim is None else whole_number('value_dim', value_dim)
        if qk_dim is None:
            qk_dim = -(-(dim // 3 * 2) // group_width) * group_width
        qk_dim = whole_number('qk_dim', qk_dim)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
        if value_dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {value_dim} value channels.')
        if qk_dim % group_width != 0:
            raise ValueError(f'qk_dim: got {qk_dim}, must be a positive multiple of group_width, {group_width}.')
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.hadamard = hadamard
        self.split_dims = (qk_dim, qk_dim if hadamard else 0, value_dim)
        self.lam = lam
        self.gamma = float(gamma)
        self.qk_scale = float(qk_scale)
        self.attn_drop_rate = attn_drop

        K = kernel_size
        self.qkv = nn.Linear(dim, sum(self.split_dims), bias=qkv_bias, **dd)
        self.attn_conv: Union[nn.Conv2d, RotatedDepthwiseConv2d] = nn.Conv2d(
            qk_dim, qk_dim, K, padding=K // 2 * dilation, dilation=dilation, groups=qk_dim // group_width, **dd)
        self.act = act_layer()
        self.attn_logits = nn.Linear(qk_dim, num_heads * K ** 2, **dd)
        self.ghost_mul = nn.Parameter(torch.empty(value_dim, K, K, **dd)) if self.lam != 0 else None
        self.ghost_add = nn.Parameter(torch.empty(value_dim, K, K, **dd)) if self.gamma != 0. else None
        self.proj = nn.Linear(value_dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do, for whom qkv, attn_conv and attn_logits are convolutions left as they come."""
        self.qkv.reset_parameters()
        if isinstance(self.attn_conv, nn.Conv2d):
            self.attn_conv.reset_parameters()
        self.attn_logits.reset_parameters()
        if self.ghost_mul is not None:
            nn.init.normal_(self.ghost_mul)
        if self.ghost_add is not None:
            trunc_normal_(self.ghost_add, std=.02)
        trunc_normal_(self.proj.weight, std=.02)
        nn.init.zeros_(self.proj.bias)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Hook of timm's initialisers, which have drawn every Linear anew by the time they come here."""
        self.reset_parameters()

    def project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map (B, H, W, dim) to values (B, H, W, value_dim) and logits (B, H, W, num_heads, kernel_size ** 2)."""
        check_map(x, self.dim)
        q, k, v = self.qkv(x).split(self.split_dims, dim=-1)
        h = q * k if self.hadamard else q  # B, H, W, qk_dim
        if self.qk_scale != 1.:
            h = h * self.qk_scale
        h = self.attn_conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        logits = self.attn_logits(self.act(h))
        return v, logits.unflatten(-1, (self.num_heads, self.kernel_size * self.kernel_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        v, logits = self.project(x)
        ghost_mul: Optional[torch.Tensor] = self.ghost_mul
        ghost_add: Optional[torch.Tensor] = self.ghost_add
        if ghost_mul is not None and self.lam != 1:
            ghost_mul = ghost_mul ** self.lam
        if ghost_add is not None and self.gamma != 1.:
            ghost_add = ghost_add * self.gamma
        dropout_p = self.attn_drop_rate if self.training else 0.
        x = local_attention(v, logits, self.kernel_size, self.dilation, ghost_mul, ghost_add, dropout_p)
        return self.proj_drop(self.proj(x))

    @torch.jit.ignore
    def extra_macs(self, shape: Sequence[int]) -> Dict[str, int]:
        """The Hadamard product of query and key; see `Mixer.extra_macs`."""
        B, H, W, _ = shape
        return {'hadamard': B * H * W * self.split_dims[1]}

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Make a sum of depthwise convolutions of the grouped one, for which runtimes have no fast kernels.

        Parameters that change are replaced: others may hold those that were. Layers that are not plain, such as
        adapted or parametrised ones, are left as they are.
        """
        conv = self.attn_conv
        if not isinstance(conv, nn.Conv2d) or not is_plain(conv, nn.Conv2d):  # it has been made, or is not ours
            return
        if not is_plain(self.qkv, nn.Linear) or not is_plain(self.attn_logits, nn.Linear):
            return
        width = conv.weight.shape[1]
        if width == 1 or width > 8:  # what runtimes have kernels for
            return
        order = torch.arange(self.split_dims[0], device=self.qkv.weight.device)
        order = order.reshape(-1, width).t().reshape(-1)  # position-major
        for name, x in self.qkv.named_parameters():
            q, k, v = x.split(self.split_dims)
            setattr(self.qkv, name, constant(torch.cat([q[order], k[order] if self.hadamard else k, v])))
        self.attn_logits.weight = constant(self.attn_logits.weight[:, order])
        self.attn_conv = RotatedDepthwiseConv2d(conv)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights (B, H, W, num_heads, kernel_size ** 2) before the ghost head, for looking at."""
        return self.project(x)[1].softmax(dim=-1)
