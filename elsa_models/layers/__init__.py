"""What models are built of."""
from .block import ElsaBlock, MixerBlock
from .mixers import (
    AxialAttention,
    ElsaAttention,
    FocalAttention,
    GlobalSelfAttention,
    KeyOnlyAttention,
    LocalGlobalAttention,
    Mixer,
    StandAloneSelfAttention,
    UnifiedNeighbourhoodAttention,
    UnifiedWindowAttention,
    WindowAttention,
)
from .sizes import check_size, pad_map, sizes_are_open
from .stems import (
    ConvDownsample,
    OverlapPatchEmbed,
    PaddedConvStem,
    PaddedDownsample,
    PaddedPatchEmbed,
    PaddedPatchMerging,
)

__all__ = [
    'AxialAttention', 'ConvDownsample', 'ElsaAttention', 'ElsaBlock', 'FocalAttention', 'GlobalSelfAttention',
    'KeyOnlyAttention', 'LocalGlobalAttention', 'Mixer', 'MixerBlock', 'OverlapPatchEmbed', 'PaddedConvStem',
    'PaddedDownsample', 'PaddedPatchEmbed', 'PaddedPatchMerging', 'StandAloneSelfAttention',
    'UnifiedNeighbourhoodAttention', 'UnifiedWindowAttention', 'WindowAttention', 'check_size', 'pad_map',
    'sizes_are_open',
]
