"""What a study compares: its file, and the runs that it consists of."""
import dataclasses
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import timm

from ..inspect import count_macs
from ..training.config import BaseRecipe, RecipeError, Values, load_recipe, value
from ..training.jobs import load_job

TUNE, TEST = 'tune', 'test'  # phases: learning rates on the validation split, then the comparison
SWAP, MACS = 'swap', 'macs'  # readings: the attention swapped and nothing else; multiply-accumulates made equal
_DERIVED = ('data', 'model', 'lr', 'seed', 'device')  # values of a recipe that a study gives itself
MACS_TOLERANCE = 0.01


@dataclasses.dataclass
class Settings(Values):
    """A study's file. Names in `mixers` are its own, with arguments of the model; nothing stands for `mixer: NAME`."""
    job: str = value('classification', 'what is trained', choices=('classification', 'segmentation'))
    data: str = value('digits', "'digits', 'emoji', 'emoji_artists', 'shapes', or a folder of class-named folders")
    source: str = value('output/emoji', 'emoji: folder of scripts/get_emoji.py', free=True)
    train_images: int = value(600, 'shapes: scenes to train on', low=1)
    val_images: int = value(100, 'shapes: scenes to choose learning rates by', low=1)
    test_images: int = value(200, 'shapes: scenes to test on', low=1)
    test_fraction: float = value(0.5, 'part of each class to test on', low=0.01, high=0.99)
    val_fraction: float = value(0.25, 'part of the rest to choose learning rates by', low=0.01, high=0.99)
    split_seed: int = value(0, 'draws these parts', low=0)
    model: str = value('test_mixer_swin', 'network')
    mixers: Dict[str, Any] = value({}, 'what is compared')
    baseline: str = value('window_bias', 'what all others are compared with')
    lrs: Tuple[float, ...] = value((), 'learning rates to choose from')
    lr_from: Optional[str] = value(None, 'name of a study whose choice of learning rates holds here, too')
    tune_seeds: Tuple[int, ...] = value((1000,), 'seeds of the runs that choose the learning rate')
    seeds: Tuple[int, ...] = value((0, 1, 2, 3, 4), 'seeds of the comparison, the same for all mixers')
    readings: Tuple[str, ...] = value((SWAP, MACS), 'comparisons to make')
    threads: int = value(1, 'threads of a run, of which the last bits depend', low=1)
    device: str = value('cpu', 'device of all runs')
    recipe: Dict[str, Any] = value({}, 'recipe of every run')

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in self.mixers:
            raise RecipeError(f'baseline: got {self.baseline!r}, must be one of the mixers.')
        if not self.lrs and self.lr_from is None:
            raise RecipeError('lrs: got none, must be some, or lr_from another study.')
        if not self.seeds or not (self.tune_seeds or self.lr_from):
            raise RecipeError('seeds, tune_seeds: got none.')
        for name in ('lrs', 'seeds', 'tune_seeds'):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise RecipeError(f'{name}: must all differ.')
        if set(self.tune_seeds) & set(self.seeds):
            raise RecipeError('tune_seeds: must not be among seeds.')
        if not self.readings or not set(self.readings) <= {SWAP, MACS}:
            raise RecipeError(f'readings: got {self.readings}, must be some of {SWAP!r} and {MACS!r}.')
        derived = set(_DERIVED) & self.recipe.keys()
        if derived:
            raise RecipeError(f'recipe: must not say {min(derived)!r}, which the study says itself.')
        for name, args in self.mixers.items():
            if not isinstance(args, (dict, type(None))):
                raise RecipeError(f'mixers: {name}: got {args!r}, must be arguments of the model or nothing.')


class Cell(NamedTuple):
    """One run of a study."""
    phase: str
    reading: str
    mixer: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f'{self.phase}-{self.reading}-{self.mixer}-{self.lr:g}-{self.seed}'


