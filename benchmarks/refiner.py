"""Measure Refiner-ViT in strips of queries against the same model operator by operator, and beside timm's models.

    python benchmarks/refiner.py                                     # S at 224 and L at 448, on the CPU: half an hour
    python benchmarks/refiner.py --quick                             # S at 224, minutes
    python benchmarks/refiner.py --device cuda --batch 32

Sides are measured in turn in one process, gated on equal outputs. Rows go to results/refiner.csv; a ratio is the
median over runs of (ours / baseline). Peak memory is that of two steps in a process of its own, above what it held with
the model built and the code of libraries loaded, by a step of the test model: weights are no part of it, gradients and
the optimiser's state are.
"""
import argparse
import json
import statistics
from pathlib import Path
from typing import Dict

import harness
import timm
import torch
import torch.nn.functional as F

import elsa_models  # noqa: F401, registers the models

PLAIN = 'plain'  # the model itself, its maps computed operator by operator
FULL = {
    'refiner_vit_small_patch16_224': [PLAIN, 'deit_small_patch16_224', 'cait_s24_224'],
    'refiner_vit_large_patch16_448': [PLAIN],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='the small model alone')
    parser.add_argument('--model', nargs='+', choices=list(FULL))
    parser.add_argument('--mode', nargs='+', choices=['infer', 'train'], default=['infer', 'train'])
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--results', type=Path, default=harness.RESULTS, help='folder of the CSV')
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)  # in the process that measures memory
    args = parser.parse_args()
    args.model = args.model or list(FULL)[:1 if args.quick else None]
    return args


def build(spec: Dict, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    side = spec['side']
    model = timm.create_model(spec['model'] if side in ('ours', PLAIN) else side)
    for module in model.modules():
        if hasattr(module, 'lean'):
            module.lean = side != PLAIN
    return model.to(args.device, getattr(torch, args.dtype)).train(spec['mode'] == 'train')


def make_step(model: torch.nn.Module, spec: Dict, args: argparse.Namespace) -> harness.Step:
    size = model.pretrained_cfg['input_size'][1:]
    images = torch.randn(spec['batch'], 3, *size, generator=torch.Generator().manual_seed(0))
    images = images.to(args.device, getattr(torch, args.dtype))
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return model(images)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        target = torch.arange(len(images), device=images.device)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()
            return loss
    return step


def check(name: str, args: argparse.Namespace) -> None:
    """Require equal outputs of both forms."""
    outputs = []
    for side in ('ours', PLAIN):
        spec = dict(model=name, side=side, mode='infer', batch=1)
        outputs.append(make_step(build(spec, args), spec, args)().float())
    error = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    if not error < (1e-4 if args.dtype == 'float32' else 3e-2):
        raise SystemExit(f'{name}: forms differ by {error:.1e} of their scale. Not measured.')


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        spec = args.memory_of
        model, small = (build(s, args) for s in (spec, dict(spec, model='test_refiner_vit', side='ours')))
        warm = make_step(small, spec, args)
        harness.print_peak_memory(lambda: make_step(model, spec, args), args.device, warm)
        return
    harness.keep_freed_memory()
    for name in args.model:
        check(name, args)
        for mode in args.mode:
            sides = ['ours', *FULL[name]]
            specs = [dict(model=name, side=side, mode=mode, batch=args.batch) for side in sides]
            steps = [make_step(build(spec, args), spec, args) for spec in specs]
            times = harness.interleave(steps, args.device, args.runs, 1, 0.)
            del steps
            memory = [harness.peak_memory(__file__, spec, args) for spec in specs]
            for side, seconds, mib in zip(sides[1:], times[1:], memory[1:]):
                row = dict(
                    **harness.describe_machine(args), model=name, mode=mode, batch=args.batch, baseline=side,
                    runs=args.runs, **harness.compare(times[0], seconds),
                    ms=f'{1e3 * statistics.median(times[0]):.1f}',
                    baseline_ms=f'{1e3 * statistics.median(seconds):.1f}', peak_mib=f'{memory[0]:.1f}',
                    baseline_peak_mib=f'{mib:.1f}', memory_ratio=f'{memory[0] / mib:.3f}')
                harness.append(args.results / 'refiner.csv', row)
                print(
                    f'{name} / {side}, {mode}, batch {args.batch}: {row["ms"]} ms, {row["ratio"]} ({row["ratio_p20"]} '
                    f'to {row["ratio_p80"]}); peak {row["peak_mib"]} MiB, {row["memory_ratio"]}', flush=True)


if __name__ == '__main__':
    main()
