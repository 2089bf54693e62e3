"""Reading checkpoint files, and building a model around one."""
import dataclasses
import math
import pickle
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, Optional, Sequence, Tuple, Type, TypeVar, Union

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed_nhwc, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import PretrainedCfg, build_model_with_cfg, clean_state_dict, load_state_dict
from timm.models._builder import resolve_pretrained_cfg

from ..layers.arguments import pair, whole_number
from ._family import Family, arguments_of, family_by_file, family_of

ModelT = TypeVar('ModelT', bound=nn.Module)

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')  # in a folder or repository, the first that exists
_CONFIG_SOURCES = ('hf-hub', 'local-dir')  # of cfgs that timm read from a config.json
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MAX_CONFIG_INT = 16384  # no size of a model is larger, and what a config.json asks for has to be built
_MAX_CONFIG_DEPTH = 1024  # blocks of a model, all stages together
_DEPTHS = ('depth', 'depths', 'layers', 'num_class_blocks')  # arguments that are numbers of blocks
_SNIFFED = 512  # bytes
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # all that timm knows in evaluation
CROP_MODES = ('center', 'squash', 'border')  # all that timm knows
_MAX_NAMES = 12  # listed in one message
_MAX_CHARS = 100
_WINDOW_TABLES = tuple([f'.relative_{what}_table' for what in ('position_bias', 'key', 'query')])  # by offset
_WRAPPERS = ('state_dict', 'model', 'net')  # where training checkpoints keep their weights


class WeightsError(RuntimeError):
    """Weights that cannot be found, are damaged, or do not fit the model."""


# from a cfg and a folder for the cache to a file of weights, or None if it names none that has to be found
WeightsFinder = Callable[[PretrainedCfg, Optional[Union[str, Path]]], Optional[Path]]
_find_weights: Optional[WeightsFinder] = None
_explain: Optional[Callable[[BaseException], WeightsError]] = None
_reach: Optional[Callable[[], ContextManager[None]]] = None


def set_weights_finder(
        finder: WeightsFinder,
        explain: Callable[[BaseException], WeightsError],
        reach: Callable[[], ContextManager[None]],
) -> None:
    """Let `build_model` ask `finder` for weights that are neither in memory nor in a file.

    Models know nothing of downloads; `elsa_models.hub` does, imports models, and names itself here.

    Args:
        finder: Raises `WeightsError` for weights that it should find and cannot.
        explain: Makes a `WeightsError` of whatever a failed download raises.
        reach: Surrounds downloads by timm and huggingface_hub.
    """
    global _find_weights, _explain, _reach
    _find_weights, _explain, _reach = finder, explain, reach


def explain_download(error: BaseException) -> WeightsError:
    """What went wrong in a download and what helps, in one line."""
    return WeightsError(f'{type(error).__name__}: {error}') if _explain is None else _explain(error)


def reaching_hub() -> ContextManager[None]:
    """What surrounds downloads by timm and huggingface_hub, so that they fail at once without a network."""
    return nullcontext() if _reach is None else _reach()


