"""Measure the ResNets with attention: Axial folded against norm by norm, GSA beside timm's lambda layers, growth.

    python benchmarks/resnets.py                     # all of it, on the CPU
    python benchmarks/resnets.py --img-size 224 --mode infer

Sides are taken in turn, and a ratio is the median over runs of (ours / baseline), as in bench.py, whose rows these are
too: `resnets.csv`. The baseline `unfolded` of an Axial-ResNet is the model itself with its norms by themselves, its
three maps of logits stacked for one norm as in the paper's formula, and all lines at once.
"""
import argparse
import json
import statistics
from pathlib import Path

import harness
import timm
import torch
import torch.nn.functional as F

import elsa_models  # noqa: F401  registers the models
from elsa_models.layers.axis import by_pair, fit_table
from elsa_models.layers.mixers.axial import AxialLayer, _heads, _to_images, _to_lines

PAIRS = ['axial_resnet50s:unfolded', 'gsa_resnet50:lambda_resnet50ts']


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pair', nargs='+', default=PAIRS, metavar='MODEL:BASELINE')
    parser.add_argument('--mode', nargs='+', default=['infer', 'train'], choices=['infer', 'train'])
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--img-size', nargs='+', type=int, default=[224, 512, 1024])
    parser.add_argument('--runs', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--results', type=Path, default=harness.RESULTS)
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def unfolded(layer: AxialLayer, x: torch.Tensor) -> torch.Tensor:
    """What a layer does, as the formula has it: every norm by itself, three maps side by side."""
    length = x.shape[1]
    rel_query, rel_key, rel_value = (
        by_pair(fit_table(t, length, layer.beyond)) for t in (layer.rel_query, layer.rel_key, layer.rel_value))
    q, k, v = _heads(_to_lines(layer.bn_qkv(_to_images(layer.qkv(x)))), layer.num_heads)
    terms = torch.cat([
        q @ k.transpose(-2, -1),
        torch.einsum('snqc,cqk->snqk', q, rel_query),
        torch.einsum('snkc,cqk->snqk', k, rel_key),
    ], dim=1)
    norms = (layer.bn_qk, layer.bn_qr, layer.bn_kr)
    stacked = [torch.cat([getattr(bn, n) for bn in norms]) for n in ('running_mean', 'running_var', 'weight', 'bias')]
    terms = F.batch_norm(terms, *stacked, training=layer.training)
    attn = terms.unflatten(1, (3, layer.num_heads)).sum(dim=1).softmax(dim=-1)
    content = (attn @ v).transpose(1, 2).flatten(2)
    position = torch.einsum('snqk,cqk->sqnc', attn, rel_value).flatten(2)
    return _to_lines(layer.bn_content(_to_images(content)) + layer.bn_position(_to_images(position)))


def make_step(spec: dict, args: argparse.Namespace) -> harness.Step:
    """A function that does the work to be measured: inference, or a training step."""
    torch.manual_seed(0)
    model = timm.create_model(spec['name'], device=args.device, dtype=getattr(torch, args.dtype))
    for m in model.modules():
        if spec['unfolded'] and isinstance(m, AxialLayer):
            m.forward = unfolded.__get__(m)
    images = torch.randn(spec['batch'], 3, spec['size'], spec['size'], device=args.device)
    images = images.to(getattr(torch, args.dtype))
    model.train(spec['mode'] == 'train')
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return model(images)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(images).square().mean()
            loss.backward()
            optimizer.step()
            return loss
    return step


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    harness.keep_freed_memory()
    if args.memory_of:
        warm = make_step(dict(args.memory_of, size=64), args)
        harness.print_peak_memory(lambda: make_step(args.memory_of, args), args.device, warm)
        return
    for pair in args.pair:
        name, baseline = pair.split(':')
        for mode in args.mode:
            for size in args.img_size:
                batch = max(args.batch, 2) if mode == 'train' else args.batch  # norms need more than one
                specs = [dict(mode=mode, size=size, batch=batch, name=n, unfolded=b) for n, b in (
                    (name, False), (name, True) if baseline == 'unfolded' else (baseline, False))]
                steps = [make_step(spec, args) for spec in specs]
                if mode == 'infer' and baseline == 'unfolded':
                    torch.testing.assert_close(steps[0](), steps[1](), rtol=1e-3, atol=1e-4)
                times = harness.interleave(steps, args.device, args.runs, args.warmup, .02)
                del steps
                memory = [harness.peak_memory(__file__, spec, args) for spec in specs]
                medians = [statistics.median(t) for t in times]
                row = dict(
                    **harness.describe_machine(args), mode=mode, batch=batch, img_size=size, model=name,
                    baseline=baseline, runs=args.runs, **harness.compare(*times),
                    memory_ratio=f'{memory[0] / memory[1]:.3f}', peak_mib=f'{memory[0]:.0f}',
                    baseline_peak_mib=f'{memory[1]:.0f}', ms=f'{1e3 * medians[0]:.1f}',
                    baseline_ms=f'{1e3 * medians[1]:.1f}')
                harness.append(args.results / 'resnets.csv', row)
                print(
                    f'{name} / {baseline}, {mode} batch {batch} at {size}: {row["ms"]} / {row["baseline_ms"]} ms, time '
                    f'{row["ratio"]} ({row["ratio_p20"]} to {row["ratio_p80"]}), memory {row["memory_ratio"]} '
                    f'({row["peak_mib"]} / {row["baseline_peak_mib"]} MiB)', flush=True)


if __name__ == '__main__':
    main()
