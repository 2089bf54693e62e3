"""Attention of the pixels of a line to one another, with learned values by distance: inference on a CPU.

PyTorch's form, in `layers/mixers/axial.py`, makes a map for each of three terms of the logits, and products of a few
channels, which are slow. Here a line's map never leaves the cache, and tables are read where they are.
"""
from .numba import attend_lines, takes

__all__ = ['attend_lines', 'takes']
