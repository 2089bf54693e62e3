"""Mixers: attentions, and what takes their place, of maps (B, H, W, C)."""
from .axial import AxialAttention
from .elsa import ElsaAttention
from .focal import FocalAttention
from .gsa import GlobalSelfAttention
from .key_only import KeyOnlyAttention
from .lg import LocalGlobalAttention
from .mixer import Mixer
from .sasa import StandAloneSelfAttention
from .unified import UnifiedNeighbourhoodAttention, UnifiedWindowAttention
from .window import WindowAttention

__all__ = [
    'AxialAttention', 'ElsaAttention', 'FocalAttention', 'GlobalSelfAttention', 'KeyOnlyAttention',
    'LocalGlobalAttention', 'Mixer', 'StandAloneSelfAttention', 'UnifiedNeighbourhoodAttention',
    'UnifiedWindowAttention', 'WindowAttention',
]
