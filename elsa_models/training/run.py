"""One run, of any job: from the recipe to a folder of results that appears complete or not at all."""
import itertools
import logging
import shutil
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Type

from filelock import FileLock, Timeout
from timm.utils import random_seed

from .._extras import require
from .._files import (
    OutputError,
    check_replaceable,
    move_into_place,
    recover,
    remove,
    remove_temporaries,
    write_atomically,
)
from .._images import warn_again
from .config import UNFINISHED, BaseRecipe, RecipeError, load_recipe
from .job import Job
from .loop import CHECKPOINTS, LOG, TENSORBOARD, Trainer
from .world import join_world

_logger = logging.getLogger(__name__)

RECIPE, _LOCK = 'recipe.yaml', '.lock'


class Result(NamedTuple):
    """What a run has come to."""
    folder: Path
    files: List[Path]  # the results in it; empty in other processes than the main one
    metrics: Dict[str, Any]  # of the best epoch: a row of the log
    job: Job


def run_job(recipe: BaseRecipe, kind: Type[Job]) -> Result:
    """Train as a recipe says, and keep the best model and what shows it.

    Everything is written to `output/NAME-running`, which becomes `output/NAME` at the very end. Killed or failed, the
    same call goes on from the newest checkpoint there. A finished result stays: where NAME follows from the data, the
    next free one of NAME, NAME-2, NAME-3 is taken; where the recipe gives it, it must be free, or `overwrite` be true,
    which replaces the former result at the very end. Started by torchrun, all processes call this.

    Args:
        recipe: Says everything.
        kind: What to train.

    Returns:
        Where the results are, and the metrics of the best epoch.

    Raises:
        RecipeError: A value of the recipe cannot be used, or an unfinished run had another recipe.
        DataError: The data cannot be used.
        OutputError: The folder of the result is there already, holds other things, or cannot be written.
        ImportError: A package is missing.
        DivergedError: The loss is not finite.
    """
    # whatever can fail for reasons outside this package fails before the training
    world = join_world(recipe.device)
    names = {*kind.outputs, LOG, RECIPE, CHECKPOINTS, TENSORBOARD}
    folder = world.share(_choose_folder(recipe, names) if world.is_main else None)
    working = _working(folder)
    for name, extra in [('tqdm', 'train'), ('yaml', 'train'), *kind.requirements(recipe)]:
        require(name, extra)
    if recipe.tensorboard:
        require('tensorboard')

    warn_again()
    random_seed(recipe.seed)
    job = kind(recipe, world)
    trainer = Trainer(recipe, job, world, working)
    lock = _prepare(working, recipe, names) if world.is_main else None
    world.barrier()
    try:
        trainer.run()
        best = trainer.history[trainer.best.epoch]
        if not world.is_main:
            world.barrier()
            return Result(folder, [], best, job)
        for name in kind.outputs:
            remove(working / name)
        try:
            job.finish(trainer.best_model(), working, trainer.history)
        except OSError as e:
            raise OutputError(f'{working}: the results cannot be written ({e}). The checkpoints are there.') from e
    except BaseException:
        if lock is not None:
            _release(lock)
            if _is_resumable(working):
                _logger.warning('the run did not finish; the same command goes on from what is in %s', working)
            elif working.is_dir():
                shutil.rmtree(working)
        raise
    _release(lock)
    check_replaceable(folder, names)
    if folder.exists() and not recipe.overwrite:
        raise OutputError(f'{folder}: has appeared meanwhile, and is not replaced. This result is {working}.')
    move_into_place(working, folder)
    world.barrier()
    files = [folder / name for name in (*kind.outputs, LOG, RECIPE) if (folder / name).exists()]
    return Result(folder, files, best, job)


def _working(folder: Path) -> Path:
    return folder.with_name(f'{folder.name}{UNFINISHED}')


def _is_resumable(working: Path) -> bool:
    return (working / RECIPE).is_file() and any((working / CHECKPOINTS).glob('step-*.pt'))


def _choose_folder(recipe: BaseRecipe, names: Collection[str]) -> Path:
    """The folder of the result: that of the recipe's name, or the first free one by the name of the data.

    Raises:
        OutputError: It is there already, or holds other things.
    """
    first = Path(recipe.output) / recipe.run_name
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f'{first.name}-{number}')
        working = _working(folder)
        try:
            recover(folder)  # a former run may have been killed while it took its place
            check_replaceable(folder, names)
            check_replaceable(working, {*names, _LOCK})
            done = folder.exists()
        except OSError as e:  # a name that is too long, a folder that must not be looked into
            raise OutputError(f'{folder}: cannot be written ({e}).') from e
        if recipe.overwrite or not (done or recipe.name == '' and _is_of_other_data(working, recipe)):
            break
        if recipe.name:
            raise OutputError(
                f'{folder}: is there already, the result of a former run. Take another name, or let this run replace it'
                f' at its end with overwrite: true (--overwrite).')
    if number > 1:
        _logger.info('%s is there already; this run is %s', first, folder)
    return folder


def _is_of_other_data(working: Path, recipe: BaseRecipe) -> bool:
    """Whether an unfinished run has other data, of which the last name is the same."""
    if not _is_resumable(working):
        return False
    try:
        former = load_recipe(working / RECIPE, kind=type(recipe))
    except RecipeError:
        return False
    return getattr(former, 'data', None) != getattr(recipe, 'data', None)


def _prepare(working: Path, recipe: BaseRecipe, names: Collection[str]) -> FileLock:
    """Make or take over the folder of a run, and lock it."""
    try:
        working.mkdir(parents=True, exist_ok=True)
        lock = FileLock(working / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise OutputError(f'{working}: another run of this name is at work there. Choose another name.') from e
    except OSError as e:
        raise OutputError(f'{working}: cannot be written ({e}).') from e
    remove_temporaries(working, names)  # of a process that was killed
    file = working / RECIPE
    if _is_resumable(working):
        if recipe.resume:
            try:
                differences = recipe.differences(load_recipe(file, kind=type(recipe)))
            except RecipeError as e:
                differences = [str(e)]
            if differences:
                _release(lock)
                raise RecipeError(
                    f'resume: {working} holds an unfinished run of another recipe ({"; ".join(differences)}). Take'
                    f' another name, or start afresh with resume: false (--no-resume).')
        else:
            for path in working.iterdir():
                if path.name != _LOCK:
                    remove(path)
    write_atomically(recipe.to_yaml(), file)
    _logger.info('the run is written to %s', working)
    return lock


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
