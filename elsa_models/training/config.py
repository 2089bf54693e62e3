"""The recipe of a training run: a flat set of typed values, read from YAML and overridden on the command line."""
import argparse
import dataclasses
import difflib
import itertools
import math
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..models import SMALL_MODEL
from ..models._naming import HELP as NAMES

_IN_WHEEL = Path(__file__).parents[1] / 'configs'
_RECIPES = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / 'configs'  # in the repository
_MAX_DEPTH = 20  # of mappings and lists within each other
_MAX_PARTS = 100_000  # of them and what they hold, an alias of YAML counting as what it stands for
_MAX_INT = 2 ** 31 - 1
UNFINISHED = '-running'  # ends the name of a run's folder until the run is finished


class RecipeError(ValueError):
    """A recipe that cannot be run, with the name of the value at fault."""


def weights_error(error: Exception, pretrained: bool, checkpoint: Optional[str]) -> RecipeError:
    """The error of weights that a recipe asks for, in terms of the scripts' options.

    Args:
        error: Why they could not be had, or do not fit.
        pretrained: Whether the recipe asks for the model's own.
        checkpoint: File that it asks for instead, if any.
    """
    if checkpoint is not None:
        return RecipeError(f'checkpoint: {checkpoint!r} cannot be used. {error}')
    if not pretrained:
        return RecipeError(f'model: {error}')
    return RecipeError(
        f'pretrained: cannot be had. --checkpoint FILE takes weights in a file, --no-pretrained none.\n{error}')


