"""Running the cells of studies: any number of processes take those that nobody has, and go on where one stopped."""
import hashlib
import logging
import multiprocessing
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from filelock import FileLock, Timeout

from .._files import remove
from ..training.checkpoint import Checkpoints
from ..training.jobs import load_job
from ..training.loop import CHECKPOINTS, DivergedError
from ..training.run import RECIPE, run_job
from ..training.signals import stopping_in_order
from .data import Parts, prepare
from .grid import SWAP, TEST, Cell, Study, cell_of, choose_lr, find_cell
from .results import SAME, Results, environment

_logger = logging.getLogger(__name__)

_MODEL = 'model'
_PATIENCE = 2.  # seconds between looks at what other processes have done


class StudyError(RuntimeError):
    """A study that cannot go on."""


class Places(NamedTuple):
    """Where a study's files are."""
    results: Path  # folder of CSV files
    work: Path  # folder of data, runs and kept models

    def of(self, name: str) -> Results:
        """Results of a study by its name."""
        return Results(self.results / f'{name}.csv', self.work / 'locks' / f'{name}.csv')

    def model(self, study: Study, mixer: str) -> Path:
        """Where the model of the first seed of a mixer is kept, for pictures."""
        return self.work / 'models' / f'{study.name}-{mixer}'


def run(
        paths: Sequence[Path],
        places: Places,
        jobs: int = 1,
        shard: Tuple[int, int] = (1, 1),
        limit: Optional[int] = None,
        mixers: Sequence[str] = (),
) -> None:
    """Run what has not been run yet of some studies, in their order.

    Args:
        paths: Their files.
        places: Where everything is written.
        jobs: Processes; they and other calls of this share the work.
        shard: This part of so many, from 1. Mixers are dealt, so that no part waits for another.
        limit: Most runs that each process makes.
        mixers: These alone, all if empty.

    Raises:
        StudyError: A process has failed, a mixer is in none of the studies, or a study that chooses learning rates for
            another is not complete.
    """
    if jobs == 1:
        _work(paths, places, shard, limit, mixers)
        return
    context = multiprocessing.get_context('spawn')
    workers = [context.Process(target=_worker, args=(paths, places, shard, limit, mixers)) for _ in range(jobs)]
    with stopping_in_order():
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()
            raise
    failed = sum(worker.exitcode != 0 for worker in workers)
    if failed:
        raise StudyError(f'{failed} of {jobs} processes have failed.')


def _worker(*args: Any) -> None:
    logging.basicConfig(format='%(message)s')
    logging.getLogger(__name__).setLevel(logging.INFO)
    _work(*args)


def _work(
        paths: Sequence[Path],
        places: Places,
        shard: Tuple[int, int],
        limit: Optional[int],
        mixers: Sequence[str],
) -> None:
    studies = [Study(path) for path in paths]
    parts = {study.name: prepare(study.settings, places.work / 'data') for study in studies}
    names = sorted({mixer for study in studies for mixer in study.settings.mixers})
    unknown = sorted(set(mixers) - set(names))
    if unknown:
        raise StudyError(f'{unknown[0]}: is a mixer of none of these studies.')
    mine = set((sorted(mixers) or names)[shard[0] - 1::shard[1]])
    made = 0
    while limit is None or made < limit:
        waiting = []
        for study, cell in _missing(studies, parts, places, mine):
            if cell is None:
                waiting.append(study.name)
                continue
            with _claim(places, study, cell) as ours:
                results = places.of(study.name)
                data = parts[study.name].digest
                if not ours or find_cell(study, results.rows(), cell, data) is not None:
                    waiting.append(study.name)
                    continue
                row = run_cell(study, cell, parts[study.name], places.work / 'runs', places.model(study, cell.mixer))
                results.add([row])
                remove(places.work / 'runs' / _run_name(study, cell, study.digest(cell, data)))
            made += 1
            _logger.info(
                '%s %s: %s, %s s', study.name, cell, row['score'] or row['status'], row['seconds'])
            break
        else:
            if not waiting:
                return
            time.sleep(_PATIENCE)  # others are at work on the rest


def _missing(
        studies: Sequence[Study],
        parts: Dict[str, Parts],
        places: Places,
        mixers: set,
) -> Iterator[Tuple[Study, Optional[Cell]]]:
    """Runs that no row tells of, in order; None for those that wait for a learning rate.

    Raises:
        StudyError: The study that chooses the learning rate is not among these, and has not chosen.
    """
    by_name = {study.name: study for study in studies}
    for study in studies:
        rows = places.of(study.name).rows()
        names = [name for name in study.settings.mixers if name in mixers]

        def is_missing(cell, study=study, rows=rows):
            return find_cell(study, rows, cell, parts[study.name].digest) is None

        for mixer in names:
            for cell in study.tune_cells(mixer):
                if is_missing(cell):
                    yield study, cell
        lrs = chosen_lrs(study, places)
        for reading in study.settings.readings:
            cells: List[List[Cell]] = []
            for mixer in names:
                if lrs[mixer] is not None:
                    cells.append(study.test_cells(mixer, lrs[mixer], reading))
                elif study.settings.lr_from in (None, *by_name):
                    yield study, None
                else:
                    raise StudyError(
                        f'{study.name}: learning rates are those of {study.settings.lr_from}, which has not chosen one'
                        f' for {mixer} yet. Run it first, or both together.')
            for cell in sorted(sum(cells, []), key=lambda cell, study=study: study.settings.seeds.index(cell.seed)):
                if is_missing(cell):
                    yield study, cell


