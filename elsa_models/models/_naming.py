"""One way to name a model, wherever one may be named."""
import difflib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Union

import timm
import torch.nn as nn

from ._checkpoint import WeightsError, explain_download, reaching_hub, read_checkpoint
from ._family import families

_HUB = ('hf-hub:', 'hf_hub:')
_CONFIG, _RECIPE, _CHECKPOINTS = 'config.json', 'recipe.yaml', 'checkpoints'
_PREPARATION = ('crop_pct', 'interpolation', 'mean', 'std')
HELP = 'name of timm, hf-hub:OWNER/NAME, local-dir:FOLDER, or the path of a run, a saved folder or a checkpoint'


class ModelError(ValueError):
    """A model that cannot be had or used, with the name of the value at fault."""


class ModelSource(NamedTuple):
    """Where a model and its weights are."""
    name: Optional[str]  # as `timm.create_model` takes it, None for an ONNX file
    path: Optional[Path] = None  # of the folder or file that was named; it comes with its weights
    model_args: Dict[str, Any] = {}  # those that a run's recipe gives
    checkpoint: Optional[Path] = None  # weights that are not beside the model's config
    run: Optional[Path] = None  # folder of the run that it is from, if it is
    preparation: Dict[str, Any] = {}  # of images, as that recipe gives it

    @property
    def is_onnx(self) -> bool:
        """Whether it is an ONNX file."""
        return self.name is None


def find_model(name: Union[str, Path]) -> ModelSource:
    """What a name stands for.

    Args:
        name: A name that timm knows, with or without a tag; `hf-hub:OWNER/NAME`; `local-dir:FOLDER`; an ONNX file; or
            the path of a run's folder, finished or not, of its folder `model`, or of one of its checkpoints.

    Raises:
        ModelError: It stands for nothing; names those that are near.
    """
    text = str(name)
    if text.startswith(_HUB) or timm.is_model(text.partition('.')[0]):
        return ModelSource(text)
    path = Path(text.partition(':')[2] if text.startswith('local-dir:') else text)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _in_file(path)
    if '/' in text or ':' in text:
        raise ModelError(f'model: got {text!r}, no such file or folder.')
    near = near_names(text)
    if path.suffix and not near:
        raise ModelError(f'model: got {text!r}, no such file or folder.')
    raise ModelError(f'model: got {text!r}, must be a {HELP}.{near}')


def near_names(text: str) -> str:
    """A sentence with the names of models that are like a word, with a blank before it; empty if none are."""
    name, models = text.partition('.')[0], timm.list_models()
    own = [n for family in families() for n in family.model_names]
    # our own first: among timm's thousand, something is like any word
    near = difflib.get_close_matches(name, own, n=4, cutoff=0.7)
    near += [n for n in difflib.get_close_matches(name, models, n=4, cutoff=0.7) if n not in near]
    return f' Near are {", ".join(near[:4])}.' if near else ''


def _in_folder(path: Path) -> ModelSource:
    for folder in (path, path / 'model'):
        if (folder / _CONFIG).is_file():
            return _saved(folder, path)
    checkpoints = path / _CHECKPOINTS
    files = [*checkpoints.glob('best.pt'), *sorted(checkpoints.glob('step-*.pt'), reverse=True)]
    if files:
        return _in_file(files[0])._replace(path=path)
    raise ModelError(f'model: got {str(path)!r}, which holds no {_CONFIG}, nor does its sub-folder model.')


def _saved(folder: Path, path: Path) -> ModelSource:
    """What a saved folder holds, of which `path` is the name."""
    try:
        task = json.loads((folder / _CONFIG).read_text(encoding='utf-8')).get('task')
    except (OSError, ValueError, AttributeError, RecursionError):  # timm's loading says what is wrong
        task = None
    if task is not None:
        raise ModelError(
            f'model: got {str(path)!r}, a model for {task!r}, must be a classifier. Detectors are for elsa detect,'
            f' segmenters for elsa segment.')
    return ModelSource(
        f'local-dir:{folder}', path, run=folder.parent if (folder.parent / _RECIPE).is_file() else None)


