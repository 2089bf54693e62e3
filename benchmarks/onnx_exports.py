"""Measure how long exports to ONNX take, and how large the files are, into a CSV.

    python benchmarks/onnx_exports.py                       # every model of this package, at its own size
    python benchmarks/onnx_exports.py elsa_swin_tiny

Each model is exported with random weights, a fixed batch and its own size, in a new process. Seconds are those of
`export_onnx`: to write the graph, and to see in ONNX Runtime that it computes what the model computes.
"""
import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Dict

import harness
import timm
import torch

import elsa_models

RESULTS = Path(__file__).parent / 'results' / 'onnx_exports.csv'


def measure(name: str, threads: int) -> Dict[str, str]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = elsa_models.export_onnx(model, Path(folder) / 'model.onnx', dynamic_batch=False)
        seconds = time.perf_counter() - start
        return dict(model=name, img_size=str(model.patch_embed.img_size[0]), seconds=f'{seconds:.1f}',
                    megabytes=f'{sum(x.stat().st_size for x in path.parent.iterdir()) / 1e6:.1f}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', default=timm.list_models(['elsa_*', 'test_elsa_*']), metavar='MODEL')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--csv', type=Path, default=RESULTS, help='rows are appended')
    args = parser.parse_args()
    args.device, args.dtype = 'cpu', 'float32'
    for name in args.models:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as executor:
            row = executor.submit(measure, name, args.threads).result()
        harness.append(args.csv, {**harness.describe_machine(args), **row})
        print(' '.join(row.values()), flush=True)


if __name__ == '__main__':
    main()
