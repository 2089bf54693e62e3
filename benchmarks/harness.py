"""What every measurement shares: interleaved timing, peak memory, what the machine can do, and the CSV."""
import argparse
import csv
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import timm
import torch

Step = Callable[[], Any]
RESULTS = Path(__file__).parent / 'results'


def keep_freed_memory() -> None:
    """Let the C library keep what is freed (glibc; nothing elsewhere).

    Otherwise it returns memory and fetches it anew, page by page, at each step of that side which happens to run first:
    5 % of the time of a model.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    mallopt = _c_library('mallopt')
    mallopt(trim_threshold, 2 ** 31 - 1)
    mallopt(mmap_max, 0)


def _c_library(name: str) -> Callable[..., Any]:
    """A function of the C library, one that does nothing where it has none."""
    return getattr(ctypes.CDLL(None) if os.name == 'posix' else None, name, lambda *args: None)


def synchronize(device: str) -> None:
    if device.startswith('cuda'):
        torch.cuda.synchronize()


def interleave(steps: List[Step], device: str, runs: int, warmup: int, min_seconds: float) -> List[List[float]]:
    """Seconds per call of each step, `runs` times over, the steps taken in turn.

    One measurement repeats a step until it takes `min_seconds`, so that clocks and launches do not count.
    """
    def measure(step: Step, calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    for step in steps:
        for _ in range(warmup):
            step()
    calls = [max(1, math.ceil(min_seconds / measure(step, 1))) for step in steps]
    times: List[List[float]] = [[] for _ in steps]
    for _ in range(runs):
        for i, step in enumerate(steps):
            times[i].append(measure(step, calls[i]))
    return times


def compile_seconds(step: Step, device: str) -> float:
    """What the first call of a compiled step takes, without what earlier compilations left on disk."""
    start = time.perf_counter()
    with torch.compiler.config.patch(force_disable_caches=True):
        step()
    synchronize(device)
    return time.perf_counter() - start


def compare(ours: List[float], theirs: List[float]) -> Dict[str, str]:
    """Median, 20th and 80th percentile of ours / theirs, each from two neighbouring measurements."""
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    return dict(
        ratio=f'{statistics.median(ratios):.3f}',
        ratio_p20=f'{ratios[len(ratios) // 5]:.3f}', ratio_p80=f'{ratios[-1 - len(ratios) // 5]:.3f}')


def captured(step: Step) -> Step:
    """The same work as a CUDA graph: what the GPU takes for it, without the launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_memory(script: str, spec: Dict, args: argparse.Namespace) -> float:
    """Peak MiB of two steps of `spec`, from a fresh process that runs `script --memory-of` (on the CPU: Linux).

    On the CPU the median of three, where so many runs are wanted: allocation differs by 5 % from process to process.
    """
    command = [sys.executable, script, '--memory-of', json.dumps(spec)]
    for option in ('device', 'dtype', 'threads'):
        command += [f'--{option}', str(getattr(args, option))]
    peaks = []
    for _ in range(1 if args.device.startswith('cuda') else min(3, args.runs)):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f'Memory of {spec} could not be measured:\n{result.stderr[-2000:]}')
        peaks.append(float(result.stdout.split()[-1]))
    return statistics.median(peaks)


def print_peak_memory(make_step: Callable[[], Step], device: str, warm: Optional[Step] = None) -> None:
    """Print the MiB above what the process held before `make_step` built anything.

    With `warm`, a step that is made before that, the code of libraries and kernels that it loads does not count: what a
    process pays once, whatever it computes.
    """
    if warm is not None:
        warm()
        gc.collect()
        _c_library('malloc_trim')(0)  # else steps would take what compilers have left
    if device.startswith('cuda'):
        before = float(torch.cuda.memory_allocated()) / 2 ** 20 if warm is not None else 0.
        torch.cuda.reset_peak_memory_stats()
    else:
        if warm is not None:
            Path('/proc/self/clear_refs').write_text('5')  # the peak so far
        before = _resident('VmRSS')
    step = make_step()
    step()
    step()
    synchronize(device)
    if device.startswith('cuda'):
        print(torch.cuda.max_memory_allocated() / 2 ** 20 - before)
    else:
        print(_resident('VmHWM') - before)


def _resident(field: str) -> float:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f'{field} is not in /proc/self/status')


def measure_machine(device: str, dtype: torch.dtype) -> Dict[str, float]:
    """What can be had here: bytes/s of a copy, and operations/s of a matrix product, in float32 and in `dtype`.

    The float32 product runs without TF32: local attention sums in float32 outside tensor cores.
    """
    n = 4096 if device.startswith('cuda') else 1024
    source = torch.ones(2 ** 28 if device.startswith('cuda') else 2 ** 25, device=device)
    target = torch.empty_like(source)

    def rate(dtype: torch.dtype) -> float:
        a = torch.randn(n, n, device=device).to(dtype)
        seconds, = interleave([lambda: a @ a], device, 7, 2, .01)
        return 2 * n ** 3 / statistics.median(seconds)

    seconds, = interleave([lambda: target.copy_(source)], device, 7, 2, .01)
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        sums = rate(torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    products = sums if dtype == torch.float32 and not allowed else rate(dtype)
    return dict(bandwidth=2 * source.nbytes / statistics.median(seconds), sums=sums, products=products)


def describe_machine(args: argparse.Namespace) -> Dict[str, str]:
    if args.device.startswith('cuda'):
        hardware = torch.cuda.get_device_name()
    else:
        info = Path('/proc/cpuinfo')
        cpu = [x for x in info.read_text().splitlines() if x.startswith('model name')] if info.exists() else []
        hardware = (cpu[0].partition(':')[2].strip() if cpu else platform.machine()) + f', {args.threads} threads'
    return dict(
        date=datetime.date.today().isoformat(), commit=commit(), hardware=hardware,
        torch=torch.__version__, timm=timm.__version__, device=args.device, dtype=args.dtype)


def commit() -> str:
    """Of this checkout, marked where anything but the results differs from it."""
    def git(*args: str) -> str:
        done = subprocess.run(['git', *args], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    return git('describe', '--always') + ('-dirty' if git('status', '--porcelain', '-uno', ':/', ':!results') else '')


def read(path: Path) -> List[Dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


def append(path: Path, row: Dict[str, Any]) -> None:
    """Add a row; earlier rows stay, with empty cells where they lack a column. Never leaves half a file."""
    rows = [*read(path), row]
    columns = list(dict.fromkeys(name for r in (row, *rows) for name in r))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    with part.open('w', newline='') as f:
        writer = csv.DictWriter(f, columns, restval='')
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
