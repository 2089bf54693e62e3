"""What operators by Triton kernels share: what they refuse, how kernels are cut into blocks, and their launch.

With `TRITON_INTERPRET=1` in the environment before elsa_models is imported, Triton's interpreter runs the kernels on
CPU tensors, slowly: for tests. Importing this module needs no Triton.

How a kernel is cut into blocks is timed once per kind of problem and process, and kept. Nothing is timed while a CUDA
graph is captured, nor where PyTorch is told to be deterministic: blocks decide the order of sums, and so the last bit.
"""
import functools
import importlib.util
import logging
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from ._bands import compute_dtype

_logger = logging.getLogger(__name__)

INTERPRET = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')
_HAS_TRITON = importlib.util.find_spec('triton') is not None
_MIN_CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports

_BLOCK_CHANNELS = 64  # channels of a head that one program takes at most
_NUMBERS = 16  # of one block that a thread holds: with more, machine code for sm_90 spills registers
_PROGRAMS_PER_SM = 8  # that sum ghost gradients: enough to fill it, few enough that their partial sums stay small
_TIMED_LAUNCHES = 7


class Blocks(NamedTuple):
    """How a kernel is cut: pixels of a tile at most, and warps that share one."""
    pixels: int
    warps: int


_CANDIDATES = (Blocks(64, 4), Blocks(64, 8), Blocks(32, 4), Blocks(128, 8))  # the first that fits serves untimed
_WIDE = Blocks(16, 8)  # where none fits
_INTERPRETED = (Blocks(32, 1),)  # it sums pixels one after the other, and 64 lose digits that a GPU keeps

_chosen: Dict[Tuple, Blocks] = {}


def refuse(value: torch.Tensor) -> Optional[str]:
    """Why this backend cannot serve `value`, or None: it needs Triton and an NVIDIA GPU, or Triton's interpreter."""
    if not _HAS_TRITON:
        return 'Triton is not installed.'
    if INTERPRET:
        return None if value.device.type in ('cpu', 'cuda') else f'it has no kernels for {value.device.type}.'
    if value.device.type != 'cuda':
        return f'it needs a CUDA tensor, got one on {value.device.type}.'
    return _refuse_gpu(value.device.index)


@torch.compiler.assume_constant_result  # a property of the machine, not of the graph
@functools.cache
def _refuse_gpu(index: Optional[int]) -> Optional[str]:
    if torch.version.cuda is None:
        return 'it has been written for NVIDIA GPUs only.'
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        return f'it needs compute capability 8.0, got {capability[0]}.{capability[1]}.'
    try:
        import triton.language  # noqa: F401
        _ready()
    except Exception as error:  # whatever a broken installation raises: PyTorch alone can serve
        _logger.warning('Triton is installed but does not work: %r. PyTorch alone computes, which is slower.', error)
        return f'Triton does not work: {error!r}.'
    return None


def _ready() -> None:
    """Require what every kernel needs: Triton's driver, which a C compiler makes once, and its cache on the disk.

    Raises:
        Exception: What is missing, in Triton's own words.
    """
    from triton import knobs
    from triton.runtime import driver
    driver.active  # noqa: B018, makes it
    os.makedirs(knobs.cache.dir, exist_ok=True)
    if not os.access(knobs.cache.dir, os.W_OK):
        raise PermissionError(f'{knobs.cache.dir} cannot be written; TRITON_CACHE_DIR names another folder')


