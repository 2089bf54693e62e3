"""What a mixer is, and what generic code may ask of one."""
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn


class Mixer(nn.Module):
    """A layer that lets the pixels of a map (B, H, W, C) see each other: attention, or what takes its place.

    Constructors are `(dim, num_heads, ..., device=None, dtype=None)`; `forward` maps (B, H, W, dim), contiguous in
    channels, to the same shape. A block holds its mixer as `attn`. Code that knows no mixer by name uses the methods
    below, whose defaults serve mixers without windows whose work FLOP counters see.

    Layers are called, for adapters, hooks and parametrisations come with the call. Where their parameters are used in
    another way, for speed, `is_plain` of `layers/arguments.py` says whether they may be.
    """

    def extra_macs(self, shape: Sequence[int]) -> Dict[str, int]:
        """Multiply-accumulates that no FLOP counter sees, by name, of one pass over a map of `shape` (B, H, W, C)."""
        return {}

    def reparameterize(self) -> None:
        """Take a form, in place, that inference runtimes run fast. Outputs stay the same up to rounding."""

    def attention_map(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Weights (B, H, W, num_heads, T) over the T pixels that a pixel of x sees, to look at; None without any."""
        return None

    def set_input_size(
            self,
            feat_size: Tuple[int, int],
            window_size: Optional[Tuple[int, int]] = None,
            always_partition: Optional[bool] = None,
    ) -> None:
        """Follow the model to another input size.

        Args:
            feat_size: Height and width of the map from now on.
            window_size: Height and width of windows, where the mixer has any; None leaves them.
            always_partition: Cut into windows even where one covers the map; None leaves it.
        """
