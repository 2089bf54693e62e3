"""Measure SASA-ResNet-50 against the same network with timm's HaloAttn, beside halonet50ts, and its growth with size.

    python benchmarks/sasa.py                                           # all of it, on the CPU
    python benchmarks/sasa.py --img-size 224 --mode infer --runs 3      # minutes

The baseline `halo` is the model itself with `HaloAttn(block_size=1, halo_size=3)` of the same weights in each block;
outputs must be equal before anything is timed. It is measured at 224 pixels alone, `halonet50ts` at 256, its own size.
Sides are taken in turn, and a ratio is the median over runs of (ours / baseline). Peak memory is that of two steps in a
process of its own, weights included. `steps_mib` is the part of it that the steps take: above what the process holds
with the model built and the code of libraries and kernels loaded, by a step at 64 pixels. Rows go to results/sasa.csv.
"""
import argparse
import json
import statistics
from pathlib import Path

import harness
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn

import elsa_models  # noqa: F401, registers the models
from elsa_models.layers import StandAloneSelfAttention

MODEL = 'sasa_resnet50'
PROBLEMS = {'halo': [224], 'halonet50ts': [256], MODEL: [448, 1024]}  # sizes; the model itself: against 224


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--baseline', nargs='+', default=[*PROBLEMS], choices=[*PROBLEMS])
    parser.add_argument('--mode', nargs='+', default=['infer', 'train'], choices=['infer', 'train'])
    parser.add_argument('--batch', type=int, default=1, help='images of inference; training takes two at least')
    parser.add_argument('--img-size', nargs='+', type=int, help='in place of the sizes of each baseline')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--results', type=Path, default=harness.RESULTS)
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)  # in the process that measures memory
    return parser.parse_args()


class Halo(nn.Module):
    """timm's HaloAttn with the weights of a layer of ours."""

    def __init__(self, layer: StandAloneSelfAttention) -> None:
        super().__init__()
        K, d, G = layer.kernel_size, layer.head_dim, layer.num_heads
        self.halo = HaloAttn(layer.dim, num_heads=G, block_size=1, halo_size=K // 2)
        q, k, v = layer.qkv.weight.detach().chunk(3)
        heads = torch.cat([d ** .5 * k.unflatten(0, (G, d)), v.unflatten(0, (G, d))], dim=1)
        height, width = torch.zeros(2, 2 * K - 1, d)
        height[K - 1:, :d // 2], width[K - 1:, d // 2:] = layer.rel_row.detach(), layer.rel_col.detach()
        self.halo.load_state_dict({
            'q.weight': q[..., None, None], 'kv.weight': heads.flatten(0, 1)[..., None, None],
            'pos_embed.height_rel': height, 'pos_embed.width_rel': width,
        })

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.halo(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def build(spec: dict, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(MODEL if spec['side'] == 'halo' else spec['side'], zero_init_last=False)
    for block in model.modules():
        if spec['side'] == 'halo' and isinstance(getattr(block, 'self_attn', None), StandAloneSelfAttention):
            block.self_attn = Halo(block.self_attn)
    return model.to(args.device, getattr(torch, args.dtype)).train(spec['mode'] == 'train')


def make_step(model: nn.Module, spec: dict, args: argparse.Namespace) -> harness.Step:
    """A function that does the work to be measured: inference, or a training step."""
    images = torch.randn(spec['batch'], 3, spec['size'], spec['size'], generator=torch.Generator().manual_seed(0))
    images = images.to(args.device, getattr(torch, args.dtype))
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return model(images)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=.9)
        target = torch.arange(len(images), device=images.device)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()
            return loss
    return step


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    harness.keep_freed_memory()
    if args.memory_of:
        spec = args.memory_of
        if spec.pop('steps'):
            model = build(spec, args)
            warm = make_step(model, dict(spec, size=64), args)
            harness.print_peak_memory(lambda: make_step(model, spec, args), args.device, warm)
        else:
            harness.print_peak_memory(lambda: make_step(build(spec, args), spec, args), args.device)
        return
    for baseline in args.baseline:
        for mode in args.mode:
            for size in args.img_size or PROBLEMS[baseline]:
                batch = max(args.batch, 2) if mode == 'train' else args.batch  # norms need more than one
                specs = [
                    dict(side=MODEL, mode=mode, batch=batch, size=size),
                    dict(side=baseline, mode=mode, batch=batch, size=224 if baseline == MODEL else size),
                ]
                steps = [make_step(build(spec, args), spec, args) for spec in specs]
                if mode == 'infer' and baseline == 'halo':
                    torch.testing.assert_close(steps[0](), steps[1](), rtol=1e-3, atol=1e-4)
                times = harness.interleave(steps, args.device, args.runs, 1, 0.)
                del steps
                memory, of_steps = (
                    [harness.peak_memory(__file__, dict(spec, steps=steps), args) for spec in specs]
                    for steps in (False, True))
                medians = [statistics.median(t) for t in times]
                row = dict(
                    **harness.describe_machine(args), mode=mode, batch=batch, img_size=size, model=MODEL,
                    baseline=f'{MODEL} at 224' if baseline == MODEL else baseline, runs=args.runs,
                    **harness.compare(*times), memory_ratio=f'{memory[0] / memory[1]:.3f}',
                    peak_mib=f'{memory[0]:.0f}', baseline_peak_mib=f'{memory[1]:.0f}',
                    steps_memory_ratio=f'{of_steps[0] / of_steps[1]:.3f}', steps_mib=f'{of_steps[0]:.0f}',
                    baseline_steps_mib=f'{of_steps[1]:.0f}',
                    ms=f'{1e3 * medians[0]:.1f}', baseline_ms=f'{1e3 * medians[1]:.1f}')
                harness.append(args.results / 'sasa.csv', row)
                print(
                    f'{MODEL} / {row["baseline"]}, {mode} batch {batch} at {size}: time {row["ratio"]} '
                    f'({row["ratio_p20"]} to {row["ratio_p80"]}; {row["ms"]} / {row["baseline_ms"]} ms), memory '
                    f'{row["memory_ratio"]} ({row["peak_mib"]} / {row["baseline_peak_mib"]} MiB), of the steps '
                    f'{row["steps_memory_ratio"]} ({row["steps_mib"]} / {row["baseline_steps_mib"]} MiB)', flush=True)


if __name__ == '__main__':
    main()
