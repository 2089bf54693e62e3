"""Local attention by Triton kernels: the backend for CUDA tensors.

This module launches; what the kernels do and what traffic to expect of them is in `triton_kernels.py`, which is
imported at the first launch. How they are cut into blocks is decided in `_triton.py`.
"""
import functools
from typing import Any, Optional

import torch

from .. import _triton
from .eager import Grads

refuse = _triton.refuse


@functools.cache
def _kernels() -> Any:
    from . import triton_kernels
    return triton_kernels


def forward(
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> torch.Tensor:
    """See `local_attention_reference`, whose arguments and result these are."""
    logits = _triton.with_near_taps(logits)
    problem = _triton.Problem(value, logits.shape[3], kernel_size, dilation)
    mul, add = _by_tap(ghost_mul), _by_tap(ghost_add)
    out = _triton.empty(value, value.shape, value.dtype)

    def launch(blocks: _triton.Blocks) -> None:
        sizes, grid = problem.cut(blocks)
        _kernels().forward_kernel[grid,](
            out, value, logits, mul, add, **sizes, splits=problem.splits, **_triton.strides(v=value, l=logits),
            KP=problem.side, NORMALIZE=normalize, HAS_MUL=mul is not None, HAS_ADD=add is not None,
            **_triton.options(blocks))

    problem.launch('forward', launch, problem.BC, (normalize, mul is not None, add is not None))
    return out.to(value.dtype)


def backward(
        grad: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        ghost_mul: Optional[torch.Tensor],
        ghost_add: Optional[torch.Tensor],
        kernel_size: int,
        dilation: int,
        normalize: bool,
) -> Grads:
    """Gradients of value, logits, ghost_mul and ghost_add (None where that is None) for the output's `grad`."""
    logits = _triton.with_near_taps(logits)
    problem = _triton.Problem(value, logits.shape[3], kernel_size, dilation)
    mul, add = _by_tap(ghost_mul), _by_tap(ghost_add)
    has = mul is not None, add is not None
    grad_logits = _triton.empty(logits, logits.shape, logits.dtype)
    stats = _triton.empty(value, logits.shape[:4] + (2,), problem.dtype) if normalize else None
    partial = [None if x is None else _triton.empty(x, (0, *x.shape), problem.dtype) for x in (ghost_mul, ghost_add)]

    def launch_logits(blocks: _triton.Blocks, to_logits: bool, to_ghosts: bool) -> None:
        splits, steps = (1, problem.splits) if to_logits else (problem.splits, 1)
        sizes, grid = problem.cut(blocks, splits)
        tiles = grid // (problem.G * splits)
        programs = problem.programs(tiles, splits) if to_ghosts else tiles
        if to_ghosts:
            shape = (programs, problem.C, kernel_size, kernel_size)
            partial[:] = [_triton.empty(value, shape, problem.dtype) if x else None for x in has]
        _kernels().backward_logits_kernel[programs * problem.G * splits,](
            grad_logits, stats, *partial, grad, value, logits, mul, **sizes,
            tiles=tiles, programs=programs, splits=splits, steps=steps, **_triton.strides(g=grad, v=value, l=logits),
            KP=problem.side, NORMALIZE=normalize, HAS_MUL=has[0],
            LOGITS=to_logits, GRAD_MUL=to_ghosts and has[0], GRAD_ADD=to_ghosts and has[1], **_triton.options(blocks))

    fused = any(has) and problem.splits == 1  # one reading of grad and value for all three
    width = max(problem.BC, problem.side ** 2)
    problem.launch('backward_logits', lambda blocks: launch_logits(blocks, True, fused), width, (normalize, *has))
    if any(has) and not fused:
        problem.launch('backward_ghosts', lambda blocks: launch_logits(blocks, False, True), width, (normalize, *has))
    grad_value = _transposed(problem, grad, logits, stats, mul, add)
    grad_mul, grad_add = (None if x is None else x.sum(0).to(value.dtype) for x in partial)
    return grad_value, grad_logits.to(value.dtype), grad_mul, grad_add


def aggregate_transposed(
        value: torch.Tensor, weights: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Send every pixel of `value`, times its `weights`, to its K x K neighbours: (B, H, W, C)."""
    problem = _triton.Problem(value, weights.shape[3], kernel_size, dilation)
    return _transposed(problem, value, _triton.with_near_taps(weights), None, None, None)


def _transposed(
        problem: _triton.Problem,
        grad: torch.Tensor,
        logits: torch.Tensor,
        stats: Optional[torch.Tensor],
        mul: Optional[torch.Tensor],
        add: Optional[torch.Tensor],
) -> torch.Tensor:
    """Gradient of the values; without statistics of their softmax the logits are weights."""
    out = _triton.empty(grad, grad.shape, grad.dtype)
    form = stats is not None, mul is not None, add is not None

    def launch(blocks: _triton.Blocks) -> None:
        sizes, grid = problem.cut(blocks)
        _kernels().backward_value_kernel[grid,](
            out, grad, logits, stats, mul, add, **sizes, splits=problem.splits, **_triton.strides(g=grad, l=logits),
            NORMALIZE=form[0], HAS_MUL=form[1], HAS_ADD=form[2], **_triton.options(blocks))

    problem.launch('backward_value', launch, problem.BC, form)
    return out.to(grad.dtype)


def _by_tap(ghost: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Turn (C, K, K) into (K, K, C), so that a tap's channels are read at once."""
    return None if ghost is None else ghost.permute(1, 2, 0).contiguous()
