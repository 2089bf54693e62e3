"""Local self-attention, dynamic filters and depthwise convolution as settings of one form.

Paper: `What Limits the Performance of Local Self-attention?` - https://arxiv.org/abs/2112.12786, which writes them as

    x'_i = sum_j norm_j(q_i k_j + q_i r^k_{j-i} + r^q_{j-i} k_j + r^b_{j-i}) v_j

and asks which of the four terms, which normalisation and which region of pixels j it is that matters.
"""
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from ...ops import local_attention, local_logits
from ..arguments import check_map, whole_number
from .mixer import Mixer
from .window import WindowMixer

TERMS = ('qk', 'qr', 'rk', 'r')  # q_i k_j, q_i r^k_{j-i}, r^q_{j-i} k_j, r^b_{j-i}
NORMALISATIONS = ('softmax', 'identity', 'filter')
REGIONS = ('window', 'neighbourhood')  # with a class each
_EPS = 1e-5  # of filter normalisation

# leaves of symbolic traces, for their sizes are no numbers there
torch.fx.wrap('check_map')
torch.fx.wrap('local_attention')
torch.fx.wrap('local_logits')


class _Unified(Mixer):
    """Projections, tables and normalisation, whatever the region."""

    def _make_parts(
            self,
            dim: int,
            num_heads: int,
            num_positions: int,
            num_pixels: int,
            terms: Union[str, Sequence[str]],
            normalisation: str,
            scale: Optional[float],
            qkv_bias: bool,
            proj_drop: float,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        dim, num_heads = whole_number('dim', dim), whole_number('num_heads', num_heads)
        if dim % num_heads != 0:
            raise ValueError(f'num_heads: got {num_heads}, must be a divisor of the {dim} channels.')
        terms = (terms,) if isinstance(terms, str) else tuple(terms)
        if not terms or len(set(terms)) != len(terms) or not set(terms) <= set(TERMS):
            raise ValueError(f'terms: got {terms!r}, must be some of {", ".join(map(repr, TERMS))}, each once.')
        if normalisation not in NORMALISATIONS:
            known = ', '.join(map(repr, NORMALISATIONS))
            raise ValueError(f'normalisation: got {normalisation!r}, must be one of {known}.')
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.terms = terms
        self.has_products = 'qk' in terms
        self.normalisation = normalisation
        self.scale = self.head_dim ** -0.5 if scale is None else float(scale)
        self.num_pixels = num_pixels  # of a region

        with_q, with_k = 'qk' in terms or 'qr' in terms, 'qk' in terms or 'rk' in terms
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd) if with_q else None
        self.k = nn.Linear(dim, dim, bias=qkv_bias, **dd) if with_k else None
        self.v = nn.Linear(dim, dim, bias=qkv_bias, **dd)

        def table(term: str, width: int) -> Optional[nn.Parameter]:
            return nn.Parameter(torch.empty(num_positions, width, **dd)) if term in terms else None

        self.relative_key_table = table('qr', dim)
        self.relative_query_table = table('rk', dim)
        self.relative_position_bias_table = table('r', num_heads)
        is_filter = normalisation == 'filter'
        self.gain = nn.Parameter(torch.empty(num_heads, **dd)) if is_filter else None
        self.offset = nn.Parameter(torch.empty(num_heads, **dd)) if is_filter else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Draw projections and tables from a truncated normal distribution of std 0.02, as Swin does.

        Without a softmax there is nothing that keeps sums over the region at the scale of values: biases are drawn
        with a variance of 1 / positions then, and filters start with a gain of that root.
        """
        for linear in (self.q, self.k, self.v, self.proj):
            if linear is not None:
                trunc_normal_(linear.weight, std=.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for table in (self.relative_key_table, self.relative_query_table):
            if table is not None:
                trunc_normal_(table, std=.02)
        table = self.relative_position_bias_table
        if table is not None:
            trunc_normal_(table, std=len(table) ** -0.5 if self.normalisation == 'identity' else .02)
        if self.gain is not None and self.offset is not None:
            nn.init.constant_(self.gain, self.num_pixels ** -0.5)
            nn.init.zeros_(self.offset)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Hook of timm's initialisers, which have drawn every Linear anew by the time they come here."""
        self.reset_parameters()

    def _normalise(self, logits: torch.Tensor, outside: Optional[torch.Tensor]) -> torch.Tensor:
        """Weights of pixels, the last dimension; (..., heads, queries or 1, pixels). Those outside have no share."""
        if self.normalisation == 'softmax':
            if outside is not None:
                logits = logits.masked_fill(outside, float('-inf'))
            return logits.softmax(dim=-1)
        if self.gain is not None and self.offset is not None:
            if outside is None:
                var, mean = torch.var_mean(logits, dim=-1, keepdim=True, unbiased=False)
            else:
                inside = (~outside).to(logits.dtype)
                count = inside.sum(dim=-1, keepdim=True)
                mean = (logits * inside).sum(dim=-1, keepdim=True) / count
                var = ((logits - mean).square() * inside).sum(dim=-1, keepdim=True) / count
            gain, offset = self.gain[:, None, None], self.offset[:, None, None]
            logits = (logits - mean) * (var + _EPS).rsqrt() * gain + offset
        return logits if outside is None else logits.masked_fill(outside, 0.)


