"""Measure models against timm's and the operator against its alternatives: the source of the ratios in README.md.

    python benchmarks/bench.py                          # all of it, on the CPU: hours
    python benchmarks/bench.py --quick                  # a subset in minutes
    python benchmarks/bench.py --device cuda --dtype bfloat16 --batch 128
    python benchmarks/bench.py models --pair elsa_swin_base:swin_base_patch4_window7_224 --form compiled
    python benchmarks/bench.py ops --kernel-size 3 7 13 --img-size 224 1024
    python benchmarks/plot.py                           # draw what has been measured

Each comparison is gated on correctness, takes its sides in turn, and appends one row to a CSV. A ratio is the median
over runs of (ours / baseline), each taken from two neighbouring measurements, so that a machine that slows down slows
both. Peak memory is measured in a process of its own, above what the process held before anything was built.

Shares compare with what this machine reached in the same process: a copy for bandwidth, a matrix product for
arithmetic. An operator's floor reads values and logits once and writes the output once; its backward pass reads the
gradient, values and logits and writes two gradients. A model's floor is its multiply-accumulates, three times over in
training.
"""
import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Callable, Dict, Tuple

import harness
import timm
import torch
import torch.nn.functional as F

import elsa_models
from elsa_models.inspect import count_macs
from elsa_models.ops import local_attention, local_attention_reference

PAIRS = [
    'elsa_swin_tiny:swin_tiny_patch4_window7_224',
    'elsa_swin_base:swin_base_patch4_window7_224',
    'elsa_volo_d1_224:volo_d1_224',
]
STAGES = ((4, 96, 3), (8, 192, 6), (16, 384, 12))  # stride, channels and heads of ELSA-Swin-T's first three stages
FULL = dict(
    pair=PAIRS, mode=['infer', 'train'], form=['eager', 'compiled'], batch=[1, 8], img_size=[224], kernel_size=[7],
    stage=[0, 1, 2], runs=15, min_seconds=.02)
QUICK = dict(
    pair=PAIRS[:1], mode=['infer', 'train'], form=['eager'], batch=[1], img_size=[224], kernel_size=[3, 7],
    stage=[0], runs=7, min_seconds=.005)
# what a full measurement adds: growth with the image, growth with the kernel
MODEL_SWEEP = dict(pair=PAIRS[:1], form=['eager'], batch=[1], img_size=[384, 512, 768, 1024])
OP_SWEEP = dict(mode=['infer'], form=['eager'], batch=[1], kernel_size=[3, 5, 9, 11, 13], stage=[0])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', nargs='?', default='all', choices=['all', 'models', 'ops'])
    parser.add_argument('--quick', action='store_true', help='a subset, where options say nothing else')
    parser.add_argument('--pair', nargs='+', metavar='MODEL:BASELINE')
    parser.add_argument('--mode', nargs='+', choices=['infer', 'train'])
    parser.add_argument('--form', nargs='+', choices=['eager', 'compiled', 'graph'], help='graph: a CUDA graph')
    parser.add_argument('--batch', nargs='+', type=int)
    parser.add_argument('--img-size', nargs='+', type=int, help='the maps of operators are those of ELSA-Swin-T')
    parser.add_argument('--kernel-size', nargs='+', type=int, help='of operators')
    parser.add_argument('--stage', nargs='+', type=int, choices=[0, 1, 2], help='of operators')
    parser.add_argument('--ghosts', default='a', choices=['', 'm', 'a', 'ma'], help='ghost matrices of operators')
    parser.add_argument('--baseline', nargs='+', choices=list(BASELINES), help='of operators; all that can run if none')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--runs', type=int, help='measurements of each side')
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--min-seconds', type=float, help='that one measurement takes at least')
    parser.add_argument('--results', type=Path, default=harness.RESULTS, help='folder of the CSVs')
    parser.add_argument('--memory-of', type=json.loads, help=argparse.SUPPRESS)  # in the process that measures memory
    args = parser.parse_args()
    chosen = [name for name in FULL if getattr(args, name) is not None and name not in ('runs', 'min_seconds')]
    args.sweep = not args.quick and not chosen
    for name, default in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if 'graph' in args.form and not args.device.startswith('cuda'):
        parser.error('--form graph: needs --device cuda.')
    if args.runs < 1:
        parser.error('--runs: must be at least 1.')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error('--device: PyTorch sees no CUDA device here.')
    return args


# models


