"""Key-only attention: every pixel has a saliency, and no pixel has a query.

The idea is that of the abstract of `Rethinking Query-Key Pairwise Interactions in Vision Transformers`
(https://arxiv.org/abs/2207.00188), whose equations and code are public nowhere. The layer here is ours: it is not the
paper's, and the paper's numbers do not hold for it.
"""
import torch
import torch.nn as nn
from timm.layers import trunc_normal_

from ...ops import local_attention, local_logits
from ..arguments import check_map, whole_number
from .mixer import Mixer

# leaves of symbolic traces
torch.fx.wrap('local_attention')
torch.fx.wrap('local_logits')
torch.fx.wrap('check_map')


class KeyOnlyAttention(Mixer):
    """A mean over the neighbours and a mean over the map, both weighted by a saliency of each pixel and head.

    `y[p] = sum_t softmax_t(s[p + t]) v[p + t] + sum_n softmax_n(s[n]) v[n]` over the neighbours t of p on the map and
    over all pixels n, then a projection. The saliency s is linear in the input: a key and a gate that weighs its
    channels would be one matrix. Cost is linear in pixels.

    Relatives: `LinearSelfAttention` of MobileViTv2 in timm, which has no neighbours and multiplies values by the global
    mean; the additive attention of SwiftFormer.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            kernel_size: int = 7,
            dilation: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels.
            num_heads: Heads, a divisor of dim. Channels are head-major.
            kernel_size: Odd side of the neighbourhood, in taps.
            dilation: Distance between neighbouring taps, in pixels.

        Raises:
            ValueError: Sizes are no whole numbers or do not divide as said, or kernel_size is even.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        kernel_size, dilation = whole_number('kernel_size', kernel_size), whole_number('dilation', dilation)
        if dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of dim, which is {dim}.')
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.saliency = nn.Linear(dim, num_heads, bias=False, **dd)
        self.v = nn.Linear(dim, dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise so that variances are kept."""
        for linear in (self.saliency, self.v, self.proj):
            trunc_normal_(linear.weight, std=self.dim ** -.5)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Hook of timm's initialisers, which have drawn every Linear anew by the time they come here."""
        self.reset_parameters()

    def neighbour_logits(self, s: torch.Tensor) -> torch.Tensor:
        """Give every pixel the saliencies (B, H, W, num_heads) of its neighbours, as logits of `local_attention`."""
        return local_logits(
            torch.ones_like(s), s, self.kernel_size, self.dilation, num_heads=self.num_heads, border='mask')

    def global_mean(self, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The mean (B, 1, 1, dim) of all values (B, H, W, dim), weighted by the softmax of saliencies."""
        B, H, W, C = v.shape
        weights = s.flatten(1, 2).softmax(dim=1).transpose(1, 2).unsqueeze(2)  # B, num_heads, 1, H * W
        values = v.reshape(B, H * W, self.num_heads, C // self.num_heads).transpose(1, 2)
        return (weights @ values).reshape(B, 1, 1, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        s, v = self.saliency(x), self.v(x)
        near = local_attention(v, self.neighbour_logits(s), self.kernel_size, self.dilation)
        return self.proj(near + self.global_mean(s, v))

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, H, W, num_heads, kernel_size ** 2) of the neighbours, for looking at."""
        return self.neighbour_logits(self.saliency(x)).softmax(dim=-1)
