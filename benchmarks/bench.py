"""Measure models against their timm counterparts: interleaved pairs, gated on correctness, written to a CSV.

    python benchmarks/bench.py                                  # ELSA-Swin-T on the CPU: inference and training step
    python benchmarks/bench.py --pair elsa_swin_base:swin_base_patch4_window7_224 --form compiled --batch 1 8
    python benchmarks/bench.py --device cuda --dtype bfloat16 --batch 128

One row per pair, mode, form, batch and size. A ratio is the median over runs of (model / baseline), each taken from
two neighbouring measurements, so that a machine that slows down slows both. Peak memory is measured in a process of
its own, above what the process held before the model was built.
"""
import argparse
import csv
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

import timm
import torch

import elsa_models
from elsa_models.export import export_onnx

PAIRS = ['elsa_swin_tiny:swin_tiny_patch4_window7_224']
RESULTS = Path(__file__).parent / 'results' / 'models.csv'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pair', nargs='+', default=PAIRS, metavar='MODEL:BASELINE')
    parser.add_argument('--mode', nargs='+', default=['infer', 'train'], choices=['infer', 'train'])
    parser.add_argument('--form', nargs='+', default=['eager'], choices=['eager', 'compiled', 'onnxruntime'])
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--img-size', nargs='+', type=int, default=[224])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--runs', type=int, default=15, help='measurements of each side')
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--csv', type=Path, default=RESULTS, help='rows are appended')
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)  # one model, in the process that measures its memory
    return parser.parse_args()