def build(name: str, size: int, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, img_size=size)
    except TypeError:  # convolutional networks, which take any size
        model = timm.create_model(name)
    model = model.to(args.device, getattr(torch, args.dtype))
    return model.to(memory_format=torch.channels_last) if args.device.startswith('cuda') else model


def make_images(batch: int, size: int, args: argparse.Namespace) -> torch.Tensor:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(args.device, getattr(torch, args.dtype))
    return images.to(memory_format=torch.channels_last) if args.device.startswith('cuda') else images


def make_model_step(spec: Dict, args: argparse.Namespace) -> harness.Step:
    """A function that does the work to be measured: inference, or a training step."""
    torch._dynamo.reset()
    model, images = build(spec['name'], spec['size'], args), make_images(spec['batch'], spec['size'], args)
    model.train(spec['mode'] == 'train')
    forward = torch.compile(model) if spec['form'] == 'compiled' else model
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return forward(images)
    else:
        graph = spec['form'] == 'graph'
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, capturable=graph)
        target = torch.arange(len(images), device=images.device)

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(images), target)
            loss.backward()
            optimizer.step()
            return loss
    return harness.captured(step) if spec['form'] == 'graph' else step


def check_model(name: str, size: int, args: argparse.Namespace) -> float:
    """Require that a model of ours errs at most twice as much as plain PyTorch in the same dtype.

    Returns the ratio of the two errors, each the largest difference to the reference formula in float64.
    """
    model, images = build(name, size, args).eval(), make_images(2, size, args)
    outputs: Dict[str, torch.Tensor] = {}
    chosen = elsa_models.get_backend()
    with torch.no_grad():
        outputs['fast'] = model(images)
        elsa_models.set_backend('reference')
        try:
            outputs['plain'] = model(images)
            truth = model.double()(images.double())
        finally:
            elsa_models.set_backend(chosen)
    return error_ratio(name, outputs['fast'], outputs['plain'], truth)


def error_ratio(name: str, fast: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> float:
    error, allowed = ((y.double() - truth).abs().max().item() for y in (fast, plain))
    ratio = error / max(allowed, torch.finfo(fast.dtype).tiny)
    if not ratio <= 2.:
        raise SystemExit(f'{name} is wrong: error {error:.1e}, plain PyTorch {allowed:.1e}. Not measured.')
    return ratio


def bench_models(args: argparse.Namespace) -> None:
    rates = harness.measure_machine(args.device, getattr(torch, args.dtype))
    for pair, size in itertools.product(args.pair, args.img_size):
        name, baseline = pair.split(':')
        error = check_model(name, size, args)
        gmacs = {n: count_macs(build(n, size, args), (3, size, size)) / 1e9 for n in (name, baseline)}
        for mode, form, batch in itertools.product(args.mode, args.form, args.batch):
            specs = [dict(kind='model', name=n, mode=mode, form=form, batch=batch, size=size) for n in (name, baseline)]
            steps = [make_model_step(spec, args) for spec in specs]
            compiled = dict(zip(
                ('compile_s', 'baseline_compile_s'), (harness.compile_seconds(step, args.device) for step in steps)
            )) if form == 'compiled' else {}
            times = harness.interleave(steps, args.device, args.runs, args.warmup, args.min_seconds)
            del steps
            memory = [harness.peak_memory(__file__, spec, args) for spec in specs]
            medians = [statistics.median(t) for t in times]
            floor = (3 if mode == 'train' else 1) * 2e9 * gmacs[name] * batch / rates['products']
            row = dict(
                **harness.describe_machine(args), mode=mode, form=form, batch=batch, img_size=size, model=name,
                baseline=baseline, runs=args.runs, **harness.compare(*times),
                memory_ratio=f'{memory[0] / memory[1]:.3f}', error_ratio=f'{error:.2f}',
                images_per_s=f'{batch / medians[0]:.2f}', baseline_images_per_s=f'{batch / medians[1]:.2f}',
                peak_mib=f'{memory[0]:.0f}', baseline_peak_mib=f'{memory[1]:.0f}',
                ms=f'{1e3 * medians[0]:.3f}', baseline_ms=f'{1e3 * medians[1]:.3f}', gmacs=f'{gmacs[name]:.2f}',
                baseline_gmacs=f'{gmacs[baseline]:.2f}', arithmetic_share=f'{floor / medians[0]:.3f}',
                backend=served_by(args), **{name: f'{seconds:.1f}' for name, seconds in compiled.items()})
            harness.append(args.results / 'models.csv', row)
            print(
                f'{name} / {baseline}, {args.device} {args.dtype} {mode} {form} batch {batch} at {size}: '
                f'time {row["ratio"]} ({row["ratio_p20"]} to {row["ratio_p80"]}), memory {row["memory_ratio"]}, '
                f'error {row["error_ratio"]} of plain PyTorch\'s', flush=True)


# operators

Problem = Tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor]  # value, logits, K, ghost_mul, ghost_add


