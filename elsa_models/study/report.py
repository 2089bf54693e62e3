"""What came out of studies: tables in markdown and figures, from the recorded rows alone."""
import csv
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .._extras import require
from .._files import write_atomically
from .grid import MACS, SWAP, TEST, Study, cell_of, find_cell, macs, num_params
from .runner import Places, chosen_lrs
from .statistics import Interval, interval, paired

_BELOW = 10.  # points below the baseline, under which a mixer is named in the title instead of drawn
Scores = Dict[str, Dict[int, float]]  # by mixer and seed


class Contrast(NamedTuple):
    """Two mixers that differ in one thing, and what that is."""
    question: str
    ours: str
    theirs: str
    readings: Tuple[str, ...] = (SWAP,)


FACTORS = (
    Contrast('a bias by relative position, in windows', 'window_bias', 'window'),
    Contrast('a bias by relative position, among neighbours', 'neighbourhood_bias', 'neighbourhood'),
    Contrast('all relative terms instead of a bias, in windows', 'window_all', 'window_bias'),
    Contrast('all relative terms instead of a bias, among neighbours', 'neighbourhood_all', 'neighbourhood_bias'),
    Contrast('neighbours instead of windows, without bias', 'neighbourhood', 'window'),
    Contrast('neighbours instead of windows, with bias', 'neighbourhood_bias', 'window_bias'),
    Contrast('neighbours instead of windows, with all terms', 'neighbourhood_all', 'window_all'),
    Contrast('neighbours instead of windows, dynamic filters', 'dynamic_filter', 'window_filter'),
    Contrast('keys beside relative queries', 'sasa', 'query_filter'),
    Contrast('filter normalisation instead of a softmax', 'dynamic_filter', 'query_filter'),
    Contrast('the Hadamard product instead of the query', 'elsa', 'elsa_query'),
    Contrast('the ghost head', 'elsa', 'elsa_no_ghost'),
)
CLAIMS = (
    Contrast('relative positions matter to window attention', 'window_bias', 'window'),
    Contrast('applying attention to neighbours is better than to windows', 'neighbourhood_bias', 'window_bias'),
    Contrast('window attention is no better than depthwise convolution', 'depthwise', 'window_bias'),
    Contrast('dynamic filters are better than window attention', 'dynamic_filter', 'window_bias'),
    Contrast('Hadamard attention is better than attention by the query alone', 'elsa', 'elsa_query', (SWAP, MACS)),
    Contrast('the ghost head helps', 'elsa', 'elsa_no_ghost', (SWAP, MACS)),
    Contrast('ELSA is better than window attention', 'elsa', 'window_bias', (SWAP, MACS)),
    Contrast('ELSA is better than depthwise convolution', 'elsa', 'depthwise', (SWAP, MACS)),
    Contrast('ELSA is better than dynamic filters', 'elsa', 'dynamic_filter', (SWAP, MACS)),
)