def read_checkpoint(path: Union[str, Path], use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """Read the weights in a checkpoint file, safetensors or pickle, without running any code it may hold.

    Training checkpoints are unwrapped and the prefixes of DistributedDataParallel and torch.compile removed.

    Args:
        path: File to read.
        use_ema: Take the averaged weights where the checkpoint has them.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is damaged, of PaddlePaddle, holds objects other than plain data and tensors, or holds no
            weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {str(path)!r}: no such file.')
    if path.suffix == '.pdparams':
        raise WeightsError(
            f'checkpoint {str(path)!r}: is a file of PaddlePaddle, which is not read here. Where that is installed, '
            f'write what paddle.load returns with torch.save, as a dict of tensors, after transposing the weights of '
            f'linear layers.')
    with open(path, 'rb') as f:
        start = f.read(_SNIFFED).lstrip().lower()
    if start.startswith((b'<!doctype html', b'<html')):
        raise WeightsError(
            f'checkpoint {str(path)!r}: is a web page and no checkpoint. A download that needs a confirmation or a '
            f'login, as of large files from Google Drive, leaves such a page: download the file itself in a browser.')
    try:
        state_dict = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
    except Exception as e:  # damaged files raise errors of many types
        raise WeightsError(f'checkpoint {str(path)!r}: {_why_unreadable(path, e)}') from None
    if isinstance(state_dict.get('net'), dict):  # a wrapper that timm does not know
        state_dict = unwrap(state_dict)
    if not state_dict or not all(isinstance(x, torch.Tensor) for x in state_dict.values()):
        strange = [k for k, x in state_dict.items() if not isinstance(x, torch.Tensor)]
        raise WeightsError(
            f'checkpoint {str(path)!r}: holds no state dict of tensors'
            f' ({"not tensors: " + ", ".join(map(str, strange)) if strange else "it is empty"}).')
    return state_dict


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file, without torch's advice to load it unsafely."""
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of files that are no archives of torch's
        objects = []
    if objects:
        return (
            f'holds objects of {_in_short(objects)} besides tensors and plain data. They are not loaded, for they '
            f'could run code; where you trust the file, save its state dict alone and load that.')
    words = str(error).splitlines()[0][:_MAX_CHARS] if str(error) else ''
    if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
        words = 'not a pickle of tensors and plain data'
    return (
        f'cannot be read ({type(error).__name__}: {words}). Is the download complete, and is it a PyTorch or '
        f'safetensors checkpoint of weights?')


def unwrap(state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """The weights of a state dict, or of a training checkpoint around one, without wrapper prefixes."""
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    return clean_state_dict(state_dict)


def fit_positions(name: str, x: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Resample a patch embedding, position embedding or relative position table to the sizes of the model.

    Args:
        name: Name of the entry in the model.
        x: The entry, of any size.
        model: The model that is to be loaded.

    Returns:
        The entry in the model's size, or as it was if it is of another kind, unknown, or differs in more than size.
    """
    if name not in ('patch_embed.proj.weight', 'pos_embed') and not name.endswith(_WINDOW_TABLES):
        return x
    target = model.state_dict().get(name)
    if target is None or x.dim() != target.dim():
        return x
    if name == 'patch_embed.proj.weight':
        if x.shape[:2] == target.shape[:2] and x.shape != target.shape:
            return resample_patch_embed(x, list(target.shape[-2:]), verbose=True)
    elif name == 'pos_embed' and x.dim() == 4:
        if x.shape[-1] == target.shape[-1]:
            return resample_abs_pos_embed_nhwc(x, list(target.shape[1:3]), verbose=True)
    elif name.endswith(_WINDOW_TABLES):
        window_size = getattr(model.get_submodule(name.rpartition('.')[0]), 'window_size', None)
        if window_size is None:  # of a neighbourhood
            return x
        # tables of windows that are no squares can differ at equal shape
        if x.shape[1] == target.shape[1] and (x.shape != target.shape or window_size[0] != window_size[1]):
            return resize_rel_pos_bias_table(x, window_size, target.shape)
    return x


def check_keys(state_dict: Dict[str, Any], model: nn.Module, optional: Union[str, Tuple[str, ...]]) -> None:
    """Require that a state dict has the model's entries and no others.

    Args:
        state_dict: Entries in the model's names.
        model: The model to be loaded.
        optional: Prefixes of entries that may be missing or unknown (the classifiers).

    Raises:
        WeightsError: Names the missing and the unknown entries, by module where there are many.
    """
    expected = model.state_dict().keys()
    missing = [k for k in expected if k not in state_dict and not k.startswith(optional)]
    unknown = [k for k in state_dict if k not in expected and not k.startswith(optional)]
    if missing or unknown:
        shared = sum(k in state_dict for k in expected)
        raise WeightsError(
            f'checkpoint does not fit {type(model).__name__}: it has {shared} of the {len(expected)} entries, and '
            f'{len(unknown)} others.'
            f' Missing ({len(missing)}): {_in_short(missing) or "none"}.'
            f' Unknown ({len(unknown)}): {_in_short(unknown) or "none"}.')


def filter_of(family: Family) -> Callable[[Dict[str, Any], nn.Module], Dict[str, torch.Tensor]]:
    """The function that fits checkpoints to models of a family: its own, or else one that suits most.

    The latter gives entries the models' names, resamples patch embedding and positions, and requires all entries but
    those of the classifiers.
    """
    def fit(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
        out = {k: fit_positions(k, x, model) for k, x in family.to_own_names(unwrap(state_dict)).items()}
        check_keys(out, model, optional=tuple([f'{c}.' for c in family.classifiers]))
        return out

    return family.filter_fn or fit


def _in_short(names: Sequence[str]) -> str:
    """A few names, or the modules that hold them with the number in each."""
    depth = max((name.count('.') for name in names), default=0)
    groups = {name: 0 for name in names}
    while len(groups) > _MAX_NAMES and depth > 0:
        groups = Counter('.'.join(name.split('.')[:depth]) for name in names)
        depth -= 1
    words = [f'{name} ({n})' if n > 1 else name for name, n in groups.items()]
    more = [f'and {len(words) - _MAX_NAMES} more'] if len(words) > _MAX_NAMES else []
    return ', '.join([w[:_MAX_CHARS] for w in words[:_MAX_NAMES]] + more)


def is_finite(x: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no inf; one on the meta device holds nothing."""
    return not x.is_floating_point() or x.is_meta or bool(x.isfinite().all())


def fit_weights(
        state_dict: Dict[str, Any],
        model: nn.Module,
        filter_fn: Optional[Callable],
        free: Tuple[str, ...] = (),
) -> Dict[str, torch.Tensor]:
    """A state dict in the names and shapes of the model, before any of it is copied.

    Args:
        state_dict: What a checkpoint file holds.
        model: The model to be loaded, unchanged; it may be on the meta device.
        filter_fn: Fits a checkpoint to the model.
        free: Names of entries whose shapes the caller sees to.

    Raises:
        WeightsError: Entries are missing, unknown, of another shape or kind of number, no plain tensors, or not finite.
    """
    try:
        out = filter_fn(state_dict, model) if filter_fn is not None else dict(state_dict)
    except WeightsError:
        raise
    except Exception as e:  # entries of the right names can be of any shape
        raise WeightsError(f'checkpoint does not fit {type(model).__name__} ({type(e).__name__}: {e}).') from e
    wrong = []
    for name, target in model.state_dict().items():
        x = out.get(name)
        if x is None:
            if name not in free:
                wrong.append(f'{name} is missing')
        elif x.layout != torch.strided or x.device.type != 'cpu' or x.dtype not in (
                _DTYPES if target.is_floating_point() else (target.dtype,)):
            wrong.append(f'{name} is {str(x.dtype)[6:]}, {str(x.layout)[6:]}, on {x.device.type}')
        elif x.shape != target.shape and name not in free:
            wrong.append(f'{name} has shape {tuple(x.shape)} instead of {tuple(target.shape)}')
        elif not is_finite(x):
            wrong.append(f'{name} holds NaN or inf')
    known = {*model.state_dict(), *free}
    wrong += [f'{name} is unknown' for name in out if name not in known]
    if wrong:
        more = [f'and {len(wrong) - _MAX_NAMES} more'] if len(wrong) > _MAX_NAMES else []
        raise WeightsError(
            f'checkpoint does not fit {type(model).__name__}: {"; ".join([*wrong[:_MAX_NAMES], *more])}.')
    return out


def _classifiers(cfg: PretrainedCfg) -> Tuple[str, ...]:
    return (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ())


def _free_entries(model: nn.Module, cfg: PretrainedCfg, features: bool) -> Tuple[str, ...]:
    """Entries that timm drops or adapts itself: classifiers for other classes, a stem for other image channels."""
    free = []
    if features or model.num_classes != cfg.num_classes:
        free += [f'{c}.{leaf}' for c in _classifiers(cfg) for leaf in ('weight', 'bias')]
    if cfg.first_conv and model.in_chans != cfg.input_size[0]:
        free.append(f'{cfg.first_conv}.weight')
    return tuple(free)


@contextmanager
def _blaming_config(variant: str, source: Optional[str]) -> Iterator[None]:
    """Turn errors of whatever type that a config.json leads to into a `WeightsError`; source is that of its cfg."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as e:
        if source not in _CONFIG_SOURCES:
            raise
        raise WeightsError(
            f'{variant}: cannot be built from its config.json and the arguments given '
            f'({type(e).__name__}: {e}).') from e


def _check_config(model_cls: Type[nn.Module], model_args: Dict[str, Any], cfg: PretrainedCfg) -> None:
    """Require that what a config.json asks for are sizes and switches of the model.

    Raises:
        WeightsError: An argument is unknown to the class, or no number, word or list of such, or a size is huge.
    """
    def plain(x: Any) -> bool:
        if isinstance(x, (list, tuple)):
            return len(x) <= 64 and all(map(plain, x))
        return x is None or isinstance(x, (bool, str)) or isinstance(x, (int, float)) and abs(x) <= _MAX_CONFIG_INT

    known = arguments_of(model_cls) - {'device', 'dtype'}
    for name, value in [*model_args.items(), ('img_size', cfg.input_size), ('num_classes', cfg.num_classes)]:
        if name not in known or name.endswith('_layer'):
            raise WeightsError(
                f'config.json: model_args names {name!r}, must be one of {", ".join(sorted(known))}.')
        if not plain(value):
            raise WeightsError(
                f'config.json: has {name} = {str(value)[:80]!r}, must be a number of at most '
                f'{_MAX_CONFIG_INT}, a word, or a short list of such.')
        if name in _DEPTHS:
            numbers = value if isinstance(value, (list, tuple)) else [value]
            depth = sum(n for n in numbers if isinstance(n, (int, float)))
            if depth > _MAX_CONFIG_DEPTH:
                raise WeightsError(f'config.json: has {name} = {value}, must be {_MAX_CONFIG_DEPTH} blocks at most.')
    _check_images_of(cfg)
    if model_args.get('num_classes', cfg.num_classes) != cfg.num_classes:
        raise WeightsError(
            f'config.json: has num_classes = {cfg.num_classes}, but {model_args["num_classes"]} in model_args.')


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_names(x: Any) -> bool:
    names = [*x.keys(), *x.values()] if isinstance(x, dict) else x
    return isinstance(names, (list, tuple)) and all(isinstance(n, (str, int)) for n in names)


def _check_images_of(cfg: PretrainedCfg) -> None:
    """Require that what a config.json says of images and classes can be used.

    Raises:
        WeightsError: A field is of another type, or is no size, no mean or no standard deviation.
    """
    def numbers(x: Any, above: float) -> bool:
        return isinstance(x, (list, tuple)) and len(x) > 0 and all(_is_number(n) and n > above for n in x)

    def is_size(x: Any) -> bool:
        return numbers(x, 0) and len(x) == 3 and all(isinstance(n, int) and n <= _MAX_CONFIG_INT for n in x)

    channels = {1, 3, cfg.input_size[0] if is_size(cfg.input_size) else 3}  # grey images may keep the colours' values
    rules = dict(
        num_classes=(lambda x: isinstance(x, int) and x >= 0, 'a whole number of classes'),
        input_size=(is_size, 'channels, height and width'),
        test_input_size=(is_size, 'channels, height and width'),
        mean=(lambda x: numbers(x, -math.inf) and len(x) in channels, 'a number for each channel'),
        std=(lambda x: numbers(x, 0) and len(x) in channels, 'a positive number for each channel'),
        crop_pct=(lambda x: _is_number(x) and x > 0, 'a positive number'),
        test_crop_pct=(lambda x: _is_number(x) and x > 0, 'a positive number'),
        interpolation=(lambda x: x in _INTERPOLATIONS, f'one of {", ".join(_INTERPOLATIONS)}'),
        crop_mode=(lambda x: x in CROP_MODES, f'one of {", ".join(CROP_MODES)}'),
        first_conv=(lambda x: isinstance(x, str), 'the name of a module'),
        classifier=(lambda x: isinstance(x, str) or _is_names(x), 'names of modules'),
        label_names=(_is_names, 'names'),
        label_descriptions=(_is_names, 'names'),
    )
    for name, (is_right, what) in rules.items():
        value = getattr(cfg, name, None)
        if value is not None and not is_right(value):
            raise WeightsError(f'config.json: has {name} = {str(value)[:_MAX_CHARS]!r}, must be {what}.')


def _check_classes(weights: Dict[str, Any], cfg: PretrainedCfg) -> None:
    """Require that classifiers, where a file has any, are for as many classes as its config.json says.

    Raises:
        WeightsError: One is not. timm would leave it out without a word, and the model at random.
    """
    for name in _classifiers(cfg):
        x = weights.get(f'{name}.weight')
        if x is not None and len(x) != cfg.num_classes:
            raise WeightsError(
                f'config.json: has num_classes = {cfg.num_classes}, but {name}.weight in the weights is for {len(x)}.')


def _read_weights(
        variant: str,
        cfg: PretrainedCfg,
        use_ema: bool,
        cache_dir: Optional[Union[str, Path]],
        relative: Optional[str],
) -> Optional[Dict[str, Any]]:
    """The weights that a cfg stands for, or None where they are timm's to download (a plain url)."""
    if cfg.source == 'local-dir':
        assert cfg.file is not None  # where timm puts the folder
        paths = [Path(cfg.file, name) for name in WEIGHT_FILES]
        return read_checkpoint(next((p for p in paths if p.is_file()), paths[0]))
    if cfg.source != 'hf-hub':
        if cfg.state_dict:
            return cfg.state_dict
        if cfg.file:
            return read_checkpoint(cfg.file, use_ema)
        if not cfg.has_weights:
            advice = 'Use pretrained=False'
            if relative is not None:
                advice += f' and copy what it shares with {relative}: elsa_models.warm_start(model, {relative!r})'
            raise WeightsError(
                f'{variant}: pretrained=True, but no weights are known for this model, none were ever released. '
                f'{advice}.')
    path = _find_weights(cfg, cache_dir) if _find_weights is not None else None
    return None if path is None else read_checkpoint(path)


def build_model(
        model_cls: Type[ModelT],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Optional[Union[str, Dict[str, Any]]] = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs,
) -> ModelT:
    """timm's `build_model_with_cfg`, with weights found by `set_weights_finder`'s and read by `read_checkpoint`.

    Args:
        model_cls: Class of the model.
        variant: Name of the entry point.
        pretrained: Load weights.
        pretrained_cfg: As in `timm.create_model`.
        pretrained_cfg_overlay: As in `timm.create_model`; `use_ema=False` beside `file` passes over averaged weights.
        **kwargs: Further arguments of `build_model_with_cfg` and of the model.

    Raises:
        WeightsError: Weights are asked for but none are known or can be found, or those found do not fit.
    """
    family = family_by_file(variant) or family_of(model_cls)
    filter_fn = None if family is None else filter_of(family)
    relative = None if family is None else family.relatives.get(variant)
    overlay = dict(pretrained_cfg_overlay or {})
    use_ema = overlay.pop('use_ema', True)
    source = pretrained_cfg.get('source') if isinstance(pretrained_cfg, dict) else None
    with _blaming_config(variant, source):
        if (size := kwargs.get('img_size')) is not None:  # timm reads it before the model does
            kwargs['img_size'] = (pair if isinstance(size, (list, tuple)) else whole_number)('img_size', size)
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        if source in _CONFIG_SOURCES:
            _check_config(model_cls, kwargs.get('pretrained_model_args') or {}, cfg)
        cache_dir, features = kwargs.get('cache_dir'), kwargs.get('features_only', False)
        own = not overlay.get('file') and not overlay.get('state_dict')  # no others are named
        found = cfg if own else dataclasses.replace(cfg, source=None)
        weights = _read_weights(variant, found, use_ema, cache_dir, relative) if pretrained else None
        if weights is None:
            return _build(model_cls, variant, pretrained, cfg, filter_fn, **kwargs)
        if source in _CONFIG_SOURCES and own:
            _check_classes(weights, cfg)

        def fit(_: Optional[Dict[str, Any]], model: nn.Module) -> Dict[str, torch.Tensor]:
            return fit_weights(weights, model, filter_fn, _free_entries(model, cfg, features))

        def construct(**model_kwargs) -> ModelT:
            if source in _CONFIG_SOURCES:
                fit(None, model_cls(**{**model_kwargs, 'device': 'meta'}))  # before any memory is taken
            return model_cls(**model_kwargs)

        # the weights reach the model through the filter: a cfg is copied together with what it holds
        in_memory = dataclasses.replace(cfg, state_dict={'weights': None}, source=None)
        model = _build(construct, variant, True, in_memory, fit, **kwargs)
    model_cfg: Any = model.pretrained_cfg  # and default_cfg, the same dict
    model_cfg.pop('state_dict')
    if cfg.source is not None:
        model_cfg['source'] = cfg.source
    return model


def _build(
        model_cls: Callable[..., ModelT],
        variant: str,
        pretrained: bool,
        cfg: PretrainedCfg,
        filter_fn: Optional[Callable],
        **kwargs,
) -> ModelT:
    # a registered model passes its tag as a string, an already resolved cfg as a dict of its fields
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg={f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)},
        pretrained_filter_fn=filter_fn,
        **kwargs,
    )