def ours(value, logits, K, mul, add):
    return local_attention(value, logits, K, 1, mul, add)


def unfolded(value, logits, K, mul, add):
    """The plain form: neighbours gathered by `F.unfold`, K * K times the values."""
    B, H, W, C = value.shape
    G = logits.shape[3]
    neighbours = F.unfold(value.permute(0, 3, 1, 2), K, padding=K // 2).view(B, C, K * K, H, W)
    weights = logits.softmax(dim=-1).permute(0, 3, 4, 1, 2).repeat_interleave(C // G, dim=1)  # B, C, K * K, H, W
    if mul is not None:
        weights = weights * mul.reshape(1, C, K * K, 1, 1)
    if add is not None:
        weights = weights + add.reshape(1, C, K * K, 1, 1)
    return (weights * neighbours).sum(dim=2).permute(0, 2, 3, 1)


def depthwise(value, logits, K, mul, add):
    """A depthwise K x K convolution of the same map: other numbers, and what local attention is measured by."""
    weight = next((x for x in (add, mul) if x is not None), None)
    if weight is None:
        weight = value.new_ones(value.shape[3], K, K)
    y = F.conv2d(value.permute(0, 3, 1, 2), weight.unsqueeze(1), padding=K // 2, groups=value.shape[3])
    return y.permute(0, 2, 3, 1)


def natten(value, logits, K, mul, add):
    """Neighbourhood attention of the NATTEN package: its logits are products of query and key, made inside."""
    from natten import na2d
    x = value.unflatten(-1, (logits.shape[3], -1))
    return na2d(x, x, x, kernel_size=K).flatten(3)


BASELINES: Dict[str, Callable] = {'depthwise': depthwise, 'unfold': unfolded, 'natten': natten}
FORMS: Dict[str, Callable] = {'ours': ours, **BASELINES}


def make_problem(spec: Dict, args: argparse.Namespace) -> Problem:
    generator = torch.Generator().manual_seed(0)
    stride, C, G = STAGES[spec['stage']]
    K, side, dtype = spec['kernel_size'], -(-spec['size'] // stride), getattr(torch, args.dtype)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(args.device, dtype)

    value, logits = randn(spec['batch'], side, side, C), randn(spec['batch'], side, side, G, K * K)
    mul, add = (randn(C, K, K) if x in spec['ghosts'] else None for x in 'ma')
    return value, logits, K, mul, add


def make_op_step(spec: Dict, args: argparse.Namespace) -> harness.Step:
    """A function that does the work to be measured: forward, or forward and backward."""
    torch._dynamo.reset()
    problem = make_problem(spec, args)
    call = FORMS[spec['name']]
    call = torch.compile(call) if spec['form'] == 'compiled' else call
    if spec['mode'] == 'infer':
        def step() -> torch.Tensor:
            with torch.no_grad():
                return call(*problem)
    else:
        leaves = [x.requires_grad_() for x in problem if isinstance(x, torch.Tensor)]
        if spec['name'] in ('depthwise', 'natten'):  # which know no logits
            problem[1].requires_grad_(False)
        grad = torch.ones_like(problem[0])

        def step() -> Tuple[torch.Tensor, ...]:
            wanted = [x for x in leaves if x.requires_grad]
            return torch.autograd.grad(call(*problem), wanted, grad, allow_unused=True)
    return harness.captured(step) if spec['form'] == 'graph' else step


def check_op(spec: Dict, args: argparse.Namespace) -> float:
    """Require that ours, and the unfolded form, compute the formula; returns the ratio of errors as for models."""
    value, logits, K, mul, add = problem = make_problem({**spec, 'batch': 1}, args)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in problem]
    truth = local_attention_reference(*exact[:3], 1, *exact[3:])
    plain = local_attention_reference(value, logits, K, 1, mul, add)
    if not torch.allclose(unfolded(*exact), truth):
        raise SystemExit('The unfolded form is wrong. Not measured.')
    return error_ratio('local_attention', ours(*problem), plain, truth)


def can_run(spec: Dict, args: argparse.Namespace) -> bool:
    # what is no part of the package may be missing, or may not take this device, dtype or size
    try:
        make_op_step(spec, args)()
        return True
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
        if args.baseline is not None:
            raise SystemExit(f'{spec["name"]} cannot run: {error}') from error
        print(f'{spec["name"]} left out: {str(error).splitlines()[0] if str(error) else type(error).__name__}')
        return False


def floor_of(spec: Dict, problem: Problem) -> Tuple[float, float]:
    """Bytes that must be moved and operations that must be done."""
    value, logits = problem[:2]
    size, values, taps = value.element_size(), value.numel(), logits.numel()
    moved = size * (2 * values + taps)
    done = 4 * values * spec['kernel_size'] ** 2  # a multiply-accumulate for attention, one for the ghost head
    if spec['mode'] == 'train':
        moved += size * (3 * values + 2 * taps)
        done *= 3
    return moved, done


def bench_ops(args: argparse.Namespace) -> None:
    rates = harness.measure_machine(args.device, getattr(torch, args.dtype))
    wanted = list(BASELINES) if args.baseline is None else args.baseline
    for size, stage, K in itertools.product(args.img_size, args.stage, args.kernel_size):
        shared = dict(kind='op', size=size, stage=stage, kernel_size=K, ghosts=args.ghosts)
        error = check_op(shared, args)
        for mode, form, batch in itertools.product(args.mode, args.form, args.batch):
            specs = [dict(shared, name=n, mode=mode, form=form, batch=batch) for n in ('ours', *wanted)]
            specs = specs[:1] + [spec for spec in specs[1:] if can_run(spec, args)]
            steps = [make_op_step(spec, args) for spec in specs]
            times = harness.interleave(steps, args.device, args.runs, args.warmup, args.min_seconds)
            del steps
            memory = [harness.peak_memory(__file__, spec, args) for spec in specs]
            moved, done = floor_of(specs[0], make_problem(specs[0], args))
            median = statistics.median(times[0])
            for spec, seconds, mib in zip(specs[1:], times[1:], memory[1:]):
                stride, C, G = STAGES[stage]
                row = dict(
                    **harness.describe_machine(args), mode=mode, form=form, batch=batch, img_size=size, stage=stage,
                    side=-(-size // stride), channels=C, heads=G, kernel_size=K, ghosts=args.ghosts,
                    backend=served_by(args), baseline=spec['name'], runs=args.runs,
                    **harness.compare(times[0], seconds), ms=f'{1e3 * median:.4f}',
                    baseline_ms=f'{1e3 * statistics.median(seconds):.4f}', peak_mib=f'{memory[0]:.1f}',
                    baseline_peak_mib=f'{mib:.1f}', error_ratio=f'{error:.2f}',
                    bandwidth_share=f'{moved / rates["bandwidth"] / median:.3f}',
                    arithmetic_share=f'{done / rates["sums"] / median:.3f}',
                    floor_ratio=f'{median * rates["bandwidth"] / moved:.2f}',
                    gbytes_per_s=f'{rates["bandwidth"] / 1e9:.1f}', gflops=f'{rates["sums"] / 1e9:.1f}',
                    floor_mbytes=f'{moved / 1e6:.3f}', floor_mflop=f'{done / 1e6:.3f}')
                harness.append(args.results / 'ops.csv', row)
                print(
                    f'K {K} on {row["side"]}x{row["side"]}x{C} by {row["backend"]} / {spec["name"]}, {args.device} '
                    f'{args.dtype} {mode} {form} batch {batch}: {row["ms"]} ms, {row["ratio"]} ({row["ratio_p20"]} to '
                    f'{row["ratio_p80"]}), {row["floor_ratio"]} of the bandwidth floor', flush=True)


def served_by(args: argparse.Namespace) -> str:
    """Name of the backend that computes local attention here."""
    chosen = elsa_models.get_backend()
    if chosen != 'auto':
        return chosen
    value = torch.empty(1, 1, 1, 1, device=args.device, dtype=getattr(torch, args.dtype))
    return next(name for name, reason in elsa_models.explain_backend(value).items() if reason is None)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        make = make_model_step if args.memory_of['kind'] == 'model' else make_op_step
        harness.print_peak_memory(lambda: make(args.memory_of, args), args.device)
        return
    harness.keep_freed_memory()
    for what, bench, sweep in (('ops', bench_ops, OP_SWEEP), ('models', bench_models, MODEL_SWEEP)):
        if args.what in ('all', what):
            bench(args)
            if args.sweep:
                bench(argparse.Namespace(**{**vars(args), **sweep}))


if __name__ == '__main__':
    main()
