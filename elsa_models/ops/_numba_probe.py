"""The smallest kernel, which says whether Numba works here at all."""
from . import _simd
from ._njit import compiled


@compiled
def double(vec, address, count):
    """Add numbers to themselves."""
    for k in range(0, count, _simd.width(vec)):
        x = _simd.load(address, k, vec)
        _simd.store(address, k, _simd.add(x, x))
