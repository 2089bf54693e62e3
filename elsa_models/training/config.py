"""The recipe of a training run: a flat set of typed values, read from YAML and overridden on the command line."""
import argparse
import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union, get_args, get_origin, get_type_hints

import yaml


class RecipeError(ValueError):
    """A recipe that cannot be run, with the name of the value at fault."""


def _value(
        default: Any,
        help: str,
        low: float = -math.inf,
        high: float = math.inf,
        choices: Tuple[str, ...] = (),
) -> Any:
    metadata = dict(help=help, low=low, high=high, choices=choices)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Recipe:
    """Everything that decides a run. The fields are the keys of a YAML recipe and the options of the script.

    Raises:
        RecipeError: A value has the wrong type or lies outside its range.
    """
    # data
    data: str = _value('digits', "'digits' (scikit-learn's handwritten digits), or a folder of class-named folders of"
                                 " images, or one that holds two of those, train and val")
    val_fraction: float = _value(0.25, 'part of each class to hold out, where the data has no part of its own for it',
                                 low=0.01, high=0.99)
    val_seed: int = _value(0, 'seed that draws the held-out part; the same for runs that are to be compared')
    limit: int = _value(0, 'use at most this many images of each class, 0 for all', low=0)
    workers: int = _value(0, 'processes that load images, 0 for none beside the main one', low=0)

    # model
    model: str = _value('test_elsa_swin', "timm's name of the model; local-dir:FOLDER for one saved by a former run")
    model_args: Dict[str, Any] = _value({}, 'further arguments of the model: img_size, kernel_size, ...')
    pretrained: bool = _value(False, "start from the model's weights instead of random ones")
    checkpoint: Optional[str] = _value(None, 'start from the weights in this file; a classifier of other classes is'
                                             ' left out')

    # images: None takes the model's own value
    crop_pct: Optional[float] = _value(None, 'part of the resized image that is kept in evaluation', low=0.01)
    interpolation: Optional[str] = _value(None, 'bilinear, bicubic, lanczos or nearest',
                                          choices=('bilinear', 'bicubic', 'lanczos', 'nearest'))
    mean: Optional[Tuple[float, ...]] = _value(None, 'mean of each channel, of values between 0 and 1')
    std: Optional[Tuple[float, ...]] = _value(None, 'standard deviation of each channel')

    # augmentation
    train_crop_mode: str = _value('rrc', 'rrc: random resized crop; rkrc, rkrr: resize by a random ratio, then crop or'
                                         ' pad in the centre or at random', choices=('rrc', 'rkrc', 'rkrr'))
    scale: Tuple[float, float] = _value((0.08, 1.), 'range of the crop, as a part of the area', low=0.)
    ratio: Tuple[float, float] = _value((3. / 4., 4. / 3.), 'range of the aspect ratio of the crop', low=0.01)
    hflip: float = _value(0.5, 'probability of a horizontal flip', low=0., high=1.)
    vflip: float = _value(0., 'probability of a vertical flip', low=0., high=1.)
    color_jitter: float = _value(0.4, 'strength of brightness, contrast and saturation jitter', low=0.)
    auto_augment: Optional[str] = _value(None, "timm's specification, such as rand-m9-mstd0.5-inc1")
    re_prob: float = _value(0., 'probability of random erasing', low=0., high=1.)

    # training
    epochs: int = _value(30, 'passes over the training images', low=1)
    batch_size: int = _value(64, 'images in each step', low=1)
    loss: str = _value('ce', 'ce: cross-entropy; bce: binary cross-entropy; poly', choices=('ce', 'bce', 'poly'))
    smoothing: float = _value(0.1, 'label smoothing', low=0., high=1.)
    opt: str = _value('adamw', "timm's name of the optimiser")
    opt_args: Dict[str, Any] = _value({}, 'further arguments of the optimiser')
    lr: float = _value(1e-3, 'learning rate after warmup', low=0.)
    weight_decay: float = _value(0.05, 'weight decay', low=0.)
    layer_decay: Optional[float] = _value(None, 'factor of the learning rate from each layer to the one below', low=0.)
    clip_grad: Optional[float] = _value(None, 'largest norm of the gradient', low=0.)
    sched: str = _value('cosine', "timm's name of the learning rate schedule",
                        choices=('cosine', 'tanh', 'poly', 'wsd', 'rsqrt', 'constant', 'none'))
    warmup_epochs: float = _value(2., 'epochs of linear warmup, at most half of all', low=0.)
    warmup_lr: float = _value(1e-6, 'learning rate at the start of warmup', low=0.)
    min_lr: float = _value(0., 'learning rate at the end', low=0.)
    device: str = _value('auto', 'cpu, cuda, mps, ...; auto takes cuda where there is one, else cpu')
    seed: int = _value(42, 'seed of initialisation, augmentation and order', low=0)

    # output
    output: str = _value('output', 'folder in which the run gets one of its own')
    name: str = _value('', 'name of that folder; that of the data if empty')
    figures: bool = _value(True, 'draw the predictions and the attention')
    onnx: bool = _value(True, 'export to ONNX and check it in ONNX Runtime')

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(field.name, getattr(self, field.name), hints[field.name])
            _check(field, value)
            setattr(self, field.name, value)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        return self.name or Path(self.data).resolve().name or 'run'

    def to_yaml(self) -> str:
        """The recipe as YAML, in the order of the fields, with every value spelled out."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: Optional[Union[str, Path]] = None, overrides: Optional[Dict[str, Any]] = None) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: File to read; None takes the default of every value.
        overrides: Values that go before those of the file. Entries of a mapping are added to the file's.

    Raises:
        RecipeError: The file cannot be read, has an unknown key or a value of the wrong type, or an override has.
    """
    values = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise RecipeError(f'{path}: cannot be read as a recipe. {e}') from e
        if not isinstance(values, dict):
            raise RecipeError(f'{path}: holds a {type(values).__name__}, must be a mapping of keys to values.')
        try:
            _check_keys(values)
            Recipe(**values)
        except RecipeError as e:
            raise RecipeError(f'{path}: {e}') from None
    overrides = dict(overrides or {})
    _check_keys(overrides)
    for key, value in overrides.items():
        if isinstance(value, dict) and values.get(key):
            overrides[key] = {**values[key], **value}
    return Recipe(**{**values, **overrides})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser one option for each value of a recipe.

    Options that are not used leave no attribute behind, so that `vars` of the result are the overrides of
    `load_recipe`.

    Args:
        parser: Parser to extend.
    """
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        hint = hints[field.name]
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=field.metadata['help'].replace('%', '%%'))
        kind = _without_none(hint)
        if kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(kind) is dict:
            options.update(nargs='+', metavar='KEY=VALUE', action=_Mapping)
        elif get_origin(kind) is tuple:
            options.update(nargs='+', metavar='X')
        elif field.metadata['choices']:
            options.update(choices=field.metadata['choices'])
        else:
            options.update(metavar={str: 'TEXT', int: 'N', float: 'X'}[kind])
        if kind in (int, float) or kind is not hint and kind is not str:
            options.update(type=_read)  # typed as in a file, so that null means none there as here
        parser.add_argument('--' + field.name.replace('_', '-'), **options)


def _read(text: str) -> Any:
    return yaml.safe_load(text)


class _Mapping(argparse.Action):
    """Collects KEY=VALUE, the values being YAML, over all uses of the option."""

    def __call__(self, parser, namespace, values, option_string=None):
        mapping = dict(getattr(namespace, self.dest, {}))
        for entry in values:
            key, equals, text = entry.partition('=')
            if not key or not equals:
                raise argparse.ArgumentError(self, f'got {entry!r}, must be KEY=VALUE.')
            mapping[key] = _read(text)
        setattr(namespace, self.dest, mapping)


def _check_keys(values: Dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(Recipe)]
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
        expected = f'a list of {f"{size} numbers" if size else "numbers"}'
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return dict(value)
        expected = 'a mapping of names to values'
    elif hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text, and 1.0e-3 as a number
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        expected = 'a number'
    else:
        if type(value) is hint:
            return value
        expected = {int: 'a whole number', bool: 'true or false', str: 'text'}[hint]
    raise RecipeError(f'{name}: got {value!r} of type {type(value).__name__}, must be {expected}.')


def _check(field: dataclasses.Field, value: Any) -> None:
    low, high, choices = (field.metadata[k] for k in ('low', 'high', 'choices'))
    for v in value if isinstance(value, tuple) else (value,):
        if isinstance(v, (int, float)) and not isinstance(v, bool) and not low <= v <= high:
            raise RecipeError(f'{field.name}: got {v}, must be a number from {low:g} to {high:g}.')
        if choices and v is not None and v not in choices:
            raise RecipeError(f'{field.name}: got {v!r}, must be one of {", ".join(choices)}.')