class Outcome:
    """The recorded runs of a study that count: those with the chosen learning rates."""

    def __init__(self, study: Study, places: Places) -> None:
        """
        Args:
            study: The study.
            places: Where its rows are.
        """
        self.study = study
        self.rows = places.of(study.name).rows()
        self.lrs = chosen_lrs(study, places)
        self.scores: Dict[str, Scores] = {reading: {} for reading in study.settings.readings}
        self.diverged: List[str] = []
        baseline = study.settings.baseline
        for row in self.rows:
            mixer, reading = row['mixer'], row['reading']
            lr = self.lrs.get(mixer)
            if row['phase'] != TEST or lr is None or float(row['lr']) != lr or reading not in self.scores:
                continue
            if row['digest'] != study.digest(cell_of(row), row['data']):
                continue  # of a former recipe
            if row['status'] != 'done':
                self.diverged.append(f'{mixer} (seed {row["seed"]})')
                continue
            for other in self.scores:
                if other == reading or mixer == baseline:  # which is the same network in both readings
                    self.scores[other].setdefault(mixer, {})[int(row['seed'])] = float(row['score'])

    @property
    def progress(self) -> Tuple[int, int]:
        """Runs recorded, as far as they count, and runs in all."""
        settings = self.study.settings
        tune = sum(
            find_cell(self.study, self.rows, cell) is not None
            for mixer in settings.mixers for cell in self.study.tune_cells(mixer))
        test = sum(
            len(seeds) for reading, scores in self.scores.items() for mixer, seeds in scores.items()
            if reading == settings.readings[0] or mixer != settings.baseline)
        return tune + test, self.study.size

    def difference(self, ours: str, theirs: str, reading: str) -> Optional[Interval]:
        """Scores of one mixer less those of another by seed; None until all seeds have both: two tell nothing."""
        if not (self.is_whole(ours, reading) and self.is_whole(theirs, reading)):
            return None
        return paired(self.scores[reading][ours], self.scores[reading][theirs])

    def is_whole(self, mixer: str, reading: str) -> bool:
        """Whether a mixer has scores of all seeds."""
        return self.scores.get(reading, {}).get(mixer, {}).keys() >= set(self.study.settings.seeds)


def read_costs(path: Path) -> Dict[Tuple[str, str, str], Dict[str, str]]:
    """The last row of benchmarks/study_cost.py by study, reading and mixer; none where there is no file."""
    if not path.is_file():
        return {}
    with open(path, encoding='utf-8', newline='') as file:
        return {(row['study'], row['reading'], row['mixer']): row for row in csv.DictReader(file)}


def cost_of(costs: Dict, study: Study, reading: str, mixer: str) -> Optional[Dict[str, str]]:
    """What was measured for a mixer, in this study or another with the same network."""
    args = study.model_args(mixer, reading)
    for (name, cost_reading, cost_mixer), row in costs.items():
        if (cost_mixer, cost_reading) == (mixer, reading):
            if name == study.name:
                return row
            path = study.path.with_name(name + study.path.suffix)
            if path.is_file() and mixer in (other := Study(path)).settings.mixers:
                if other.model_args(mixer, reading) == args:
                    return row
    return None


def results_table(outcome: Outcome, reading: str, costs: Dict) -> str:
    """A markdown table of all mixers with results: scores, difference to the baseline, cost."""
    baseline = outcome.study.settings.baseline
    scores = outcome.scores[reading]
    lines = [
        f'| mixer | lr | runs | score (%) | minus {baseline} [95 %] | params (k) | MMACs | training step | inference |'
        ' memory (MiB) |',
        '|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|']
    means = {mixer: sum(values.values()) / len(values) for mixer, values in scores.items()}
    for mixer in sorted(means, key=lambda name: -means[name]):
        of_mixer = interval(list(scores[mixer].values()))
        score = f'{means[mixer]:.2f}' + (f' ± {of_mixer.std:.2f}' if of_mixer else '')
        to_baseline = outcome.difference(mixer, baseline, reading) if mixer != baseline else None
        cost = cost_of(costs, outcome.study, SWAP if mixer == baseline else reading, mixer) or {}
        network = (outcome.study.settings.model, outcome.study.model_args(mixer, reading))
        cells = [
            mixer, f'{outcome.lrs[mixer]:g}', str(len(scores[mixer])), score, shown(to_baseline),
            f'{num_params(*network) / 1e3:.0f}', f'{macs(*network) / 1e6:.2f}', cost.get('train_ratio', ''),
            cost.get('infer_ratio', ''), cost.get('train_peak_mib', '')]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def shown(difference: Optional[Interval]) -> str:
    """A difference and its interval, in bold where that excludes zero."""
    if difference is None:
        return ''
    text = f'{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]'
    return f'**{text}**' if difference.excludes_zero else text


