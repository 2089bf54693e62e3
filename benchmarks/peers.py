"""Measure the models of this package among those of timm that one could take instead: accuracy against time.

    python benchmarks/peers.py                        # batch 1 and 8 in PyTorch, batch 1 in ONNX Runtime: half an hour
    python benchmarks/peers.py --quick                # batch 1 in PyTorch: minutes
    python benchmarks/peers.py --model swin_tiny_patch4_window7_224 elsa_swin_tiny --batch 1
    python benchmarks/plot.py                         # draw docs/img/peers_cpu.png

Each model runs at the size of its accuracy, in turn with a ResNet-50 at 224 pixels, and its time is the median ratio
of the two: so the machine cancels. Rows go to results/peers.csv. Accuracies are published ones, of ImageNet-1k's
validation set with no other images in training: timm's are of its results/results-imagenet.csv (commit 0173a13), those
of this package's families of their papers, whose weights are partly not public. None has been measured here.
"""
import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional

import harness
import onnx_runtimes
import torch
from bench import build, make_images

from elsa_models.inspect import count_macs

REFERENCE, REFERENCE_SIZE = 'resnet50', 224
TIMM, PAPER = 'timm', 'paper'  # who has published an accuracy


class Peer(NamedTuple):
    name: str
    size: int  # pixels
    top1: Optional[float]  # percent
    source: str = TIMM


PEERS = [
    Peer('resnet50', 288, 81.214),  # a1_in1k
    Peer('regnety_032', 288, 82.728),  # ra_in1k
    Peer('regnety_080', 288, 83.926),  # ra3_in1k
    Peer('convnext_tiny', 288, 82.698),  # fb_in1k
    Peer('convnext_small', 288, 83.700),
    Peer('swin_tiny_patch4_window7_224', 224, 81.376),  # ms_in1k
    Peer('swin_small_patch4_window7_224', 224, 83.208),
    Peer('swin_base_patch4_window7_224', 224, 83.606),
    Peer('swinv2_tiny_window8_256', 256, 81.820),  # ms_in1k
    Peer('volo_d1_224', 224, 84.162),  # sail_in1k, with token labels
    Peer('caformer_s18', 224, 83.656),  # sail_in1k
    Peer('maxvit_tiny_tf_224', 224, 83.402),  # in1k
    Peer('coatnet_0_rw_224', 224, 82.390),  # sw_in1k
    Peer('focalnet_tiny_srf', 224, 82.134),  # ms_in1k
    Peer('davit_tiny', 224, 82.696),  # msft_in1k
    Peer('efficientformerv2_l', 224, 83.632),  # snap_dist_in1k, distilled
    Peer('halonet50ts', 256, 81.660),  # a1h_in1k
    Peer('lambda_resnet50ts', 256, 81.156),  # a1h_in1k
    Peer('deit3_small_patch16_224', 224, 81.370),  # fb_in1k
    Peer('deit_small_patch16_224', 224, 79.844),  # fb_in1k
    Peer('cait_s24_224', 224, 83.442),  # fb_dist_in1k, distilled
    Peer('elsa_swin_tiny', 224, 82.7, PAPER),
    Peer('elsa_swin_small', 224, 83.5, PAPER),
    Peer('elsa_swin_base', 224, 84.0, PAPER),
    Peer('elsa_volo_d1_224', 224, 84.7, PAPER),  # with token labels
    Peer('focal_tiny_patch4_window7_224', 224, 82.2, PAPER),
    Peer('focal_small_patch4_window7_224', 224, 83.6, PAPER),
    Peer('refiner_vit_small_patch16_224', 224, 83.6, PAPER),  # with token labels
    Peer('sasa_resnet50', 224, 77.4, PAPER),
    Peer('axial_resnet50s', 224, 77.5, PAPER),
    Peer('gsa_resnet50', 224, None, PAPER),
    Peer('lg_tiny_patch4_window7_224', 224, None, PAPER),
]
QUICK = ['swin_tiny_patch4_window7_224', 'convnext_tiny', 'elsa_swin_tiny']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='three models at batch 1 in PyTorch')
    parser.add_argument('--model', nargs='+', choices=[p.name for p in PEERS])
    parser.add_argument('--runtime', nargs='+', choices=['eager', 'onnxruntime'])
    parser.add_argument('--batch', nargs='+', type=int, help='images at once in PyTorch; ONNX Runtime takes one')
    parser.add_argument('--runs', type=int, default=7, help='measurements of each side')
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--min-seconds', type=float, default=.2, help='that one measurement takes at least')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--results', type=Path, default=harness.RESULTS, help='folder of the CSV')
    args = parser.parse_args()
    args.model = args.model or (QUICK if args.quick else [p.name for p in PEERS])
    args.runtime = args.runtime or (['eager'] if args.quick else ['eager', 'onnxruntime'])
    args.batch = args.batch or ([1] if args.quick else [1, 8])
    if 'onnxruntime' in args.runtime and args.device != 'cpu':
        parser.error('--runtime onnxruntime: is for --device cpu.')
    return args


def eager_step(name: str, size: int, batch: int, args: argparse.Namespace) -> harness.Step:
    model, images = build(name, size, args).eval(), make_images(batch, size, args)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return step


def onnx_step(name: str, size: int, folder: Path, args: argparse.Namespace) -> harness.Step:
    settings = argparse.Namespace(**{**vars(args), 'img_size': size, 'dtype': 'float32', 'runtime': 'onnxruntime'})
    path, _ = onnx_runtimes.export(name, 'float32', folder, settings)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
    return onnx_runtimes.make_step(path, image, settings)


def measure(peer: Peer, runtime: str, batch: int, make: Callable[[str, int], harness.Step], args) -> None:
    steps: List[harness.Step] = [make(peer.name, peer.size), make(REFERENCE, REFERENCE_SIZE)]
    times = harness.interleave(steps, args.device, args.runs, args.warmup, args.min_seconds)
    model = build(peer.name, peer.size, args)
    row = dict(
        **harness.describe_machine(args), runtime=runtime, batch=batch, model=peer.name, img_size=peer.size,
        top1='' if peer.top1 is None else peer.top1, source=peer.source,
        mparams=f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        gmacs=f'{count_macs(model, (3, peer.size, peer.size)) / 1e9:.2f}', baseline=f'{REFERENCE} at {REFERENCE_SIZE}',
        runs=args.runs, **harness.compare(*times), ms=f'{1e3 * statistics.median(times[0]):.2f}')
    harness.append(args.results / 'peers.csv', row)
    print(
        f'{peer.name} at {peer.size}, {runtime}, batch {batch}: {row["ratio"]} ({row["ratio_p20"]} to'
        f' {row["ratio_p80"]}) of {row["baseline"]}, top-1 {row["top1"] or "-"}', flush=True)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.device == 'cpu':
        harness.keep_freed_memory()
    peers = [p for p in PEERS if p.name in args.model]
    if 'eager' in args.runtime:
        for batch in args.batch:
            for peer in peers:
                measure(peer, 'eager', batch, lambda name, size, batch=batch: eager_step(name, size, batch, args), args)
    if 'onnxruntime' in args.runtime:
        onnx_runtimes.share_threads(args.threads)
        with tempfile.TemporaryDirectory() as folder:
            for peer in peers:
                measure(peer, 'onnxruntime', 1, lambda name, size: onnx_step(name, size, Path(folder), args), args)


if __name__ == '__main__':
    main()
