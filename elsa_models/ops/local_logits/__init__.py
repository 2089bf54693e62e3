"""Logits of queries and keys over the K x K neighbours of every pixel."""
from . import flops  # noqa: F401  # registers what FLOP counters count
from .api import local_logits
from .plain import local_logits_plain
from .reference import local_logits_reference

__all__ = ['local_logits', 'local_logits_plain', 'local_logits_reference']