def contrasts_table(outcomes: Sequence[Outcome], contrasts: Sequence[Contrast], verdicts: bool) -> str:
    """A markdown table of contrasts, a column for each study.

    Args:
        outcomes: Of the studies.
        contrasts: Rows, one more for each reading.
        verdicts: Say whether claims are supported, instead of numbers alone.
    """
    names = [outcome.study.name for outcome in outcomes]
    lines = [
        f'| {"claim" if verdicts else "what differs"} | runs compared | reading | {" | ".join(names)} |',
        f'|---|---|---|{"---|" * len(names)}']
    for contrast in contrasts:
        for reading in contrast.readings:
            cells = []
            for outcome in outcomes:
                difference = outcome.difference(contrast.ours, contrast.theirs, reading)
                text = shown(difference) or 'not all run'
                cells.append(f'{verdict(difference)}: {text}' if verdicts and difference else text)
            lines.append(
                f'| {contrast.question} | {contrast.ours} − {contrast.theirs} | {reading} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def verdict(difference: Interval) -> str:
    """Whether a claim that ours is better is supported; nothing is claimed where the interval holds zero."""
    if not difference.excludes_zero:
        return 'undecided'
    return 'supported' if difference.mean > 0. else 'not supported'


def progress_table(outcomes: Sequence[Outcome]) -> str:
    """A markdown table of how far each study is."""
    lines = [
        '| study | runs recorded | of | CPU seconds a run | commits | torch | CPU |', '|---|--:|--:|--:|---|---|---|']
    for outcome in outcomes:
        done, size = outcome.progress
        seconds = [float(row['cpu_seconds']) for row in outcome.rows]
        seen = [', '.join(sorted({row[k] for row in outcome.rows})) for k in ('commit', 'torch', 'cpu')]
        mean = f'{sum(seconds) / len(seconds):.0f}' if seconds else ''
        lines.append(f'| {outcome.study.name} | {done} | {size} | {mean} | {" | ".join(seen)} |')
    return '\n'.join(lines)


def report(paths: Sequence[Path], places: Places, document: Path, images: Path) -> List[Path]:
    """Write tables into a document, between `<!-- begin NAME -->` and `<!-- end NAME -->`, and draw figures.

    Args:
        paths: Files of the studies.
        places: Where their rows are, and cost.csv.
        document: Markdown file.
        images: Folder of the figures.

    Returns:
        Files that were written.
    """
    outcomes = [Outcome(Study(path), places) for path in paths]
    costs = read_costs(places.results / 'cost.csv')
    tables = {
        'progress': progress_table(outcomes),
        'factors': contrasts_table(outcomes, FACTORS, verdicts=False),
        'claims': contrasts_table(outcomes, CLAIMS, verdicts=True),
    }
    for outcome in outcomes:
        for reading in outcome.scores:
            if any(mixer != outcome.study.settings.baseline for mixer in outcome.scores[reading]):
                tables[f'{outcome.study.name} {reading}'] = results_table(outcome, reading, costs)
    text = document.read_text(encoding='utf-8')
    for name, table in tables.items():
        pattern = f'(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)'
        text = re.sub(pattern, lambda match, table=table: f'{match[1]}{table}\n{match[2]}', text, flags=re.DOTALL)
    write_atomically(text, document)
    drawn = [outcome for outcome in outcomes if any(outcome.scores.values())]
    written = [document]
    if drawn:
        for name, draw in (('study_accuracy.png', _draw_accuracy), ('study_factors.png', _draw_factors)):
            figure = draw(drawn, costs)
            figure.savefig(images / name, dpi=110, metadata={'Software': None})
            written.append(images / name)
    return written


def _draw_accuracy(outcomes: Sequence[Outcome], costs: Dict) -> object:
    """Score against multiply-accumulates, with intervals of the mean; a panel for each study and reading."""
    panels = [
        (outcome, reading) for outcome in outcomes for reading in outcome.scores
        if all(outcome.is_whole(mixer, reading) for mixer in outcome.lrs)]
    number = max(1, len(panels))
    figure = require('matplotlib.figure').Figure(figsize=(8.5 * number, 6.), layout='constrained')
    for ax, (outcome, reading) in zip(figure.subplots(1, number, squeeze=False)[0], panels):
        study = outcome.study
        found = {mixer: interval(list(values.values())) for mixer, values in outcome.scores[reading].items()}
        found = {mixer: x for mixer, x in sorted(found.items(), key=lambda pair: -_mean(pair[1])) if x is not None}
        floor = found[study.settings.baseline].mean - _BELOW if study.settings.baseline in found else 0.
        below = [f'{mixer} {x.mean:.1f} ± {x.std:.1f}' for mixer, x in found.items() if x.mean < floor]
        places = []
        for i, (mixer, x) in enumerate(found.items()):
            if x.mean < floor:
                continue
            # where all cost the same, side by side
            cost = macs(study.settings.model, study.model_args(mixer, reading)) / 1e6 if reading == SWAP else i
            color = '#c51b2b' if mixer == study.settings.baseline else '#ff7f0e' if 'elsa' in mixer else '#2f6fb0'
            ax.errorbar(cost, x.mean, yerr=x.high - x.mean, fmt='o', color=color, capsize=3, alpha=.7)
            places.append((mixer, cost, x.mean, color))
        title = 'attention swapped alone' if reading == SWAP else 'equal multiply-accumulates'
        ax.set_title(f'{study.name}: {title}' + (f'\n(below: {", ".join(below)})' if below else ''), fontsize=11)
        ax.set_ylabel('score on the test part (%), mean and its 95 % interval')
        if reading == SWAP:
            ax.set_xlabel('multiply-accumulates of an image (millions)')
        else:
            ax.set_xticks([])
        ax.margins(x=.12)
        ax.grid(alpha=.3)
        figure.draw_without_rendering()
        _write_names(ax, places)
    return figure


def _mean(found: Optional[Interval]) -> float:
    return 0. if found is None else found.mean


def _write_names(ax: Any, places: List[Tuple[str, float, float, str]]) -> None:
    """Write names beside points, none over another."""
    taken: List[Tuple[float, float, float]] = []  # left, right and middle of each, in points
    scale = 72. / ax.figure.dpi
    for name, x, y, color in places:
        left, middle = ax.transData.transform((x, y)) * scale
        width = 4.6 * len(name)
        for step in sorted(range(-12, 13), key=abs):
            for start in (left + 7., left - 7. - width):
                place = start, start + width, middle + 9. * step
                if all(place[1] < a or place[0] > b or abs(place[2] - c) >= 9. for a, b, c in taken):
                    break
            else:
                continue
            break
        taken.append(place)
        ax.annotate(
            name, (x, y), xytext=(place[0] - left, place[2] - middle), textcoords='offset points', fontsize=8,
            va='center', color=color, arrowprops=dict(arrowstyle='-', color=color, alpha=.3, shrinkA=0, shrinkB=0))


def _draw_factors(outcomes: Sequence[Outcome], costs: Dict) -> object:
    """What each factor moves, with the interval of the paired difference."""
    figure = require('matplotlib.figure').Figure(
        figsize=(4. + 3.6 * len(outcomes), 1.2 + .4 * len(FACTORS)), layout='constrained')
    axes = figure.subplots(1, len(outcomes), sharey=True, squeeze=False)[0]
    for ax, outcome in zip(axes, outcomes):
        for place, contrast in enumerate(FACTORS):
            found = outcome.difference(contrast.ours, contrast.theirs, SWAP)
            if found is not None:
                ax.errorbar(
                    found.mean, place, xerr=found.high - found.mean, fmt='o', capsize=3,
                    color='#1b7837' if found.excludes_zero else '#888888')
        ax.axvline(0., color='black', linewidth=1)
        ax.set_title(outcome.study.name)
        ax.set_xlabel('points of score, 95 % interval')
        ax.grid(alpha=.3)
    axes[0].set_yticks(range(len(FACTORS)), [contrast.question for contrast in FACTORS])
    axes[0].invert_yaxis()
    return figure
