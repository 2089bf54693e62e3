"""Local attention over the K x K neighbours of every pixel, refined per channel by ELSA's ghost head."""
from . import flops  # noqa: F401  # registers what FLOP counters count
from .api import local_attention
from .plain import local_attention_plain
from .reference import local_attention_reference

__all__ = ['local_attention', 'local_attention_plain', 'local_attention_reference']