def value(
        default: Any,
        help: str,
        low: float = -math.inf,
        high: float = math.inf,
        choices: Tuple[str, ...] = (),
        free: bool = False,
        group: str = '',
) -> Any:
    """A value of a recipe.

    Args:
        default: Its default.
        help: What --help says of it.
        low: Lowest number.
        high: Highest number.
        choices: All that it may be, if there are any.
        free: Whether it decides nothing about the result, and may differ when a run goes on.
        group: Heading under which --help lists it and those that follow.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, free=free, group=group)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Values:
    """A flat set of typed values: the keys of a YAML file and the options of a script.

    Raises:
        RecipeError: A value has the wrong type or lies outside its range.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), hints[field.name])
            _check(field, value)
            setattr(self, field.name, value)

    def to_yaml(self) -> str:
        """The recipe as YAML, with every value spelled out."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def differences(self, other: 'Values') -> List[str]:
        """Values that decide the result and are not those of another recipe, one line for each."""
        return [
            f'{field.name}: {getattr(other, field.name)!r} there, {getattr(self, field.name)!r} here'
            for field in dataclasses.fields(self)
            if not field.metadata['free'] and getattr(self, field.name) != getattr(other, field.name)]


@dataclasses.dataclass
class BaseRecipe(Values):
    """What every training has: model, optimiser, schedule, machine, output. A job adds its own by subclassing."""
    # model
    model: str = value(SMALL_MODEL, f'{NAMES}; a path comes with its weights', group='model')
    model_args: Dict[str, Any] = value({}, 'further arguments of the model: img_size, kernel_size, ...')
    pretrained: bool = value(False, "start from the model's weights instead of random ones")
    checkpoint: Optional[str] = value(None, 'start from the weights in this file; a classifier of other classes is'
                                            ' left out')
    warm_start: Optional[str] = value(None, 'start from what a related model shares with this one: a name of timm, as'
                                            ' volo_d1_224.sail_in1k, or a file; see elsa_models.warm_start')
    freeze: Tuple[str, ...] = value((), 'modules whose weights and statistics stay, by name or pattern: patch_embed,'
                                        ' layers.[01]')
    head_epochs: int = value(0, 'first epochs that train the classifier alone', low=0)

    # optimiser and schedule
    epochs: int = value(30, 'passes over the training images', low=1, group='optimiser and schedule')
    min_steps: int = value(0, 'steps of the epochs together, at least: where images are few, an epoch passes over them'
                              ' several times', low=0)
    cooldown_epochs: int = value(0, 'further epochs at the final learning rate', low=0)
    batch_size: int = value(64, 'images in each step, over all processes and accumulated parts', low=1)
    accumulate: int = value(1, 'parts that a process computes one after the other, for less memory', low=1)
    opt: str = value('adamw', "timm's name of the optimiser")
    opt_args: Dict[str, Any] = value({}, 'further arguments of the optimiser')
    lr: float = value(1e-3, 'learning rate after warmup', low=0.)
    weight_decay: float = value(0.05, 'weight decay', low=0.)
    layer_decay: Optional[float] = value(None, 'factor of the learning rate from each layer to the one below', low=0.)
    clip_grad: Optional[float] = value(None, 'largest gradient, as clip_mode measures it', low=0.)
    clip_mode: str = value('norm', 'norm: of all gradients; value: of each; agc: relative to the weights',
                           choices=('norm', 'value', 'agc'))
    sched: str = value('cosine', "timm's name of the learning rate schedule",
                       choices=('cosine', 'tanh', 'poly', 'step', 'multistep', 'wsd', 'rsqrt', 'constant', 'none'))
    sched_args: Dict[str, Any] = value({}, 'further arguments of the schedule: decay_epochs, decay_rate,'
                                           ' decay_milestones, ...')
    warmup_epochs: float = value(2., 'epochs of linear warmup, at most half of all', low=0.)
    warmup_lr: float = value(1e-6, 'learning rate at the start of warmup', low=0.)
    min_lr: float = value(0., 'learning rate at the end', low=0.)
    ema_decay: Optional[float] = value(None, 'keep a moving average of the weights with this decay, and evaluate and'
                                             ' save that', low=0., high=1.)
    ema_warmup: bool = value(False, 'let the decay rise from 0 at the start')
    seed: int = value(42, 'seed of initialisation, augmentation and order', low=0, high=2 ** 63 - 1)

    # machine: what changes no result beyond rounding may change between a run and its continuation
    device: str = value('auto', 'cpu, cuda, mps, ...; auto takes cuda where there is one, else cpu', free=True,
                        group='machine')
    workers: int = value(0, 'processes that load images, for each process that trains; 0 for none', low=0, free=True)
    amp: Optional[str] = value(None, 'compute in bfloat16 or float16 where that is safe',
                               choices=('bfloat16', 'float16'))
    grad_checkpointing: bool = value(False, 'compute activations twice instead of keeping them', free=True)
    channels_last: bool = value(False, 'keep images with their channels last in memory', free=True)
    compile: bool = value(False, 'compile the model', free=True)
    fsdp: bool = value(False, 'spread weights, gradients and optimiser over the processes (FSDP2), not only images',
                       free=True)

    # output
    output: str = value('output', 'folder in which the run gets one of its own', free=True, group='output')
    name: str = value('', 'name of that folder; if empty, that of the data, with a number where it is taken', free=True)
    overwrite: bool = value(False, 'let this run replace a finished one of the same name', free=True)
    resume: bool = value(True, 'go on with an unfinished run of the same name; otherwise start it afresh', free=True)
    checkpoint_steps: int = value(0, 'steps between checkpoints within an epoch, 0 for none but at its end', low=0,
                                  free=True)
    keep_checkpoints: int = value(2, 'newest checkpoints to keep', low=1, free=True)
    log_steps: int = value(50, 'steps between looks at the loss', low=1, free=True)
    tensorboard: bool = value(False, 'write logs for TensorBoard', free=True)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, at least."""
        return -(-self.min_steps // self.epochs)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or 'run'

    def __post_init__(self) -> None:
        super().__post_init__()
        if '\0' in self.output:
            raise RecipeError(f'output: got {self.output!r}, must be the name of a folder.')
        if self.name and (self.name != _folder_name(self.name) or self.name in ('.', '..')):
            raise RecipeError(
                f'name: got {self.name!r}, must be the name of a folder within output, without separators and control'
                f' characters.')
        if self.name.endswith(UNFINISHED):
            raise RecipeError(f'name: got {self.name!r}, must not end in {UNFINISHED!r}, as unfinished runs do.')


def _folder_name(text: str) -> str:
    """A text as a name that no file system takes for a path, or refuses."""
    return ''.join('_' if c in '/\\\0' or not c.isprintable() else c for c in text)


def name_of_data(data: str) -> str:
    """A name for a run on a folder or data set: its last part."""
    name = _folder_name(Path(data.replace('\0', '_')).resolve().name)
    while name.endswith(UNFINISHED):
        name = name.removesuffix(UNFINISHED)
    return name or 'run'


@dataclasses.dataclass
class ImageValues(Values):
    """Labelled images and how a model is given them."""
    # data
    data: str = value('digits', "'digits' (scikit-learn's handwritten digits); a folder of class-named folders of"
                                " images, or one that holds two of those, train and val; or a data set of timm's"
                                " factory: torch/NAME, hfds/NAME, hfids/NAME, wds/NAME", group='data')
    data_dir: Optional[str] = value(None, "root folder or address of a data set of timm's factory")
    data_args: Dict[str, Any] = value({}, "further arguments of timm's factory: input_key, target_key, ...")
    train_split: str = value('train', "name of the part to train on, for timm's factory")
    val_split: str = value('validation', "name of the part to hold out, for timm's factory")
    num_classes: Optional[int] = value(None, 'number of classes, where the data does not say', low=2)
    val_fraction: float = value(0.25, 'part of each class to hold out, where the data has no part of its own for it',
                                low=0.01, high=0.99)
    val_seed: int = value(0, 'seed that draws the held-out part; the same for runs that are to be compared')
    limit: int = value(0, 'use at most this many images of each class, 0 for all', low=0)

    # images: None takes the model's own value
    crop_pct: Optional[float] = value(None, 'part of the resized image that is kept in evaluation', low=0.01,
                                      group='images')
    interpolation: Optional[str] = value(None, 'bilinear, bicubic, lanczos or nearest',
                                         choices=('bilinear', 'bicubic', 'lanczos', 'nearest'))
    mean: Optional[Tuple[float, ...]] = value(None, 'mean of each channel, of values between 0 and 1')
    std: Optional[Tuple[float, ...]] = value(None, 'standard deviation of each channel')

    def preparation(self) -> Dict[str, Any]:
        """How images are prepared, None for the model's own way."""
        return {name: getattr(self, name) for name in ('crop_pct', 'interpolation', 'mean', 'std')}


@dataclasses.dataclass
class Recipe(ImageValues, BaseRecipe):
    """The recipe of a classifier."""
    # first statistics
    reestimate: int = value(0, 'before training, find the statistics of batch norms anew on this many images, a few'
                               ' hundred; for a Refiner-ViT from weights of another size', low=0)

    # augmentation
    train_crop_mode: str = value('rrc', 'rrc: random resized crop; rkrc, rkrr: resize by a random ratio, then crop or'
                                        ' pad in the centre or at random', choices=('rrc', 'rkrc', 'rkrr'),
                                 group='augmentation')
    scale: Tuple[float, float] = value((0.08, 1.), 'range of the crop, as a part of the area', low=0.)
    ratio: Tuple[float, float] = value((3. / 4., 4. / 3.), 'range of the aspect ratio of the crop', low=0.01)
    hflip: float = value(0.5, 'probability of a horizontal flip', low=0., high=1.)
    vflip: float = value(0., 'probability of a vertical flip', low=0., high=1.)
    color_jitter: float = value(0.4, 'strength of brightness, contrast and saturation jitter', low=0.)
    color_jitter_prob: Optional[float] = value(None, 'probability of that jitter', low=0., high=1.)
    grayscale_prob: float = value(0., 'probability of grey', low=0., high=1.)
    gaussian_blur_prob: float = value(0., 'probability of a blur', low=0., high=1.)
    auto_augment: Optional[str] = value(None, "timm's specification, such as rand-m9-mstd0.5-inc1")
    re_prob: float = value(0., 'probability of random erasing', low=0., high=1.)
    re_mode: str = value('pixel', 'what random erasing puts there: const (black), rand (one colour), pixel (noise)',
                         choices=('const', 'rand', 'pixel'))
    re_count: int = value(1, 'boxes that random erasing takes', low=1)
    mixup: float = value(0., 'alpha of mixup, 0 for none', low=0.)
    cutmix: float = value(0., 'alpha of cutmix, 0 for none', low=0.)
    mixup_prob: float = value(1., 'probability of either', low=0., high=1.)
    mixup_switch_prob: float = value(0.5, 'probability of cutmix where both are used', low=0., high=1.)
    mixup_mode: str = value('batch', 'draw for each batch, pair or image', choices=('batch', 'pair', 'elem'))
    mixup_off_epochs: int = value(0, 'last epochs without either', low=0)

    # loss
    loss: str = value('ce', 'ce: cross-entropy; bce: binary cross-entropy; poly; asl',
                      choices=('ce', 'bce', 'poly', 'asl'), group='loss')
    smoothing: float = value(0.1, 'label smoothing', low=0., high=1.)
    class_balance: Optional[str] = value(None, "weight classes by their images, timm's method; with ce or bce",
                                         choices=('inv_freq', 'effective_num'))
    token_labels: Optional[str] = value(None, "train every token of a model with an aux head: 'image' gives it"
                                              " its image's label; a folder: maps of `elsa token-labels`")
    token_weight: float = value(0.5, "weight of the tokens' loss", low=0.)

    # evaluation: the same batches on any number of processes, and so the same bits
    eval_batch_size: int = value(64, 'images that a process evaluates at once', low=1, free=True, group='evaluation')

    # output
    figures: bool = value(True, 'draw curves, confusion, predictions and attention', free=True, group='output')
    onnx: bool = value(True, 'export to ONNX and check it in ONNX Runtime', free=True)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or name_of_data(self.data)


@dataclasses.dataclass
class Validation(ImageValues):
    """What `elsa validate` measures."""
    data: Optional[str] = value(None, "as in a recipe; if none, that of the run that the model is from, else 'digits'")
    model: str = value(SMALL_MODEL, f'{NAMES}; or an ONNX file', group='model and machine')
    model_args: Dict[str, Any] = value({}, 'further arguments of the model: img_size, kernel_size, ...')
    pretrained: bool = value(True, 'take the weights that the name stands for')
    checkpoint: Optional[str] = value(None, 'take the weights in this file instead')
    onnx: Optional[str] = value(None, 'measure this ONNX file; the model says how images are prepared')
    part: str = value('val', 'images to measure: those held out, those to train on, or all',
                      choices=('val', 'train', 'all'))
    reestimate: int = value(0, 'first find the statistics of batch norms anew on this many images to train on, a few'
                               ' hundred; for a Refiner-ViT at another size than its weights were trained on', low=0)
    batch_size: int = value(64, 'images that are computed at once', low=1)
    workers: int = value(0, 'processes that load images', low=0)
    device: str = value('auto', 'cpu, cuda, mps, ...; auto takes cuda where there is one, else cpu')
    amp: Optional[str] = value(None, 'compute in bfloat16 or float16 where that is safe',
                               choices=('bfloat16', 'float16'))
    channels_last: bool = value(False, 'keep images with their channels last in memory')
    output: Optional[str] = value(None, 'JSON file for the numbers')


ValuesType = TypeVar('ValuesType', bound=Values)


def load_recipe(
        path: Optional[Union[str, Path]] = None,
        overrides: Optional[Dict[str, Any]] = None,
        kind: Type[ValuesType] = Recipe,
) -> ValuesType:
    """Read a recipe from a YAML file.

    Args:
        path: File to read, or the name of a recipe of this package, such as 'folder' or 'imagenet/elsa_swin_tiny';
            None takes the default of every value.
        overrides: Values that go before those of the file. Entries of a mapping are added to the file's.
        kind: Class of the recipe.

    Raises:
        RecipeError: The file cannot be read, has an unknown key or a value of the wrong type, or an override has.
    """
    values = {}
    if path is not None:
        path = find_recipe(str(path))
        try:
            values = _read(path.read_text(encoding='utf-8')) or {}
        except (OSError, ValueError) as e:
            raise RecipeError(f'{path}: cannot be read as a recipe. {e}') from e
        if not isinstance(values, dict):
            raise RecipeError(f'{path}: holds a {type(values).__name__}, must be a mapping of keys to values.')
        try:
            _check_keys(values, kind)
            kind(**values)
        except RecipeError as e:
            raise RecipeError(f'{path}: {e}') from None
    overrides = dict(overrides or {})
    _check_keys(overrides, kind)
    for key, value in overrides.items():
        if isinstance(value, dict) and values.get(key):
            overrides[key] = {**values[key], **value}
    return kind(**{**values, **overrides})


def recipe_names(folder: str = '') -> List[str]:
    """Names of the recipes of this package, which `load_recipe` takes for files; of 'study', grids of many runs."""
    root = _RECIPES / folder
    names = sorted(p.relative_to(root).with_suffix('').as_posix() for p in root.rglob('*.yaml'))
    return [name for name in names if not name.startswith('study/')]


def find_recipe(name: str, folder: str = '') -> Path:
    """The file of that name or, where there is none, the recipe of this package, or of a folder of its recipes."""
    path = Path(name)
    if path.is_file() or path.suffix:
        return path
    names = recipe_names(folder)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f'did you mean {close[0]!r}?' if close else f'there are {", ".join(names)}.'
        raise RecipeError(f'{name}: is no file, and no recipe has that name; {hint}')
    return _RECIPES / folder / f'{name}.yaml'


def add_arguments(parser: argparse.ArgumentParser, kind: Type[Values] = Recipe) -> None:
    """Give a parser one option for each value of a recipe.

    Options that are not used leave no attribute behind, so that `vars` of the result are the overrides of
    `load_recipe`.

    Args:
        parser: Parser to extend.
        kind: Class of the recipe.
    """
    hints = get_type_hints(kind)
    groups: Dict[str, Any] = {}
    title = 'values'
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        title = field.metadata['group'] or title
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = f'{field.metadata["help"]} (default: {_default(field)})'
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=text.replace('%', '%%'))
        bare = _without_none(hint)
        if bare is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(bare) is dict:
            options.update(nargs='+', metavar='KEY=VALUE', action=_Mapping)
        elif get_origin(bare) is tuple:
            options.update(nargs='+', metavar='X')
        elif field.metadata['choices']:
            options.update(choices=field.metadata['choices'])
        else:
            options.update(metavar={str: 'TEXT', int: 'N', float: 'X'}[bare])
        numbers = get_origin(bare) is tuple and get_args(bare)[0] is not str
        if bare in (int, float) or numbers or bare is not hint and bare is not str:
            options.update(type=_read_option)  # typed as in a file, so that null means none there as here
        groups[title].add_argument('--' + field.name.replace('_', '-'), **options)


