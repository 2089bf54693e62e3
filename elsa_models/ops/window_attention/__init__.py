"""Attention of windows to keys that lie in any windows of the map: inference on a CPU.

PyTorch's form, in `layers/mixers/focal.py`, gathers keys and values of all windows first, and a bias with what each of
them does not see. Here they are read where they are.
"""
from .numba import attend_windows, takes

__all__ = ['attend_windows', 'takes']
