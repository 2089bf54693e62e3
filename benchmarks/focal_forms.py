"""Measure Focal and LG against Swin, FocalNet and Focal by rolls, all in one run: the source of their ratios.

    python benchmarks/focal_forms.py
    python benchmarks/focal_forms.py --mode infer --batch 1 --runs 9

Focal by rolls is the same model with the same weights as the authors describe it: the surround comes from four rolled
copies of the map, with every key in its place, and pooled windows come from `F.unfold`. Sides are measured in turn; a
ratio is the median over runs of (model / baseline), each taken from neighbouring measurements. Peak memory is measured
in a process of its own, with weights, without the code of libraries and kernels.
"""
import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Dict

import harness
import timm
import torch
import torch.nn.functional as F

import elsa_models  # noqa: F401  registers the models
from elsa_models.layers import FocalAttention
from elsa_models.layers.mixers.focal import merge_windows, partition_windows

FOCAL, LG, SWIN = 'focal_tiny_patch4_window7_224', 'lg_tiny_patch4_window7_224', 'swin_tiny_patch4_window7_224'
ROLLS = 'focal_tiny by rolls'
PAIRS = ((FOCAL, SWIN), (FOCAL, ROLLS), (FOCAL, 'focalnet_tiny_srf'), (LG, SWIN))


class RolledFocalAttention(FocalAttention):
    """Focal attention by rolls and unfold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, H, W, C = x.shape
        w, e, f, heads = self.window_size[0], self.expand_size, self.focal_window, self.num_heads
        rows, columns = -(-H // w), -(-W // w)
        x = F.pad(x, (0, 0, 0, columns * w - W, 0, rows * w - H))
        qkv = self.qkv(x)
        q, k, v = qkv.unflatten(3, (3, C)).unbind(3)
        keys, values = [partition_windows(k, w)], [partition_windows(v, w)]
        moves = itertools.product((e, -e), (e, -e)) if e > 0 else ()
        for down, right in moves:
            kept = torch.tensor([
                i for i in range(w * w) if not (0 <= i // w + down < w and 0 <= i % w + right < w)])
            keys.append(partition_windows(k.roll((-down, -right), (1, 2)), w)[:, :, kept])
            values.append(partition_windows(v.roll((-down, -right), (1, 2)), w)[:, :, kept])
        pooled = self.pool(partition_windows(x, w).transpose(2, 3)).squeeze(3)  # B, windows, C
        pooled = self.qkv(pooled)[..., C:].view(B, rows, columns, 2 * C).permute(0, 3, 1, 2)
        around = F.unfold(pooled, f, padding=f // 2).view(B, 2, C, f * f, -1).permute(1, 0, 4, 3, 2)
        unseen = F.unfold(x.new_ones(1, 1, rows, columns), f, padding=f // 2)[0].t() == 0

        def split(x):
            return x.reshape(B * rows * columns, -1, heads, C // heads).transpose(1, 2)

        q = split(partition_windows(q, w)) * (C // heads) ** -.5
        k, v = split(torch.cat([*keys, around[0]], dim=2)), split(torch.cat([*values, around[1]], dim=2))
        L = w * w
        bias = [self.relative_position_bias_table[self.window_index].view(L, L, heads).permute(2, 0, 1)]
        if e > 0:
            bias.append(self.surround_bias[0])
        bias.append(self.pooled_bias[:, self.pooled_index].view(heads, L, -1))
        logits = q @ k.transpose(-2, -1) + torch.cat(bias, dim=2)
        mask = -100. * F.pad(unseen, (k.shape[2] - f * f, 0))
        logits = logits.unflatten(0, (B, -1)) + mask[:, None, None]
        x = (logits.flatten(0, 1).softmax(dim=-1) @ v).transpose(1, 2).reshape(B, rows * columns, L, C)
        return merge_windows(self.proj(x), w, H, W)


def build(name: str, size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == 'focalnet_tiny_srf':
        return timm.create_model(name)
    model = timm.create_model(FOCAL if name == ROLLS else name, img_size=size)
    if name == ROLLS:
        for module in model.modules():
            if isinstance(module, FocalAttention):
                module.__class__ = RolledFocalAttention
    return model


def make_step(spec: Dict) -> harness.Step:
    model = build(spec['name'], spec['size']).train(spec['mode'] == 'train')
    images = torch.randn(spec['batch'], 3, spec['size'], spec['size'], generator=torch.Generator().manual_seed(0))
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return model(images)
        return step
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    target = torch.arange(len(images))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        optimizer.step()
        return loss
    return step


def check(size: int) -> None:
    """Require that the two forms of Focal agree."""
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        ours, rolls = (build(name, size).eval().double()(images) for name in (FOCAL, ROLLS))
    error = (ours - rolls).abs().max().item()
    if not error < 1e-11:
        raise SystemExit(f'Focal is wrong: it differs by {error:.1e} from Focal by rolls. Not measured.')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--mode', nargs='+', choices=['infer', 'train'], default=['infer', 'train'])
    parser.add_argument('--batch', nargs='+', type=int, default=[1, 8])
    parser.add_argument('--img-size', nargs='+', type=int, default=[224])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--runs', type=int, default=9, help='measurements of each side')
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--csv', type=Path, default=harness.RESULTS / 'focal_forms.csv', help='rows are appended')
    parser.add_argument('--device', default='cpu', choices=['cpu'], help=argparse.SUPPRESS)
    parser.add_argument('--dtype', default='float32', choices=['float32'], help=argparse.SUPPRESS)
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)  # in the process that measures memory
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        warm = make_step(dict(args.memory_of, size=64))
        harness.print_peak_memory(lambda: make_step(args.memory_of), args.device, warm)
        return
    harness.keep_freed_memory()
    names = list(dict.fromkeys(itertools.chain(*PAIRS)))
    for size, mode, batch in itertools.product(args.img_size, args.mode, args.batch):
        check(size)
        specs = {n: dict(name=n, mode=mode, batch=batch, size=size) for n in names}
        steps = [make_step(spec) for spec in specs.values()]
        times = dict(zip(names, harness.interleave(steps, args.device, args.runs, args.warmup, 0.)))
        del steps
        memory = {n: harness.peak_memory(__file__, spec, args) for n, spec in specs.items()}
        for name, baseline in PAIRS:
            row = dict(
                **harness.describe_machine(args), mode=mode, batch=batch, img_size=size, model=name, baseline=baseline,
                runs=args.runs, **harness.compare(times[name], times[baseline]),
                memory_ratio=f'{memory[name] / memory[baseline]:.3f}',
                ms=f'{1e3 * statistics.median(times[name]):.1f}',
                baseline_ms=f'{1e3 * statistics.median(times[baseline]):.1f}',
                peak_mib=f'{memory[name]:.0f}', baseline_peak_mib=f'{memory[baseline]:.0f}')
            harness.append(args.csv, row)
            print(
                f'{name} / {baseline}, {mode} batch {batch} at {size}: time {row["ratio"]} ({row["ratio_p20"]} to '
                f'{row["ratio_p80"]}), memory {row["memory_ratio"]}', flush=True)


if __name__ == '__main__':
    main()
