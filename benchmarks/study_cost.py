"""Measure what each mixer of the study costs: python benchmarks/study_cost.py configs/study/digits.yaml

Parameters, multiply-accumulates, time of a training step and of inference as a ratio to the baseline of the study (the
two in turn, the median over runs), and peak memory of two training steps in a process of its own, in both readings.
Rows go to results/study/cost.csv.
"""
import argparse
import json
from pathlib import Path

import harness
import timm
import torch
import torch.nn.functional as F

import elsa_models  # noqa: F401, registers the models
from elsa_models.study.grid import Study, macs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('studies', nargs='*', type=Path)
    parser.add_argument('--mixer', nargs='+', help='these alone')
    parser.add_argument('--reading', nargs='+', help='these alone')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--runs', type=int, default=9)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--results', type=Path, default=harness.RESULTS / 'study')
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)  # in the process that measures memory
    return parser.parse_args()


def make_spec(study: Study, mixer: str, reading: str, train: bool, batch: int) -> dict:
    return dict(
        model=study.settings.model, model_args=study.model_args(mixer, reading), train=train, batch=batch)


def make_step(spec: dict, args: argparse.Namespace) -> harness.Step:
    """A training step, or inference."""
    torch.manual_seed(0)
    model = timm.create_model(spec['model'], num_classes=10, **spec['model_args'])
    model.to(args.device, getattr(torch, args.dtype)).train(spec['train'])
    images = torch.randn(spec['batch'], 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(args.device, getattr(torch, args.dtype))
    if not spec['train']:
        return torch.no_grad()(lambda: model(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    target = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    harness.keep_freed_memory()
    if args.memory_of:
        harness.print_peak_memory(lambda: make_step(args.memory_of, args), args.device)
        return
    for study in map(Study, args.studies):
        settings = study.settings
        for reading in args.reading or settings.readings:
            for mixer in args.mixer or settings.mixers:
                row = dict(**harness.describe_machine(args), study=study.name, reading=reading, mixer=mixer)
                row.update(batch=args.batch, runs=args.runs)
                model_args = study.model_args(mixer, reading)
                model = timm.create_model(settings.model, device='meta', num_classes=10, **model_args)
                row.update(mlp_ratio=model_args.get('mlp_ratio', ''), macs=macs(settings.model, model_args))
                row.update(params=sum(p.numel() for p in model.parameters()))
                for kind, train in (('train', True), ('infer', False)):
                    steps = [make_step(make_spec(study, name, reading, train, args.batch), args)
                             for name in (mixer, settings.baseline)]
                    ratios = harness.compare(*harness.interleave(steps, args.device, args.runs, 2, 0.))
                    row.update({f'{kind}_{k}': v for k, v in ratios.items()})
                spec = make_spec(study, mixer, reading, True, args.batch)
                row.update(train_peak_mib=f'{harness.peak_memory(__file__, spec, args):.0f}')
                harness.append(args.results / 'cost.csv', row)
                print(*(f'{k} {row[k]}' for k in ('study', 'reading', 'mixer', 'params', 'macs', 'train_ratio',
                                                  'infer_ratio', 'train_peak_mib')), flush=True)


if __name__ == '__main__':
    main()