def build(name: str, size: int, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = dict(img_size=size) if 'volo' not in name or name.startswith('elsa') else {}
    return timm.create_model(name, **kwargs).to(args.device, getattr(torch, args.dtype))


def make_images(batch: int, size: int, args: argparse.Namespace) -> torch.Tensor:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(args.device, getattr(torch, args.dtype))


def make_step(model: torch.nn.Module, images: torch.Tensor, mode: str, form: str) -> Callable[[], torch.Tensor]:
    """A function that does the work to be measured."""
    model.train(mode == 'train')
    if form == 'onnxruntime':
        return make_onnxruntime_step(model, images)
    forward = torch.compile(model) if form == 'compiled' else model
    if mode == 'infer':
        def infer() -> torch.Tensor:
            with torch.inference_mode():
                return forward(images)
        return infer

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    target = torch.arange(len(images), device=images.device)

    def train() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(forward(images), target)
        loss.backward()
        optimizer.step()
        return loss
    return train


def make_onnxruntime_step(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / 'model.onnx', img_size=images.shape[-1])
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    array = images.numpy()
    return lambda: session.run(None, {'image': array})


def check(name: str, size: int, args: argparse.Namespace) -> float:
    """Require that a model of ours errs at most twice as much as plain PyTorch in the same dtype.

    Returns the ratio of the two errors, each the largest difference to the reference formula in float64.
    """
    model = build(name, size, args).eval()
    images = make_images(2, size, args)
    outputs: Dict[str, torch.Tensor] = {}
    with torch.no_grad():
        outputs['fast'] = model(images)
        elsa_models.set_backend('reference')
        try:
            outputs['plain'] = model(images)
            truth = model.double()(images.double())
        finally:
            elsa_models.set_backend('auto')
    error = {k: (y.double() - truth).abs().max().item() for k, y in outputs.items()}
    ratio = error['fast'] / error['plain']
    if not ratio <= 2.:
        raise SystemExit(f'{name} is wrong: error {error["fast"]:.1e}, plain {error["plain"]:.1e}. Not measured.')
    return ratio


def measure_pair(steps: List[Callable], args: argparse.Namespace) -> List[List[float]]:
    """Seconds of each run of each side, taken in turn."""
    times: List[List[float]] = [[], []]
    for run in range(args.warmup + args.runs):
        for side, step in enumerate(steps):
            synchronize(args)
            start = time.perf_counter()
            step()
            synchronize(args)
            if run >= args.warmup:
                times[side].append(time.perf_counter() - start)
    return times


def synchronize(args: argparse.Namespace) -> None:
    if args.device.startswith('cuda'):
        torch.cuda.synchronize()


def peak_memory(name: str, mode: str, form: str, batch: int, size: int, args: argparse.Namespace) -> float:
    """Peak MiB of two steps above the process's own, from a fresh process (Linux on the CPU)."""
    spec = json.dumps([name, mode, form, batch, size])
    command = [sys.executable, __file__, '--memory-of', spec]
    for option in ('device', 'dtype', 'threads'):
        command += [f'--{option}', str(getattr(args, option))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak_memory(args: argparse.Namespace) -> None:
    name, mode, form, batch, size = json.loads(args.memory_of)
    before = resident('VmRSS')
    step = make_step(build(name, size, args), make_images(batch, size, args), mode, form)
    step()
    step()
    if args.device.startswith('cuda'):
        print(torch.cuda.max_memory_allocated() / 2 ** 20)
    else:
        print(resident('VmHWM') - before)


def resident(field: str) -> float:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f'{field} is not in /proc/self/status')


def describe_machine(args: argparse.Namespace) -> Dict[str, str]:
    if args.device.startswith('cuda'):
        hardware = torch.cuda.get_device_name()
    else:
        cpu = [x for x in Path('/proc/cpuinfo').read_text().splitlines() if x.startswith('model name')]
        hardware = (cpu[0].partition(':')[2].strip() if cpu else platform.machine()) + f', {args.threads} threads'
    commit = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(
        date=datetime.date.today().isoformat(),
        commit=commit.stdout.strip(),
        hardware=hardware,
        torch=torch.__version__,
        timm=timm.__version__,
    )


def append(path: Path, row: Dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open('a', newline='') as f:
        writer = csv.DictWriter(f, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_peak_memory(args)
        return
    for pair in args.pair:
        name, baseline = pair.split(':')
        for size in args.img_size:
            error_ratio = check(name, size, args)
            for mode, form, batch in ((m, f, b) for m in args.mode for f in args.form for b in args.batch):
                if form == 'onnxruntime' and mode == 'train':
                    continue
                images = make_images(batch, size, args)
                steps = [make_step(build(n, size, args), images, mode, form) for n in (name, baseline)]
                times = measure_pair(steps, args)
                del steps
                ratios = sorted(a / b for a, b in zip(*times))
                memory = [peak_memory(n, mode, form, batch, size, args) for n in (name, baseline)]
                medians = [statistics.median(t) for t in times]
                row = dict(
                    **describe_machine(args), device=args.device, dtype=args.dtype, mode=mode, form=form, batch=batch,
                    img_size=size, model=name, baseline=baseline, runs=args.runs,
                    ratio=f'{statistics.median(ratios):.3f}',
                    ratio_p20=f'{ratios[len(ratios) // 5]:.3f}', ratio_p80=f'{ratios[-1 - len(ratios) // 5]:.3f}',
                    memory_ratio=f'{memory[0] / memory[1]:.3f}', error_ratio=f'{error_ratio:.2f}',
                    images_per_s=f'{batch / medians[0]:.2f}', baseline_images_per_s=f'{batch / medians[1]:.2f}',
                    peak_mib=f'{memory[0]:.0f}', baseline_peak_mib=f'{memory[1]:.0f}',
                )
                append(args.csv, row)
                print(
                    f'{name} / {baseline}, {args.device} {args.dtype} {mode} {form} batch {batch} at {size}: '
                    f'time {row["ratio"]} ({row["ratio_p20"]} to {row["ratio_p80"]}), memory {row["memory_ratio"]}, '
                    f'error {row["error_ratio"]} of plain PyTorch\'s', flush=True)


if __name__ == '__main__':
    main()
