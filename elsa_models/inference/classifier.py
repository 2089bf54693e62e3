"""A trained classifier at work: from a name or a file, PyTorch or ONNX, to classes."""
import json
import logging
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_input_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Dataset

from .._extras import require
from .._images import DataError, denormalise, read_image
from ..models._checkpoint import CROP_MODES, WeightsError
from ..models._naming import ModelError, create_named, find_model

_logger = logging.getLogger(__name__)
_MAX_SIDE = 2 ** 15  # pixels
_MIN_CROP = 0.01  # smaller parts of an image take memory without bound to resize


class Classifier(NamedTuple):
    """A model and what it needs to be used."""
    logits: Callable[[torch.Tensor], torch.Tensor]  # of images (B, C, H, W), normalised, on `device`
    model: Optional[nn.Module]  # in evaluation mode; with an ONNX file it says how images are prepared, if it is given
    data_config: Dict[str, Any]  # as timm.data.resolve_data_config returns it
    label_names: Optional[List[str]]  # None where they are not known
    num_classes: int


def load_classifier(
        name: str,
        device: torch.device,
        images: Optional[Dict[str, Any]] = None,
        model_args: Optional[Dict[str, Any]] = None,
        pretrained: bool = True,
        checkpoint: Optional[str] = None,
        onnx: Optional[str] = None,
        num_classes: Optional[int] = None,
) -> Classifier:
    """Load a classifier.

    Args:
        name: Which model, see `find_model`.
        device: Where it computes; an ONNX file computes on the CPU.
        images: Ways of preparing images that go before the model's own, see `resolve_images`.
        model_args: Further arguments of the model.
        pretrained: Take the weights that the name stands for.
        checkpoint: Take the weights in this file instead.
        onnx: ONNX file that computes in place of the model.
        num_classes: Number of classes, None for the model's own.

    Raises:
        ModelError: There is no such model, file or weights.
        ImportError: ONNX Runtime is missing.
    """
    source = find_model(name)
    if onnx is None and source.is_onnx:
        return _load_onnx(source.path, images or {})
    if onnx is not None and not Path(onnx).is_file():
        raise ModelError(f'onnx: got {onnx!r}, no such file.')
    try:
        model = create_named(
            name, pretrained and onnx is None, checkpoint, num_classes, keep_classifier=True, **(model_args or {}))
    except WeightsError as e:
        subject = 'model: ' if checkpoint is None else f'checkpoint: {checkpoint!r} cannot be used. '
        raise ModelError(f'{subject}{e}\nOr name a file of weights: --checkpoint FILE.') from e
    model = model.to(device).eval()
    names = model.pretrained_cfg.get('label_names')
    if names is not None and not (
            isinstance(names, (list, tuple, dict)) and all(isinstance(name, (str, int)) for name in names)):
        raise ModelError(f'model: the config.json of {name!r} has label_names = {names!r}, must be a list of'
                         ' names.')
    names = list(names) if names is not None and len(names) == model.num_classes else None
    data_config = resolve_images(model, **(images or {}))
    logits = _onnx_logits(Path(onnx), data_config) if onnx is not None else model
    return Classifier(logits, model, data_config, names, model.num_classes)


def _load_onnx(file: Path, images: Dict[str, Any]) -> Classifier:
    """A classifier from an ONNX file of `export_onnx` alone, whose metadata says all that is to be known."""
    session = _onnx_session(file)
    described = session.get_modelmeta().custom_metadata_map
    try:
        data_config = json.loads(described['data_config'])
        data_config['input_size'] = (data_config['input_size'][0], *json.loads(described['img_size']))
        names = json.loads(described.get('label_names', 'null'))
    except (KeyError, ValueError, TypeError) as e:
        raise ModelError(
            f'model: {str(file)!r} does not say how its images are prepared, as files of export_onnx do ({e!r}). Name'
            f' its model, and give the file as --onnx.') from e
    data_config.update((k, v) for k, v in images.items() if v is not None)
    logits = _onnx_logits(file, data_config, session)
    number = session.get_outputs()[0].shape[-1]
    return Classifier(logits, None, data_config, names, number)


