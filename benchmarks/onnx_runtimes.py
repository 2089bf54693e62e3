"""Measure exported models against their timm counterparts in ONNX Runtime or OpenVINO: interleaved, into a CSV.

    python benchmarks/onnx_runtimes.py                                     # ELSA-Swin-T and ELSA-VOLO-D1
    python benchmarks/onnx_runtimes.py --runtime openvino --threads 1
    python benchmarks/onnx_runtimes.py --pair elsa_swin_tiny:elsa_swin_tiny --precision int8 --images FOLDER
    python benchmarks/onnx_runtimes.py --profile                           # milliseconds by node type as well

Both sides are exported the same way, with a fixed batch and size, by `export_onnx`, which checks their outputs. With
--precision the model is exported so, and its baseline in float32. A ratio is the median over runs of (model /
baseline), each taken from two neighbouring measurements.
"""
import argparse
import collections
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, List, Tuple

import harness
import numpy as np
from bench import build

from elsa_models.export import PRECISIONS, export_onnx

PAIRS = ['elsa_swin_tiny:swin_tiny_patch4_window7_224', 'elsa_volo_d1_224:volo_d1_224']
RESULTS = Path(__file__).parent / 'results' / 'onnx.csv'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pair', nargs='+', default=PAIRS, metavar='MODEL:BASELINE')
    parser.add_argument('--runtime', choices=['onnxruntime', 'openvino'], default='onnxruntime')
    parser.add_argument('--precision', choices=PRECISIONS, default='float32')
    parser.add_argument('--images', type=Path, help='folder to calibrate int8 on')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--runs', type=int, default=25, help='measurements of each side')
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--profile', action='store_true', help='print the time of each node type (ONNX Runtime)')
    parser.add_argument('--folder', type=Path, help='where to keep the exported files, and to look for them')
    parser.add_argument('--csv', type=Path, default=RESULTS, help='rows are appended')
    args = parser.parse_args()
    args.device, args.dtype = 'cpu', 'float32'
    return args


def export(name: str, precision: str, folder: Path, args: argparse.Namespace) -> Tuple[Path, float]:
    """The file and the seconds that its export took in a new process, checks included; nan if it was there.

    Not in this one: ONNX Runtime's thread pools are either all of a session or all shared, see `share_threads`.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as executor:
        return executor.submit(_export, name, precision, folder, args).result()


def _export(name: str, precision: str, folder: Path, args: argparse.Namespace) -> Tuple[Path, float]:
    path = folder / f'{name}_{args.img_size}_{precision}.onnx'
    if path.exists():
        return path, float('nan')
    start = time.perf_counter()
    export_onnx(
        build(name, args.img_size, args), path, img_size=args.img_size, dynamic_batch=False, precision=precision,
        images=args.images if precision == 'int8' else None)
    return path, time.perf_counter() - start


def make_session(path: Path, args: argparse.Namespace, profile: bool = False):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False  # see share_threads
    options.log_severity_level = 3
    options.enable_profiling = profile
    options.profile_file_prefix = str(path.with_suffix(''))
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def make_step(path: Path, image: np.ndarray, args: argparse.Namespace) -> Callable[[], None]:
    if args.runtime == 'onnxruntime':
        session = make_session(path, args)
        return lambda: session.run(None, {'image': image})
    import openvino
    config = {'INFERENCE_NUM_THREADS': args.threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    compiled = openvino.Core().compile_model(str(path), 'CPU', config)
    return lambda: compiled([image])


def print_profile(path: Path, image: np.ndarray, args: argparse.Namespace, runs: int = 10) -> None:
    session = make_session(path, args, profile=True)
    for _ in range(runs):
        session.run(None, {'image': image})
    file = Path(session.end_profiling())
    times, counts = collections.Counter(), collections.Counter()
    for event in json.loads(file.read_text()):
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            times[event['args']['op_name']] += event['dur'] / runs / 1e3
            counts[event['args']['op_name']] += 1
    file.unlink()
    total = sum(times.values())
    print(f'{path.stem}: share of each node type')
    for name, milliseconds in times.most_common(14):
        print(f'  {name:24s}{milliseconds / total:7.1%}  {counts[name] // runs} nodes')


def share_threads(threads: int) -> None:
    """Give all sessions of ONNX Runtime one pool.

    The idle threads of a session's own pool spin, and so take the cores of the other side: with 2 threads on 2 cores,
    both take twice as long.
    """
    import onnxruntime
    onnxruntime.set_default_logger_severity(3)
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def main() -> None:
    args = parse_args()
    if args.runtime == 'onnxruntime':
        share_threads(args.threads)
    image = np.random.default_rng(0).standard_normal((1, 3, args.img_size, args.img_size)).astype(np.float32)
    for pair in args.pair:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.folder or Path(temporary)
            files, seconds = zip(*[
                export(name, precision, folder, args)
                for name, precision in zip(pair.split(':'), (args.precision, 'float32'))])
            steps: List[Callable] = [make_step(path, image, args) for path in files]
            times = harness.interleave(steps, 'cpu', args.runs, args.warmup, 0.)
            if args.profile:
                for path in files:
                    print_profile(path, image, args)
            sizes = [path.stat().st_size / 1e6 for path in files]
        name, baseline = pair.split(':')
        row = dict(
            **harness.describe_machine(args), runtime=args.runtime, precision=args.precision, img_size=args.img_size,
            model=name, baseline=baseline, runs=args.runs, **harness.compare(*times),
            export_s=' '.join(f'{x:.0f}' for x in seconds if x == x), megabytes=f'{sizes[0]:.1f}',
            baseline_megabytes=f'{sizes[1]:.1f}')
        harness.append(args.csv, row)
        print(
            f'{name} / {baseline}, {args.runtime} {args.precision}, {args.threads} threads: time {row["ratio"]} '
            f'({row["ratio_p20"]} to {row["ratio_p80"]}), export {row["export_s"] or "not repeated"} s, '
            f'{sizes[0]:.0f} and {sizes[1]:.0f} MB', flush=True)


if __name__ == '__main__':
    main()