class Study:
    """A study by its file."""

    def __init__(self, path: Union[str, Path]) -> None:
        """
        Args:
            path: YAML of `Settings`; its name without the ending is the study's.

        Raises:
            RecipeError: It cannot be read, or a value cannot be used.
        """
        self.path = Path(path)
        self.name = self.path.stem
        self.settings = load_recipe(self.path, kind=Settings)
        self.recipe_kind = load_job(self.settings.job).recipe_kind

    def model_args(self, mixer: str, reading: str = SWAP) -> Dict[str, Any]:
        """Arguments of the network with a mixer.

        Raises:
            RecipeError: No MLP makes its multiply-accumulates equal to those of the baseline.
        """
        settings = self.settings
        args = {
            **settings.recipe.get('model_args', {}),
            **({'mixer': mixer} if settings.mixers[mixer] is None else settings.mixers[mixer])}
        if reading == SWAP or mixer == settings.baseline:
            return args
        baseline = self.model_args(settings.baseline)
        return {**args, 'mlp_ratio': _equal_ratio(settings.model, json.dumps(args), json.dumps(baseline))}

    def tune_cells(self, mixer: str) -> List[Cell]:
        """Runs that choose the learning rate of a mixer; none where another study has chosen."""
        if self.settings.lr_from is not None:
            return []
        return [
            Cell(TUNE, SWAP, mixer, lr, seed) for lr in self.settings.lrs for seed in self.settings.tune_seeds]

    def test_cells(self, mixer: str, lr: float, reading: str) -> List[Cell]:
        """Runs that compare a mixer. The baseline is the same network in both readings, and is run in one."""
        if reading == MACS and mixer == self.settings.baseline and SWAP in self.settings.readings:
            return []
        return [Cell(TEST, reading, mixer, lr, seed) for seed in self.settings.seeds]

    @property
    def size(self) -> int:
        """Number of all runs."""
        settings = self.settings
        tune = 0 if settings.lr_from is not None else len(settings.lrs) * len(settings.tune_seeds)
        return sum(
            tune + sum(len(self.test_cells(mixer, 0., reading)) for reading in settings.readings)
            for mixer in settings.mixers)

    def recipe(self, cell: Cell, data: Path, output: Path, name: str = '') -> BaseRecipe:
        """The recipe of a run.

        Args:
            cell: Which run.
            data: Folder of its phase.
            output: Folder of all runs.
            name: Its name there.
        """
        values = dict(
            self.settings.recipe,
            model=self.settings.model,
            model_args=self.model_args(cell.mixer, cell.reading),
            data=str(data),
            lr=cell.lr,
            seed=cell.seed,
            device=self.settings.device,
            output=str(output),
            name=name,
        )
        known = {field.name for field in dataclasses.fields(self.recipe_kind)}
        values.update({k: False for k in ('figures', 'onnx') if k in known})
        return load_recipe(None, values, self.recipe_kind)

    def digest(self, cell: Cell, data: str) -> str:
        """What decides the result of a run, in twelve letters: its recipe, data and threads.

        Args:
            cell: Which run.
            data: Digest of its data.
        """
        recipe = self.recipe(cell, Path('data'), Path('output'))
        values = {
            field.name: getattr(recipe, field.name)
            for field in dataclasses.fields(recipe) if not field.metadata['free']}
        values.update(data=data, threads=self.settings.threads, device=self.settings.device)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def find_cell(
        study: Study,
        rows: Iterable[Dict[str, str]],
        cell: Cell,
        data: Optional[str] = None,
) -> Optional[Dict[str, str]]:
    """The last row of a run as the study would make it today.

    Args:
        study: The study.
        rows: Its results.
        cell: Which run.
        data: Digest of the data that it must be of, None for any.
    """
    found = None
    for row in rows:
        if cell_of(row) == cell and row['digest'] == study.digest(cell, row['data'] if data is None else data):
            found = row
    return found


def cell_of(row: Dict[str, str]) -> Cell:
    """The run that a row tells of."""
    return Cell(row['phase'], row['reading'], row['mixer'], float(row['lr']), int(row['seed']))


def choose_lr(study: Study, mixer: str, rows: List[Dict[str, str]]) -> Optional[float]:
    """The learning rate of the best mean on the validation split; of equal ones that of the lower loss.

    Args:
        study: The one that chooses.
        mixer: For which.
        rows: Its results.

    Returns:
        None while runs are missing.

    Raises:
        RecipeError: No learning rate leads anywhere.
    """
    found = []
    for lr in study.settings.lrs:
        of_lr = [find_cell(study, rows, cell) for cell in study.tune_cells(mixer) if cell.lr == lr]
        if None in of_lr:
            return None
        if all(row['status'] == 'done' for row in of_lr):
            loss = sum(float(row['loss'] or row['train_loss']) for row in of_lr)
            found.append((sum(float(row['score']) for row in of_lr), -loss, lr))
    if not found:
        raise RecipeError(f'{study.name}: {mixer} diverges at every learning rate.')
    return max(found)[2]


def macs(model: str, args: Dict[str, Any]) -> int:
    """Multiply-accumulates of a network for ten classes, by its arguments."""
    return count_macs(timm.create_model(model, device='meta', num_classes=10, **args))


def num_params(model: str, args: Dict[str, Any]) -> int:
    """Parameters of a network for ten classes, by its arguments."""
    return sum(p.numel() for p in timm.create_model(model, device='meta', num_classes=10, **args).parameters())


@cache
def _equal_ratio(model: str, args: str, baseline: str) -> float:
    """The MLP ratio with which multiply-accumulates are those of the baseline: the first near enough, or the best."""
    arguments = json.loads(args)
    target = macs(model, json.loads(baseline))

    def off(ratio: float) -> float:
        return macs(model, {**arguments, 'mlp_ratio': ratio}) - target

    low, high = off(1.), off(5.)
    guess = 1. - low * 4. / (high - low)
    found = []
    for i in sorted(range(-12, 13), key=abs):
        ratio = round(guess + i / 200, 3)
        if ratio > 0.1:
            found.append((abs(off(ratio)), ratio))
            if found[-1][0] <= MACS_TOLERANCE / 10 * target:
                break
    if not found or min(found)[0] > MACS_TOLERANCE * target:
        raise RecipeError(f'{args}: no mlp_ratio makes its multiply-accumulates equal to those of {baseline}.')
    return min(found)[1]
