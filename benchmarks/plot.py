"""Draw what has been measured: `python benchmarks/plot.py` turns benchmarks/results/*.csv into docs/img/*.png.

A figure is drawn for each device that has rows for it. Of rows that measure the same, the last one counts.
"""
import argparse
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

import harness
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

IMAGES = Path(__file__).resolve().parent.parent / 'docs' / 'img'
Rows = List[Dict[str, str]]


def latest(rows: Rows) -> Rows:
    """The last row of each measurement."""
    keys = ('hardware', 'device', 'dtype', 'runtime', 'mode', 'form', 'batch', 'img_size', 'model', 'stage',
            'kernel_size', 'ghosts', 'backend', 'baseline')
    return list({tuple(row.get(k, '') for k in keys): row for row in rows}.values())


def having(rows: Rows, **wanted: str) -> Rows:
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def groups(rows: Rows, *keys: str) -> Dict[Tuple[str, ...], Rows]:
    found: Dict[Tuple[str, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[k] for k in keys), []).append(row)
    return found


def number(rows: Sequence[Dict[str, str]], key: str) -> List[float]:
    return [float(r[key]) for r in rows]


def latency(axes: plt.Axes, models: Rows, ops: Rows) -> bool:
    """Time against timm's counterpart, with the 20th and 80th percentiles."""
    if not models:
        return False
    models = sorted(models, key=lambda r: (r['model'], r['mode'], r['form'], int(r['img_size']), int(r['batch'])))
    ratio, low, high = (number(models, k) for k in ('ratio', 'ratio_p20', 'ratio_p80'))
    places = range(len(models))
    axes.barh(places, ratio, xerr=[[a - b for a, b in zip(ratio, low)], [b - a for a, b in zip(ratio, high)]])
    axes.set_yticks(places, [
        f'{r["model"]}, {r["backend"]}, {r["mode"]}, {r["form"]}, {r["dtype"]}, batch {r["batch"]}, {r["img_size"]} px'
        for r in models])
    axes.axvline(1., color='black', linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel('time / time of timm\'s counterpart')
    axes.figure.set_size_inches(8, 1.2 + .3 * len(models))
    return True


def memory(axes: plt.Axes, models: Rows, ops: Rows) -> bool:
    """Peak memory against the image's size."""
    drawn, ticks = False, set()
    keys = ('model', 'baseline', 'mode', 'dtype', 'batch', 'backend')
    for (model, baseline, mode, dtype, batch, backend), rows in groups(having(models, form='eager'), *keys).items():
        rows = sorted(rows, key=lambda r: int(r['img_size']))
        if len(rows) < 2:
            continue  # one size says nothing of growth
        sizes, drawn = number(rows, 'img_size'), True
        line, = axes.plot(
            sizes, number(rows, 'peak_mib'), marker='o', label=f'{model}, {backend}, {mode}, {dtype}, batch {batch}')
        axes.plot(
            sizes, number(rows, 'baseline_peak_mib'), marker='o', linestyle='--', color=line.get_color(),
            label=baseline)
        ticks |= {*sizes}
    _logarithmic(axes, 'image (pixels)', 'peak memory (MiB)', drawn, ticks)
    return drawn


def kernel_size(axes: plt.Axes, models: Rows, ops: Rows) -> bool:
    """Time of the operator against the side of its kernel."""
    drawn, lines, ticks = False, [], set()
    eager = [r for r in ops if r['form'] == 'eager' and r['stage'] == '0']
    for (mode, batch, size), rows in groups(eager, 'mode', 'batch', 'img_size').items():
        for (baseline,), pair in groups(rows, 'baseline').items():
            pair = sorted(pair, key=lambda r: int(r['kernel_size']))
            if len(pair) < 2 or mode != 'infer':
                continue  # one size says nothing of growth
            sizes, drawn = number(pair, 'kernel_size'), True
            if (batch, size) not in lines:
                lines.append((batch, size))
                axes.plot(sizes, number(pair, 'ms'), marker='o', label=f'local_attention, batch {batch}, {size} px')
            axes.plot(
                sizes, number(pair, 'baseline_ms'), marker='.', linestyle='--',
                label=f'{baseline}, batch {batch}, {size} px')
            ticks |= {*sizes}
    _logarithmic(axes, 'kernel size', 'forward pass (ms)', drawn, ticks)
    return drawn


def roofline(axes: plt.Axes, models: Rows, ops: Rows) -> bool:
    """Operations per second against operations per byte, under what the machine reached."""
    if not ops:
        return False
    measured = {(r['ms'], r['mode'], r['form']): r for r in ops}  # one row for each baseline: draw one point
    for (mode, form), rows in groups([*measured.values()], 'mode', 'form').items():
        intensity = [float(r['floor_mflop']) / float(r['floor_mbytes']) for r in rows]
        reached = [float(r['floor_mflop']) / float(r['ms']) for r in rows]
        axes.scatter(intensity, reached, s=14, label=f'{mode}, {form}')
    bandwidth, peak = max(number(ops, 'gbytes_per_s')), max(number(ops, 'gflops'))
    edge = peak / bandwidth
    axes.plot([edge / 64, edge, edge * 64], [peak / 64, peak, peak], color='black', label='copy and float32 product')
    _logarithmic(axes, 'operations per byte', '10⁹ operations per second', True)
    return True


def _logarithmic(axes: plt.Axes, x: str, y: str, legend: bool, ticks: Iterable[float] = ()) -> None:
    axes.set(xscale='log', yscale='log', xlabel=x, ylabel=y)
    if ticks:
        axes.set_xticks(sorted(ticks), [f'{tick:.0f}' for tick in sorted(ticks)])
        axes.set_xticks([], minor=True)
    axes.grid(which='both', alpha=.2)
    if legend:
        axes.legend(fontsize=7)


def draw_peers(rows: Rows, path: Path) -> None:
    """Published accuracy against measured time, one panel for each runtime and batch."""
    panels = groups([r for r in rows if r['top1']], 'runtime', 'batch')
    figure, all_axes = plt.subplots(1, len(panels), figsize=(8. * len(panels), 6.5), sharey=True, squeeze=False)
    for axes, ((runtime, batch), panel) in zip(all_axes[0], panels.items()):
        for source, marker, label in (('timm', 'o', "timm's"), ('paper', '*', 'of this package')):
            chosen = having(panel, source=source)
            axes.scatter(number(chosen, 'ratio'), number(chosen, 'top1'), marker=marker, s=60, label=label)
        _logarithmic(axes, f'time / time of {panel[0]["baseline"]} px', '', False)
        axes.set(yscale='linear', title=f'{RUNTIMES[runtime]}, batch {batch}')
        most = max(number(panel, 'ratio'))
        axes.set_xlim(right=1.35 * most)  # room for the last name
        ticks = [x for x in (.5, 1, 1.5, 2, 3, 4, 6) if x <= 1.2 * most]
        axes.set_xticks(ticks, [f'{x:g}' for x in ticks])
        axes.set_xticks([], minor=True)
    all_axes[0][0].set_ylabel('ImageNet-1k top-1 (%), as published')
    all_axes[0][0].legend(fontsize=8, loc='lower right')
    figure.suptitle(rows[-1]['hardware'], fontsize=9)
    figure.tight_layout()
    for axes, panel in zip(all_axes[0], panels.values()):
        _name_points(axes, panel)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def _name_points(axes: plt.Axes, rows: Rows) -> None:
    """Each model's name beside its point, at the first of several places where no other name is."""
    places = [((5, 3), 'left'), ((5, -8), 'left'), ((-5, 3), 'right'), ((-5, -8), 'right'), ((5, 11), 'left'),
              ((5, -16), 'left'), ((-5, 11), 'right'), ((-5, -16), 'right')]
    axes.figure.canvas.draw()  # sizes of texts are known after it
    taken = []
    for row in sorted(rows, key=lambda r: -float(r['top1'])):
        name, point = row['model'], (float(row['ratio']), float(row['top1']))
        for ending in ('_patch4_window7_224', '_patch16_224', '_224'):
            name = name.removesuffix(ending)
        for offset, side in places:
            text = axes.annotate(
                name, point, fontsize=6.5, xytext=offset, textcoords='offset points', horizontalalignment=side)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            print(f'{row["model"]} has no place for its name in {axes.get_title()}.')


RUNTIMES = {'eager': 'PyTorch', 'onnxruntime': 'ONNX Runtime'}
FIGURES: Dict[str, Callable[[plt.Axes, Rows, Rows], bool]] = {
    'latency': latency, 'memory': memory, 'kernel_size': kernel_size, 'roofline': roofline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--results', type=Path, default=harness.RESULTS, help='folder of the CSVs')
    parser.add_argument('--images', type=Path, default=IMAGES, help='folder of the figures')
    args = parser.parse_args()
    models, ops, peers = (latest(harness.read(args.results / f'{name}.csv')) for name in ('models', 'ops', 'peers'))
    machines = groups([*models, *ops], 'device', 'hardware')
    if not machines and not peers:
        parser.error(f'--results: {args.results} holds no measurements; run benchmarks/bench.py first.')
    args.images.mkdir(parents=True, exist_ok=True)
    newest = {device: hardware for device, hardware in machines}  # of several machines, the one measured last
    for device, hardware in newest.items():
        here = [having(rows, device=device, hardware=hardware) for rows in (models, ops)]
        for name, draw in FIGURES.items():
            figure, axes = plt.subplots(figsize=(7, 4.5))
            if draw(axes, *here):
                axes.set_title(hardware, fontsize=9)
                path = args.images / f'{name}_{device.partition(":")[0]}.png'
                figure.savefig(path, dpi=120, bbox_inches='tight')
                print(path)
            plt.close(figure)
    for (device,), rows in groups(peers, 'device').items():
        rows = having(rows, hardware=rows[-1]['hardware'])
        draw_peers(rows, args.images / f'peers_{device.partition(":")[0]}.png')


if __name__ == '__main__':
    main()