def _default(field: dataclasses.Field) -> str:
    """The default of a value as it is written on a command line."""
    if field.default is dataclasses.MISSING or field.default in (None, '', ()):
        return 'none'
    if isinstance(field.default, bool):
        return 'yes' if field.default else 'no'
    return ' '.join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)


def _read(text: str) -> Any:
    """A value from YAML.

    Raises:
        ValueError: It is none, or holds itself, or is nested too deeply.
    """
    try:
        return _plain(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as e:
        raise ValueError(f'{e}') from e


def _read_option(text: str) -> Any:
    try:
        return _read(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f'got {_shown(text)}. {e}') from e


class _Mapping(argparse.Action):
    """Collects KEY=VALUE, the values being YAML, over all uses of the option."""

    def __call__(self, parser, namespace, values, option_string=None):
        mapping = dict(getattr(namespace, self.dest, {}))
        for entry in values:
            key, equals, text = entry.partition('=')
            if not key or not equals:
                raise argparse.ArgumentError(self, f'got {entry!r}, must be KEY=VALUE.')
            try:
                mapping[key] = _read(text)
            except ValueError as e:
                raise argparse.ArgumentError(self, f'got {entry!r}. {e}') from e
        setattr(namespace, self.dest, mapping)


def _check_keys(values: Dict[str, Any], kind: Type[Values]) -> None:
    known = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f'did you mean {close[0]!r}?' if close else f'known are {", ".join(known)}.'
            raise RecipeError(f'unknown key {key!r}; {hint}')


def _without_none(hint: Any) -> Any:
    if get_origin(hint) is Union:
        return next(h for h in get_args(hint) if h is not type(None))
    return hint


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that `hint` names, where that loses nothing."""
    if value is None and _without_none(hint) is not hint:
        return None
    hint = _without_none(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        size = None if args[-1] is Ellipsis else len(args)
        if isinstance(value, (list, tuple)) and size in (None, len(value)):
            return tuple(_convert(name, v, args[0]) for v in value)
        items = 'names' if args[0] is str else 'numbers'
        expected = f'a list of {f"{size} {items}" if size else items}'
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            try:
                return _plain(value)
            except ValueError as e:
                raise RecipeError(f'{name}: {e}') from e
        expected = 'a mapping of names to values'
    elif hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text, and 1.0e-3 as a number
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)  # finite
        expected = 'a finite number'
    else:
        if type(value) is hint:
            return value
        expected = {int: 'a whole number', bool: 'true or false', str: 'text'}[hint]
    raise RecipeError(f'{name}: got {_shown(value)} of type {type(value).__name__}, must be {expected}.')


def _shown(value: Any) -> str:
    """A value for a message, in short."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        text = 'a huge number'
    return text if len(text) <= 100 else f'{text[:100]}...'


def _plain(value: Any, depth: int = 0, parts: Any = None) -> Any:
    """Return `value` with lists for tuples, at any depth, as YAML gives it back.

    Raises:
        ValueError: It is nested more deeply than any recipe is, as where it holds itself, or has more parts.
    """
    parts = itertools.count() if parts is None else parts
    if depth > _MAX_DEPTH:
        raise ValueError(f'It is nested more than {_MAX_DEPTH} deep.')
    if next(parts) > _MAX_PARTS:
        raise ValueError(f'It has more than {_MAX_PARTS} parts.')
    if isinstance(value, dict):
        return {k: _plain(v, depth + 1, parts) for k, v in value.items()}
    return [_plain(v, depth + 1, parts) for v in value] if isinstance(value, (list, tuple)) else value


def _check(field: dataclasses.Field, value: Any) -> None:
    low, high, choices = (field.metadata[k] for k in ('low', 'high', 'choices'))
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, int) and not isinstance(v, bool):
            high = _MAX_INT if high == math.inf else high
        if isinstance(v, (int, float)) and not isinstance(v, bool) and not low <= v <= high:
            raise RecipeError(f'{field.name}: got {_shown(v)}, must be a number from {low:g} to {high:g}.')
        if choices and v is not None and v not in choices:
            raise RecipeError(f'{field.name}: got {v!r}, must be one of {", ".join(choices)}.')