class UnifiedNeighbourhoodAttention(_Unified):
    """The unified form over the K x K neighbours of every pixel.

    Softmax over 'qk' and 'r' is neighbourhood attention with a bias, over 'qk' and 'qr' that of SASA; 'r' alone without
    normalisation and with a head for each channel is depthwise convolution; 'qr' alone makes dynamic filters that are
    the same for the channels of a head.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 7,
            terms: Union[str, Sequence[str]] = ('qk', 'r'),
            normalisation: str = 'softmax',
            border: str = 'zero',
            scale: Optional[float] = None,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of input and output.
            num_heads: Heads, a divisor of dim.
            kernel_size: Side of the neighbourhood in pixels, odd. Tables are in the order of taps, by key - query.
            terms: Terms of the logits: some of 'qk', 'qr', 'rk' and 'r'.
            normalisation: Of the logits over the neighbours: 'softmax', 'identity', or 'filter' for mean 0 and
                standard deviation 1, with a gain and an offset for each head.
            border: 'zero' lets neighbours outside the map keep their share, with keys and values of zero; 'mask' leaves
                them out.
            scale: Factor of the query, head_dim ** -0.5 if None.
            qkv_bias: Add a bias to query, key and value.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is none of those above.
        """
        super().__init__()
        kernel_size = whole_number('kernel_size', kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size: got {kernel_size}, must be a positive odd number.')
        if border not in ('zero', 'mask'):
            raise ValueError(f"border: got {border!r}, must be 'zero' or 'mask'.")
        self.kernel_size = kernel_size
        self.border = border
        area = kernel_size ** 2
        self._make_parts(
            dim, num_heads, area, area, terms, normalisation, scale, qkv_bias, proj_drop, device, dtype)
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        v = self.v(x)
        if self.q is None and self.k is None and self.border == 'zero':
            x = self._convolve(v)
        elif self.normalisation == 'softmax' and self.border == 'zero':
            x = local_attention(v, self._logits(x), self.kernel_size)
        else:
            x = local_attention(v, self._weights(x), self.kernel_size, apply_softmax=False)
        return self.proj_drop(self.proj(x))

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, H, W, num_heads, kernel_size ** 2) of the neighbours, to look at."""
        return self._weights(x)

    def _convolve(self, v: torch.Tensor) -> torch.Tensor:
        """Values (B, H, W, dim) under weights that depend on nothing but the position: a depthwise convolution."""
        table = self.relative_position_bias_table
        assert table is not None  # the only term without queries and keys
        weights = self._normalise(table.t().unsqueeze(1), None)  # heads, 1, K * K
        kernel = weights.repeat_interleave(self.head_dim, dim=0).unflatten(-1, (self.kernel_size, self.kernel_size))
        v = F.conv2d(v.permute(0, 3, 1, 2), kernel.to(v.dtype), padding=self.kernel_size // 2, groups=self.dim)
        return v.permute(0, 2, 3, 1)

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the neighbours, (B, H, W, heads, K * K)."""
        B, H, W, _ = x.shape
        outside: Optional[torch.Tensor] = None
        if self.border == 'mask':
            outside = self._outside(H, W, x.device)
        weights = self._normalise(self._logits(x).unsqueeze(-2), outside).squeeze(-2)
        return weights.expand(B, H, W, self.num_heads, self.kernel_size * self.kernel_size)

    def _outside(self, H: int, W: int, device: torch.device) -> torch.Tensor:
        """Whether each tap of each pixel is outside the map, (H, W, 1, 1, K * K)."""
        K = self.kernel_size
        taps = torch.arange(K, device=device) - K // 2
        rows = torch.arange(H, device=device)[:, None] + taps  # H, K
        columns = torch.arange(W, device=device)[:, None] + taps  # W, K
        outside = ((rows < 0) | (rows >= H))[:, None, :, None] | ((columns < 0) | (columns >= W))[None, :, None, :]
        return outside.flatten(2)[:, :, None, None, :]

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of the terms, (B, H, W, heads, K * K); dimensions are 1 where no term depends on them."""
        logits = torch.zeros([1, 1, 1, 1, 1], dtype=x.dtype, device=x.device)
        if self.relative_position_bias_table is not None:
            logits = logits + self.relative_position_bias_table.t()
        if self.q is not None:
            q = self.q(x) * self.scale
            if self.k is not None and self.has_products:
                logits = logits + local_logits(q, self.k(x), self.kernel_size, num_heads=self.num_heads)
            if self.relative_key_table is not None:
                logits = logits + self._by_position(q, self.relative_key_table)
        if self.k is not None and self.relative_query_table is not None:
            logits = logits + self._from_neighbours(self._by_position(self.k(x), self.relative_query_table))
        return logits

    def _by_position(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Products of queries or keys (B, H, W, dim) with each row of a table: (B, H, W, heads, K * K)."""
        heads = (self.num_heads, self.head_dim)
        return torch.einsum('bhwgd,tgd->bhwgt', x.unflatten(-1, heads), table.unflatten(-1, heads))

    def _from_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """Of maps (B, H, W, heads, K * K), tap t of each pixel from the neighbour at tap t; zero outside."""
        B, H, W, G, T = x.shape
        K = self.kernel_size
        x = F.pad(x, (0, 0, 0, 0, K // 2, K // 2, K // 2, K // 2))
        padded_w = W + K - 1
        pixels = torch.arange(H, device=x.device)[:, None] * padded_w + torch.arange(W, device=x.device)
        taps = torch.arange(K, device=x.device)[:, None] * padded_w + torch.arange(K, device=x.device)
        index = (pixels.view(-1, 1) + taps.view(-1))[None, :, None, :].expand(B, H * W, G, T)
        return x.flatten(1, 2).gather(1, index).unflatten(1, (H, W))


class UnifiedWindowAttention(_Unified, WindowMixer):
    """The unified form within windows, as `WindowMixer` cuts them.

    Softmax over 'qk' and 'r' is Swin's attention, over 'qk' alone the same without biases.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            feat_size: Tuple[int, int],
            window_size: Union[int, Tuple[int, int]] = 7,
            shift: bool = False,
            dynamic: bool = False,
            terms: Union[str, Sequence[str]] = ('qk', 'r'),
            normalisation: str = 'softmax',
            scale: Optional[float] = None,
            qkv_bias: bool = True,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels of input and output.
            num_heads: Heads, a divisor of dim.
            feat_size: Height and width of the map.
            window_size: Height and width of the windows. Tables are in Swin's order, by query - key.
            shift: Shift the windows by half their size.
            dynamic: Take maps of any size.
            terms: Terms of the logits: some of 'qk', 'qr', 'rk' and 'r'.
            normalisation: Of the logits over the window: 'softmax', 'identity', or 'filter' for mean 0 and standard
                deviation 1, with a gain and an offset for each head.
            scale: Factor of the query, head_dim ** -0.5 if None.
            qkv_bias: Add a bias to query, key and value.
            proj_drop: Dropout rate of the output.

        Raises:
            ValueError: An argument is none of those above.
        """
        WindowMixer.__init__(self, feat_size, window_size, shift, dynamic=dynamic)
        window_h, window_w = self.window_size
        num_positions = (2 * window_h - 1) * (2 * window_w - 1)
        area = self.window_area
        self._make_parts(
            dim, num_heads, num_positions, area, terms, normalisation, scale, qkv_bias, proj_drop, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise parameters and buffers."""
        super().reset_parameters()
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no state dict holds. timm calls this after `to_empty()`."""
        self._init_buffers(self.proj.weight.dtype, self.proj.weight.device)

    @torch.jit.ignore
    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Change the size of map and windows; tables are resampled to new windows. See `Mixer.set_input_size`."""
        old_size = self._resize_windows(feat_size, window_size, always_partition)
        if old_size is not None:
            for name in ('relative_key_table', 'relative_query_table', 'relative_position_bias_table'):
                table = getattr(self, name)
                if table is not None:
                    setattr(self, name, self._resize_table(table, old_size))
        self.init_non_persistent_buffers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, H, W, dim) to (B, H, W, dim).

        Raises:
            ValueError: The input is of another shape.
        """
        check_map(x, self.dim)
        B, H, W, C = x.shape
        windows, mask, shift_h, shift_w = self._partition(x)
        v = self._heads(self.v(windows))
        x = self._weights(windows, mask) @ v
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return self._merge(x, B, H, W, shift_h, shift_w)

    @torch.jit.ignore
    def attention_map(self, x: torch.Tensor) -> torch.Tensor:
        """Weights (B, H, W, num_heads, window area) of each pixel over those of its window, to look at."""
        B, H, W, _ = x.shape
        windows, mask, shift_h, shift_w = self._partition(x)
        weights = self._weights(windows, mask).transpose(1, 2).flatten(2)
        return self._merge(weights, B, H, W, shift_h, shift_w).unflatten(-1, (self.num_heads, self.window_area))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(windows, area, dim) to (windows, heads, area, head_dim)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _weights(self, windows: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """Weights (windows, heads, area, area) of query and key."""
        n, area, _ = windows.shape
        index = self.relative_position_index  # query, key
        logits = torch.zeros([1, 1, 1, 1], dtype=windows.dtype, device=windows.device)
        if self.relative_position_bias_table is not None:
            bias = self.relative_position_bias_table[index.view(-1)].view(area, area, self.num_heads)
            logits = logits + bias.permute(2, 0, 1)
        if self.q is not None:
            q = self._heads(self.q(windows)) * self.scale
            if self.k is not None and self.has_products:
                logits = logits + q @ self._heads(self.k(windows)).transpose(-2, -1)
            if self.relative_key_table is not None:
                by_position = self._by_position(q, self.relative_key_table)
                logits = logits + by_position.gather(-1, index.expand(n, self.num_heads, area, area))
        if self.k is not None and self.relative_query_table is not None:
            by_position = self._by_position(self._heads(self.k(windows)), self.relative_query_table)
            by_key = by_position.gather(-1, index.t().expand(n, self.num_heads, area, area))
            logits = logits + by_key.transpose(-2, -1)
        logits = logits.expand(n, self.num_heads, area, area)
        if mask is None:
            return self._normalise(logits, None)
        outside = (mask < 0).unsqueeze(1).unsqueeze(0)  # 1, windows of a map, 1, area, area
        return self._normalise(logits.unflatten(0, (-1, mask.shape[0])), outside).flatten(0, 1)

    def _by_position(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Products of queries or keys (windows, heads, area, d) with each row of a table: (..., area, positions)."""
        return x @ table.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0)