def _onnx_session(file: Path) -> Any:
    onnxruntime = require('onnxruntime', 'onnx')
    try:
        return onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    except Exception as e:  # of ONNX Runtime's own classes
        raise ModelError(f'onnx: {str(file)!r} cannot be read: {e}') from e


def _onnx_logits(
        file: Path,
        data_config: Dict[str, Any],
        session: Any = None,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images (B, C, H, W), normalised, to logits."""
    session = session or _onnx_session(file)
    inputs = session.get_inputs()[0]
    if 'resize_from' in session.get_modelmeta().custom_metadata_map:
        raise ModelError(
            f'onnx: {str(file)!r} takes pictures of {inputs.shape[1]} x {inputs.shape[2]} pixels alone, and crops them'
            f' itself. Name its model, or a file that was exported without --resize-from.')
    fixed = inputs.shape[0] if isinstance(inputs.shape[0], int) else None
    takes_bytes = inputs.type == 'tensor(uint8)'

    def logits(images: torch.Tensor) -> torch.Tensor:
        number, size = len(images), fixed or len(images)
        images = images.cpu()
        if takes_bytes:
            colours = denormalise(images, data_config['mean'], data_config['std'])
            images = (colours * 255.).round().byte().permute(0, 2, 3, 1).contiguous()
        images = torch.cat([images, images.new_zeros(-number % size, *images.shape[1:])])
        parts = [session.run(None, {inputs.name: x.numpy()})[0] for x in images.split(size)]
        return torch.cat([torch.from_numpy(part) for part in parts])[:number]

    return logits


class _Files(Dataset):
    """Image files as bytes (C, H, W), and whether each can be read."""

    def __init__(self, files: Sequence[str], mode: str, transform: Callable, size: Tuple[int, ...]) -> None:
        self.files, self.mode, self.transform, self.size = list(files), mode, transform, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        file = self.files[index]
        try:
            return self.transform(read_image(Path(file), self.mode, file)), 1
        except DataError as e:
            _logger.warning('%s', e)
            return torch.zeros(self.size, dtype=torch.uint8), 0


def create_eval_transform(data_config: Dict[str, Any]) -> Callable:
    """timm's transform of evaluation: from an image to its bytes (C, H, W), uint8.

    Args:
        data_config: Size, interpolation and so on, as `timm.data.resolve_data_config` returns them.
    """
    return create_transform(**common_transform(data_config))


def common_transform(data_config: Dict[str, Any]) -> Dict[str, Any]:
    """What timm's transforms of training and of evaluation are both given; they return bytes."""
    names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    return dict(**{name: data_config[name] for name in names}, use_prefetcher=True)  # normalised on the device


def normalised(loader: Any, data_config: Dict[str, Any], device: torch.device) -> PrefetchLoader:
    """Batches of bytes, moved to the device ahead of time and normalised there."""
    return PrefetchLoader(
        loader,
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        device=device,
    )


def resolve_images(model: nn.Module, **values: Any) -> Dict[str, Any]:
    """How a model is given images, as `timm.data.resolve_data_config` returns it.

    Args:
        model: The model.
        values: crop_pct, interpolation, mean or std that go before its own; None for its own.

    Raises:
        ModelError: A value does not fit the model.
    """
    try:
        data_config = resolve_input_data_config(model, args=values)
        _check_data_config(data_config)
        create_eval_transform(data_config)  # looks at all of it
    except ValueError as e:
        raise ModelError(str(e)) from e
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as e:  # of what a config.json says
        raise ModelError(f'model: what it says of its images cannot be used ({type(e).__name__}: {e}).') from e
    return data_config


def _check_data_config(data_config: Dict[str, Any]) -> None:
    """Require what timm takes for granted.

    Raises:
        ModelError: Sizes, mean, standard deviation or crop are none.
    """
    size, crop_pct, crop_mode = (data_config[name] for name in ('input_size', 'crop_pct', 'crop_mode'))
    if len(size) != 3 or not all(type(n) is int and 0 < n <= _MAX_SIDE for n in size):
        raise ModelError(f'model: takes images of {size}, must be channels, height and width.')
    for name, low in (('mean', -math.inf), ('std', 0.)):
        values = data_config[name]
        if len(values) not in (1, size[0]) or not all(low < v < math.inf for v in values):
            raise ModelError(
                f'{name}: got {values}, must be a {"positive " if name == "std" else ""}number for each channel.')
    if not _MIN_CROP <= crop_pct < math.inf:
        raise ModelError(f'crop_pct: got {crop_pct}, must be a number of at least {_MIN_CROP}.')
    if crop_mode not in CROP_MODES:
        raise ModelError(f'crop_mode: got {crop_mode!r}, must be one of {", ".join(CROP_MODES)}.')


def color_mode(data_config: Dict[str, Any]) -> str:
    """Pillow's mode of the images that a model takes.

    Raises:
        ModelError: They are neither grey nor of three colours.
    """
    channels = data_config['input_size'][0]
    if channels not in (1, 3):
        raise ModelError(f'model_args: got {channels} input channels, must be 1 (grey) or 3.')
    return 'L' if channels == 1 else 'RGB'


def find_device(name: str) -> torch.device:
    """A device by its name.

    Args:
        name: 'cpu', 'cuda', 'mps', ..., or 'auto' for cuda where there is one, else cpu.

    Raises:
        ModelError: There is no such device.
    """
    chosen = ('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ModelError(f'device: got {name!r}, which is not available here ({str(e).splitlines()[0]}).') from e
    return torch.device(chosen)


class Predictions(NamedTuple):
    """What a model says of N images, in the order of the data set; those that cannot be read are left out."""
    targets: torch.Tensor  # N, classes
    predicted: torch.Tensor  # N, classes
    confidence: torch.Tensor  # N, probability of the predicted class
    loss: torch.Tensor  # N, cross-entropy, float64
    in_top5: torch.Tensor  # N, bool
    index: torch.Tensor  # N, number of the image

    def metrics(self) -> Dict[str, float]:
        """Loss, top-1 and top-5 accuracy in percent, and the number of images; independent of any order."""
        number = len(self.targets)
        return dict(
            loss=math.fsum(self.loss.tolist()) / number,  # exact, so that batches and processes do not show
            top1=100. * (self.predicted == self.targets).sum().item() / number,
            top5=100. * self.in_top5.sum().item() / number,
            images=number,
        )


class Answer(NamedTuple):
    """The likeliest classes of one image, the likeliest first; none where it cannot be read."""
    file: str
    labels: List[str]
    probabilities: List[float]
    classes: List[int]  # numbers of the labels


@torch.no_grad()
def classify(
        classifier: Classifier,
        files: Sequence[str],
        device: torch.device,
        top_k: int = 5,
        batch_size: int = 16,
        workers: int = 0,
) -> List[Answer]:
    """Name the likeliest classes of image files.

    Args:
        classifier: From `load_classifier`.
        files: Image files.
        device: Where the model is.
        top_k: Classes for each image.
        batch_size: Images that are computed at once.
        workers: Processes that load.

    Raises:
        ModelError: Outputs are not finite.
    """
    config = classifier.data_config
    dataset = _Files(files, color_mode(config), create_eval_transform(config), config['input_size'])
    loader = normalised(
        DataLoader(dataset, batch_size, num_workers=workers, collate_fn=fast_collate), config, device)
    names = classifier.label_names or [str(i) for i in range(classifier.num_classes)]
    answers: List[Answer] = []
    for images, readable in loader:
        logits = classifier.logits(images).double()
        if not logits[readable.to(logits.device) > 0].isfinite().all():
            raise ModelError('model: its outputs are no finite numbers; its weights cannot be right.')
        probabilities, classes = logits.softmax(dim=-1).topk(min(top_k, len(names)))
        for found, p, c in zip(readable.tolist(), probabilities.tolist(), classes.tolist(), strict=True):
            file = str(files[len(answers)])
            answers.append(Answer(file, [names[i] for i in c], p, c) if found else Answer(file, [], [], []))
    return answers