class Problem:
    """Sizes of one call, and what the kernels are told of them."""

    def __init__(self, value: torch.Tensor, heads: int, K: int, dilation: int) -> None:
        self.B, self.H, self.W, self.C = value.shape
        self.G = heads
        self.width = self.C // self.G
        self.K, self.device = K, value.device
        self.dilation = min(dilation, max(self.H, self.W))  # further out there is nothing either
        self.storage, self.dtype = value.dtype, compute_dtype(value)
        self.BC = min(_BLOCK_CHANNELS, _power_of_two(self.width))
        self.splits = -(-self.width // self.BC)  # blocks of channels in a head
        self.side = _power_of_two(K)

    def cut(self, blocks: Blocks, splits: Optional[int] = None) -> Tuple[Dict[str, Any], int]:
        """What all kernels are told, and the number of programs if each has one tile."""
        TH, TW = tile(self.H, self.W, blocks.pixels, self.K // 2 * self.dilation)
        tiles_h, tiles_w = -(-self.H // TH), -(-self.W // TW)
        sizes = dict(
            H=self.H, W=self.W, C=self.C, width=self.width, TH=TH, TW=TW, tiles_h=tiles_h, tiles_w=tiles_w,
            heads=self.G, rows=self.K, dilation=self.dilation, K=self.K, BP=blocks.pixels, BC=self.BC,
            T=_triton_type(self.dtype))
        return sizes, self.B * tiles_h * tiles_w * self.G * (self.splits if splits is None else splits)

    def programs(self, tiles: int, splits: int) -> int:
        """Programs of each head and block among which the tiles are dealt out where sums over tiles are taken."""
        if self.device.type == 'cuda':
            wanted = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(self.device).multi_processor_count
        else:
            wanted = 3 * self.G * splits  # some, so that tests see more than one tile in a program
        return min(tiles, -(-wanted // (self.G * splits)))

    def launch(self, kernel: str, launch: Callable[[Blocks], None], width: int, form: Tuple[bool, ...]) -> None:
        """Launch with the best blocks known.

        Args:
            kernel: Name of the kernel, one of all operators.
            launch: Launches it with given blocks.
            width: Numbers of the widest block that belongs to one pixel.
            form: What else tells one compiled form of the kernel from another.
        """
        if self.B == 0:
            return
        candidates = fitting(width)
        if self.device.type != 'cuda':
            launch(candidates[0])
            return
        with torch.cuda.device(self.device):
            if torch.are_deterministic_algorithms_enabled():
                launch(candidates[0])
                return
            key = (
                kernel, self.device.index, self.storage, self.K, self.dilation > 1, self.width, form,
                (self.B * self.H * self.W * self.G).bit_length())
            if key not in _chosen:
                if torch.cuda.is_current_stream_capturing():
                    launch(candidates[0])
                    return
                _chosen[key] = min(candidates, key=lambda blocks: _time(launch, blocks))
            launch(_chosen[key])


def fitting(width: int) -> List[Blocks]:
    """Candidates whose threads can hold `width` numbers of every pixel; at least one."""
    if INTERPRET:
        return [*_INTERPRETED]
    fitting = [x for x in _CANDIDATES if x.pixels * width <= _NUMBERS * 32 * x.warps]
    return fitting or [_WIDE]


def _time(launch: Callable[[Blocks], None], blocks: Blocks) -> float:
    """Median milliseconds of a launch, infinite where the GPU has not the registers or the shared memory for it."""
    from triton.runtime.errors import OutOfResources
    try:
        launch(blocks)  # compiles
    except OutOfResources:
        return float('inf')
    times = []
    for _ in range(_TIMED_LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch(blocks)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[_TIMED_LAUNCHES // 2]


@functools.lru_cache(maxsize=4096)
def tile(H: int, W: int, pixels: int, reach: int) -> Tuple[int, int]:
    """Height and width of tiles of at most so many pixels that cover a map with little idle work and little halo."""
    best, best_cost = (1, 1), float('inf')
    for TW in range(1, min(W, pixels) + 1):
        TH = min(H, pixels // TW)
        tiles = -(-H // TH) * -(-W // TW)
        TH, TW = -(-H // -(-H // TH)), -(-W // -(-W // TW))  # the same number of tiles, as even as can be
        cost = tiles * (pixels + (TH + 2 * reach) * (TW + 2 * reach))
        if cost < best_cost:
            best, best_cost = (TH, TW), cost
    return best


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def empty(like: torch.Tensor, shape: Tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # the interpreter cuts what a GPU rounds to bfloat16, so there PyTorch rounds
    return like.new_empty(shape, dtype=torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype)


def with_near_taps(logits: torch.Tensor) -> torch.Tensor:
    # taps of a pixel are addressed in 32 bits, everything else in 64
    return logits if logits.shape[4] * logits.stride(4) < 2 ** 31 else logits.contiguous()


def strides(**tensors: torch.Tensor) -> Dict[str, int]:
    """Strides by the names of the kernels' arguments: `v=value` gives vb, vh, vw, vc, and a fifth dimension lt."""
    names = {4: 'bhwc', 5: 'bhwgt'}
    return {p + n: stride for p, x in tensors.items() for n, stride in zip(names[x.dim()], x.stride())}


def options(blocks: Blocks) -> Dict[str, Any]:
    # a multiplication and an addition are one instruction only where Triton is told so, from 3.10 on
    return dict(num_warps=blocks.warps, enable_fp_fusion=True)


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]
