"""The pre-norm residual block around any mixer."""
from typing import Any, List, Optional, Sequence, Type

import torch
import torch.nn as nn
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_

from .mixers.elsa import ElsaAttention
from .mixers.mixer import Mixer


def drop_path_rates(rate: float, depths: Sequence[int]) -> List[List[float]]:
    """Stochastic depth rates of the blocks of each stage, rising linearly from 0 at the first to `rate` at the last."""
    rates: Any = calculate_drop_path_rates(rate, list(depths), stagewise=True)  # lists, or without stages numbers
    return rates


class MixerBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`, on maps (B, H, W, C)."""

    def __init__(
            self,
            dim: int,
            mixer: Mixer,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            mlp_init_std: Optional[float] = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            mixer: Maps (B, H, W, dim) to the same shape.
            mlp_ratio: Hidden channels of the MLP per channel.
            proj_drop: Dropout rate of the MLP; the mixer has its own.
            drop_path: Stochastic depth rate of both branches.
            act_layer: Activation of the MLP.
            norm_layer: Normalisation, called with the number of channels.
            mlp_init_std: Draw the MLP's weights from a truncated normal distribution of this standard deviation, biases
                0; as `nn.Linear` draws them if None.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.mlp_init_std = mlp_init_std
        self.norm1 = norm_layer(dim, **dd)
        self.attn = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the MLP; the other parts initialise themselves."""
        if self.mlp_init_std is None:
            return
        for linear in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(linear.weight, std=self.mlp_init_std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def set_input_size(self, *args, **kwargs) -> None:
        """Hand a change of the map's size to the mixer. See `Mixer.set_input_size`."""
        self.attn.set_input_size(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class ElsaBlock(MixerBlock):
    """A `MixerBlock` with `ElsaAttention`, initialised as the authors do."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.LayerNorm,
            device=None,
            dtype=None,
            **attn_args,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Attention heads.
            mlp_ratio: Hidden channels of the MLP per channel.
            proj_drop: Dropout rate of the attention's and the MLP's output.
            drop_path: Stochastic depth rate of both branches.
            act_layer: Activation of the MLP.
            norm_layer: Normalisation, called with the number of channels.
            **attn_args: Further arguments of `ElsaAttention`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            dim,
            ElsaAttention(dim, num_heads, proj_drop=proj_drop, **attn_args, **dd),
            mlp_ratio=mlp_ratio,
            proj_drop=proj_drop,
            drop_path=drop_path,
            act_layer=act_layer,
            norm_layer=norm_layer,
            mlp_init_std=.02,
            **dd,
        )
