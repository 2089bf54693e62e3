"""One run, of any job: from the recipe to a folder of results that appears complete or not at all."""
import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Type

from filelock import FileLock, Timeout
from timm.utils import random_seed

from .._extras import require
from .._files import OutputError, check_replaceable, move_into_place, write_atomically
from .config import BaseRecipe, RecipeError, load_recipe
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

    Everything is written to `output/NAME-running`, which becomes `output/NAME` at the very end: an earlier result stays
    as it was until then. Killed or failed, the same call goes on from the newest checkpoint there. Started by torchrun,
    all processes call this.

    Args:
        recipe: Says everything.
        kind: What to train.

    Returns:
        Where the results are, and the metrics of the best epoch.

    Raises:
        RecipeError: A value of the recipe cannot be used, or an unfinished run had another recipe.
        DataError: The data cannot be used.
        OutputError: The folder of the result holds other things, or cannot be written.
        ImportError: A package is missing.
        DivergedError: The loss is not finite.
    """
    # whatever can fail for reasons outside this package fails before the training
    world = join_world(recipe.device)
    names = {*kind.outputs, LOG, RECIPE, CHECKPOINTS, TENSORBOARD}
    folder = Path(recipe.output) / recipe.run_name
    working = folder.with_name(f'{folder.name}-running')
    check_replaceable(folder, names)
    check_replaceable(working, {*names, _LOCK})
    for name, extra in [('tqdm', 'train'), ('yaml', 'train'), *kind.requirements(recipe)]:
        require(name, extra)
    if recipe.tensorboard:
        require('tensorboard')

    random_seed(recipe.seed)
    job = kind(recipe, world)
    trainer = Trainer(recipe, job, world, working)
    lock = _prepare(working, recipe) if world.is_main else None
    world.barrier()
    try:
        trainer.run()
        best = trainer.history[trainer.best.epoch]
        if not world.is_main:
            world.barrier()
            return Result(folder, [], best, job)
        for name in kind.outputs:
            _remove(working / name)
        try:
            job.finish(trainer.best_model(), working, trainer.history)
        except OSError as e:
            raise OutputError(f'{working}: the results cannot be written ({e}). The checkpoints are there.') from e
    except BaseException:
        if lock is not None:
            _release(lock)
            if not (working / CHECKPOINTS).exists():
                shutil.rmtree(working)
            else:
                _logger.warning('the run did not finish; the same command goes on from what is in %s', working)
        raise
    _release(lock)
    check_replaceable(folder, names)
    move_into_place(working, folder)
    world.barrier()
    files = [folder / name for name in (*kind.outputs, LOG, RECIPE) if (folder / name).exists()]
    return Result(folder, files, best, job)


def _prepare(working: Path, recipe: BaseRecipe) -> FileLock:
    """Make or take over the folder of a run, and lock it."""
    working.mkdir(parents=True, exist_ok=True)
    lock = FileLock(working / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise OutputError(f'{working}: another run of this name is at work there. Choose another name.') from e
    file = working / RECIPE
    if (working / CHECKPOINTS).exists() and file.exists():
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
                    _remove(path)
    write_atomically(recipe.to_yaml(), file)
    return lock


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


