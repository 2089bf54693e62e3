"""One run: data, model, training, and everything that is kept of it."""
import logging
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import timm
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.models import save_for_hf
from timm.utils import random_seed

from .._extras import require
from .._files import check_replaceable, replace_folder
from ..export import export_onnx
from ..layers import ElsaAttention
from ..models._checkpoint import read_checkpoint, unwrap
from ..models.elsa_swin import is_authors
from .config import Recipe, RecipeError
from .data import create_loaders, load_splits
from .loop import fit, predict

_logger = logging.getLogger(__name__)

# all that a run writes, and so all that the next run of this name may replace
MODEL, ONNX, PREDICTIONS, ATTENTION, LOG, RECIPE = (
    'model', 'model.onnx', 'predictions.png', 'attention.png', 'log.csv', 'recipe.yaml')
_OUTPUTS = (MODEL, ONNX, PREDICTIONS, ATTENTION, LOG, RECIPE)


class Result(NamedTuple):
    """What a run has come to."""
    folder: Path
    files: List[Path]
    accuracy: float  # percent of the held-out images
    num_train: int
    num_val: int
    class_names: List[str]
    num_parameters: int


def run(recipe: Recipe) -> Result:
    """Train as a recipe says, and keep the model, its ONNX export, figures and a log.

    All is written to a folder beside `output/name`, which takes that place at the very end: an earlier result stays as
    it was until then. A run that fails after the model has been saved leaves its folder and logs where it is.

    Args:
        recipe: Says everything.

    Returns:
        Where the results are, and the accuracy of the last epoch.

    Raises:
        RecipeError: A value of the recipe cannot be used.
        DataError: The data cannot be used.
        OutputError: The folder of the result holds other things.
        ImportError: A package is missing.
        RuntimeError: The loss is not finite, or a saved model differs from the trained one.
    """
    # whatever can fail for reasons outside this package fails before the training
    device = _device(recipe.device)
    folder = Path(recipe.output) / recipe.run_name
    check_replaceable(folder, _OUTPUTS)
    for name in ('tqdm', 'matplotlib') if recipe.figures else ('tqdm',):
        require(name)
    for name in ('onnx', 'onnxruntime', 'onnxscript') if recipe.onnx else ():
        require(name, 'onnx')

    random_seed(recipe.seed)
    splits = load_splits(recipe)
    model = create_model(recipe, len(splits.class_names)).to(device)
    data_config = _data_config(recipe, model)
    mode = {1: 'L', 3: 'RGB'}.get(data_config['input_size'][0])
    if mode is None:
        raise RecipeError(f'model_args: got {data_config["input_size"][0]} input channels, must be 1 (grey) or 3.')
    splits.train.mode = splits.val.mode = mode
    train_loader, val_loader = create_loaders(recipe, splits, data_config, device)
    _logger.info(
        '%s: %d images of %d classes to train on, %d held out', recipe.data, len(splits.train),
        len(splits.class_names), len(splits.val))
    num_parameters = sum(p.numel() for p in model.parameters())
    _logger.info(
        '%s: %.2f M parameters, images of %d x %d pixels, on %s', recipe.model, num_parameters / 1e6,
        *data_config['input_size'][1:], device)

    with replace_folder(folder, _OUTPUTS, keep=MODEL) as temporary:
        (temporary / RECIPE).write_text(recipe.to_yaml(), encoding='utf-8')
        task, metrics = fit(recipe, model, train_loader, val_loader, device, temporary / LOG)
        model.eval()
        save_model(model, temporary / MODEL, splits.class_names, data_config, keeps_licence(recipe))
        _logger.info('saved the model; loaded it again, logits are equal')
        if recipe.onnx:
            export_onnx(model, temporary / ONNX)
            _logger.info('exported the model to ONNX; ONNX Runtime agrees with it')
        if recipe.figures:
            from . import figures
            logits, _ = predict(task, val_loader)
            figures.draw_predictions(splits.val, logits, splits.class_names, temporary / PREDICTIONS)
            if any(isinstance(m, ElsaAttention) for m in model.modules()):
                figures.draw_attention(model, splits.val, logits, splits.class_names, temporary / ATTENTION)
        files = [folder / name for name in _OUTPUTS if (temporary / name).exists()]
    return Result(
        folder, files, metrics['top1'], len(splits.train), len(splits.val), splits.class_names, num_parameters)


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a recipe, with its first weights.

    Args:
        recipe: Says which.
        num_classes: Outputs of the classifier.

    Raises:
        RecipeError: timm does not know the model, it does not take `model_args`, or its weights are not there.
    """
    derived = {'num_classes', 'pretrained', 'checkpoint_path', 'features_only'} & recipe.model_args.keys()
    if derived:
        raise RecipeError(f'model_args: {min(derived)!r} is not to be given; it follows from the data and the recipe.')
    overlay: Optional[Dict[str, Any]] = None
    if recipe.checkpoint is not None:
        if not Path(recipe.checkpoint).is_file():
            raise RecipeError(f'checkpoint: got {recipe.checkpoint!r}, no such file.')
        overlay = dict(file=recipe.checkpoint)
    try:
        return timm.create_model(
            recipe.model,
            pretrained=recipe.pretrained or overlay is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            **recipe.model_args,
        )
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
        raise RecipeError(f'model: {recipe.model!r} with model_args {recipe.model_args} is not possible. {e}') from e


def keeps_licence(recipe: Recipe) -> bool:
    """Whether a run starts from the weights that the model's cfg describes: its own, or the authors' file."""
    if recipe.checkpoint is not None:
        return is_authors(unwrap(read_checkpoint(recipe.checkpoint)))
    return recipe.pretrained


def save_model(
        model: nn.Module,
        folder: Union[str, Path],
        class_names: List[str],
        data_config: Dict[str, Any],
        keep_licence: bool = False,
) -> None:
    """Save weights as safetensors beside timm's config.json, and see that they load to an equal model.

    Args:
        model: Model in evaluation mode.
        folder: Folder to create.
        class_names: Name of each output.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it.
        keep_licence: Whether the weights come from those of the model's cfg, whose licence is theirs then.

    Raises:
        RuntimeError: The model that was loaded again computes other logits.
    """
    origin = dict(tag=None, origin_url=None)  # these weights are the user's
    if not keep_licence:
        origin['license'] = None
    save_for_hf(
        model,
        str(folder),
        model_config=dict(label_names=list(class_names), pretrained_cfg=origin),
        safe_serialization=True,
        data_config=data_config,
    )
    device = next(model.parameters()).device
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device).eval()
    images = torch.randn(2, *data_config['input_size'], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f'{folder}: the saved model, loaded again, differs from the trained one.')


def _device(name: str) -> torch.device:
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise RecipeError(f'device: got {name!r}, which is not available here ({str(e).splitlines()[0]}).') from e
    return device


def _data_config(recipe: Recipe, model: nn.Module) -> Dict[str, Any]:
    names = ('crop_pct', 'interpolation', 'mean', 'std')
    try:
        return resolve_input_data_config(model, args={name: getattr(recipe, name) for name in names})
    except ValueError as e:
        raise RecipeError(str(e)) from e