def chosen_lrs(study: Study, places: Places) -> Dict[str, Optional[float]]:
    """The learning rate of each mixer, None where it is not chosen yet."""
    chooser = study
    if study.settings.lr_from is not None:
        chooser = Study(study.path.with_name(f'{study.settings.lr_from}{study.path.suffix}'))
    rows = places.of(chooser.name).rows()
    return {mixer: choose_lr(chooser, mixer, rows) for mixer in study.settings.mixers}


@contextmanager
def _claim(places: Places, study: Study, cell: Cell) -> Iterator[bool]:
    """Take a run for this process alone; false where another has taken it."""
    folder = places.work / 'locks'
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f'{study.name}-{cell}')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _run_name(study: Study, cell: Cell, digest: str) -> str:
    return f'{study.name}-{cell}-{digest}'


def run_cell(
        study: Study,
        cell: Cell,
        parts: Parts,
        runs: Path,
        keep: Optional[Path] = None,
) -> Dict[str, Any]:
    """Make one run, or go on with it, and return its row. Its folder stays.

    Args:
        study: The study.
        cell: The run.
        parts: Data of the study.
        runs: Folder of runs.
        keep: Where the model goes, of the first seed and the first reading alone.
    """
    settings = study.settings
    torch.set_num_threads(settings.threads)
    digest = study.digest(cell, parts.digest)
    recipe = study.recipe(cell, parts.folders[cell.phase], runs, _run_name(study, cell, digest))
    folder = runs / recipe.name
    row: Dict[str, Any] = dict(
        cell._asdict(), data=parts.digest, digest=digest, status='done', score='',
        mlp_ratio=recipe.model_args.get('mlp_ratio', ''), threads=settings.threads, device=settings.device,
        **environment())
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with stopping_in_order():
            if not (folder / RECIPE).is_file():  # else it was finished, and its row was not written
                run_job(recipe, load_job(settings.job))
    except DivergedError:
        remove(folder.with_name(f'{folder.name}-running'))
        return dict(row, status='diverged', **_seconds(start, cpu))
    state = Checkpoints(folder / CHECKPOINTS, 1).load_newest(('history', 'model'))
    last = state['history'][-1]
    if keep is not None and (cell.phase, cell.reading, cell.seed) == (TEST, SWAP, settings.seeds[0]):
        keep.parent.mkdir(parents=True, exist_ok=True)
        remove(keep)
        shutil.copytree(folder / _MODEL, keep)
    return dict(
        row,
        score=repr(float(last[f'val_{load_job(settings.job).metric}'])),
        loss=repr(float(last['val_loss'])) if 'val_loss' in last else '',
        train_loss=repr(float(last['train_loss'])),
        weights=_weights_digest(state['model']),
        steps=last['step'],
        **_seconds(start, cpu),
    )


def _seconds(start: float, cpu: float) -> Dict[str, str]:
    return dict(
        seconds=f'{time.perf_counter() - start:.1f}', cpu_seconds=f'{time.process_time() - cpu:.1f}')


def _weights_digest(weights: Dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        x = weights[name].detach().cpu().contiguous()
        digest.update(f'{name} {x.dtype} {tuple(x.shape)}\n'.encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b'')
    return digest.hexdigest()[:16]


def check(paths: Sequence[Path], places: Places, number: int = 3) -> List[str]:
    """Make some recorded runs anew.

    Args:
        paths: Files of the studies.
        places: Where results and data are.
        number: How many runs, from the first to the last recorded one.

    Returns:
        What differs from the record, one line for each run; nothing where all is the same.

    Raises:
        StudyError: There are not so many.
    """
    found = []
    for study in (Study(path) for path in paths):
        rows = places.of(study.name).rows()
        if not rows:
            continue
        parts = prepare(study.settings, places.work / 'data')
        for row in rows:
            cell = cell_of(row)
            current = cell.mixer in study.settings.mixers and row['digest'] == study.digest(cell, parts.digest)
            if current:
                found.append((study, parts, cell, row))
    if len(found) < number:
        raise StudyError(f'{len(found)} runs are recorded that these studies would make today; need {number}.')
    chosen = [found[round(i * (len(found) - 1) / max(1, number - 1))] for i in range(number)]
    differences = []
    runs = places.work / 'check'
    for study, parts, cell, row in chosen:
        remove(runs)
        new = {k: str(v) for k, v in run_cell(study, cell, parts, runs).items()}
        wrong = [f'{k} {row[k]} recorded, {new.get(k, "")} now' for k in SAME if row[k] != new.get(k, '')]
        if wrong:
            names = ('torch', 'timm', 'numba', 'cpu', 'commit')
            other = [f'{k} {row[k]} there, {new[k]} here' for k in names if row[k] != new[k]]
            wrong.append(f'recorded with: {"; ".join(other)}' if other else 'with the same versions and commit')
            differences.append(f'{study.name} {cell}: {"; ".join(wrong)}')
        _logger.info('%s %s: %s', study.name, cell, 'differs' if wrong else 'the same bits')
    remove(runs)
    return differences


def progress(paths: Sequence[Path], places: Places) -> List[Tuple[str, int, int]]:
    """Name, runs recorded and runs in all of each study."""
    out = []
    for study in (Study(path) for path in paths):
        parts = prepare(study.settings, places.work / 'data')
        rows = places.of(study.name).rows()
        lrs = chosen_lrs(study, places)
        done = 0
        for mixer in study.settings.mixers:
            cells = study.tune_cells(mixer)
            for reading in study.settings.readings:
                lr = lrs[mixer]
                cells += study.test_cells(mixer, lr, reading) if lr is not None else []
            done += sum(find_cell(study, rows, cell, parts.digest) is not None for cell in cells)
        out.append((study.name, done, study.size))
    return out
