"""How kernels are compiled by Numba: at their first call, kept on disk where there is a folder to write to."""
import logging

import numba

_logger = logging.getLogger(__name__)


def compiled(function, **options):
    """A function for other kernels, which releases the GIL and divides as NumPy does."""
    try:
        return numba.njit(nogil=True, error_model='numpy', cache=True, **options)(function)
    except RuntimeError as e:  # no folder to write to
        _logger.info('Compiled kernels are not kept: %s', e)
        return numba.njit(nogil=True, error_model='numpy', **options)(function)


def parallel(function):
    """A function whose `prange` runs on several threads."""
    return compiled(function, parallel=True)


def inlined(function):
    """A function that becomes part of its caller: 0.95 of the time of a call, which passes vectors through memory."""
    return compiled(function, inline='always')