def _in_file(path: Path) -> ModelSource:
    if path.suffix == '.onnx':
        return ModelSource(None, path, run=path.parent if (path.parent / _RECIPE).is_file() else None)
    run = path.parent.parent
    if path.parent.name == _CHECKPOINTS and (run / _RECIPE).is_file():
        if (run / 'model' / _CONFIG).is_file():  # which says more: names of classes, for one
            return _saved(run / 'model', path)._replace(checkpoint=path)
        recipe = _read_recipe(run / _RECIPE)
        return find_model(recipe['model'])._replace(
            path=path, model_args=recipe['model_args'], checkpoint=path, run=run,
            preparation={k: recipe[k] for k in _PREPARATION if recipe.get(k) is not None})
    if path.name == 'model.safetensors' and (path.parent / _CONFIG).is_file():
        return _in_folder(path.parent)
    raise ModelError(
        f'model: got {str(path)!r}, a file beside which nothing says what model it is of. Name the model, and give the'
        f' file as checkpoint.')


def _read_recipe(file: Path) -> Dict[str, Any]:
    import yaml
    try:
        recipe = yaml.safe_load(file.read_text(encoding='utf-8'))
        if isinstance(recipe['model'], str) and isinstance(recipe['model_args'], dict):
            return recipe
        reason = 'model or model_args is of another type'
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError) as e:
        reason = f'{type(e).__name__}: {e}'
    raise ModelError(f'model: {str(file)!r} does not say what model the run trains ({reason}).')


def create_named(
        name: Union[str, Path],
        pretrained: bool = False,
        checkpoint: Optional[Union[str, Path]] = None,
        num_classes: Optional[int] = None,
        keep_classifier: bool = False,
        **model_args: Any,
) -> nn.Module:
    """`timm.create_model` for whatever `find_model` takes.

    Args:
        name: Which model. A path comes with its weights.
        pretrained: Take the weights that the name stands for.
        checkpoint: Take the weights in this file instead.
        num_classes: Number of classes, None for the model's own.
        keep_classifier: Require a checkpoint to have a classifier of `num_classes`; otherwise one of others is left
            out.
        model_args: Further arguments of the model.

    Raises:
        ModelError: There is no such model or file, or it does not take the arguments.
        WeightsError: The weights cannot be had, or do not fit.
    """
    source = find_model(name)
    if source.name is None:
        raise ModelError(f'model: got {str(name)!r}, an ONNX file, which cannot be changed or trained.')
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ModelError(f'checkpoint: got {str(checkpoint)!r}, no such file.')
    file = checkpoint or source.checkpoint
    model_args = {**source.model_args, **model_args}
    if source.checkpoint is not None and num_classes is None:
        num_classes = _num_classes(source.name, source.model_args, source.checkpoint)
    overlay: Optional[Dict[str, Any]] = None
    if file is not None:
        overlay = dict(source.preparation, file=str(file))
        if num_classes is not None and (keep_classifier or checkpoint is None):
            overlay.update(num_classes=num_classes)  # those of the file, or timm leaves its classifier out
    by_name = source.name.startswith(_HUB) or pretrained and file is None and source.path is None
    try:
        with reaching_hub() if by_name else nullcontext():
            return timm.create_model(
                source.name,
                pretrained=pretrained or overlay is not None or source.path is not None,
                pretrained_cfg_overlay=overlay,
                num_classes=num_classes,
                **model_args,
            )
    except WeightsError:
        raise
    except (TypeError, ValueError, RuntimeError, FileNotFoundError, AttributeError, LookupError, AssertionError) as e:
        reason = str(e) or f'timm refuses it ({type(e).__name__}).'
        raise ModelError(f'model: {str(name)!r} with model_args {model_args} is not possible. {reason}') from e
    except Exception as e:  # of httpx2, of huggingface_hub
        raise WeightsError(f'{str(name)!r} could not be had. {explain_download(e)}'.rstrip('.') + '.') from e


def _num_classes(name: str, model_args: Dict[str, Any], checkpoint: Path) -> Optional[int]:
    """Classes of the checkpoint of a run."""
    default_cfg: Any = timm.create_model(name, device='meta', **model_args).default_cfg
    classifier = default_cfg.get('classifier', ())
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    weight = read_checkpoint(checkpoint).get(f'{classifier}.weight')
    return None if weight is None else len(weight)
