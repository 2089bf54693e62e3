"""Label maps for token labelling: which classes a teacher sees in each place of an image.

The format, a folder:

- `names.txt`: the images, one a line, in the order of the rows: their paths within the data folder, with slashes.
- `indices.npy`: (N, k, h, w) uint16, the k likeliest classes of each place, the likeliest first.
- `scores.npy`: (N, k, h, w) float16, their probabilities.
- `info.json`: num_classes, and the teacher's name.

A map covers the whole image. For ImageNet-1k, k 5 and 14 x 14 places make 5.0 GB.
"""
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torchvision.transforms.functional as F
from numpy.lib.format import open_memmap
from timm.data import create_transform, resolve_data_config
from timm.data.loader import fast_collate
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, unwrap_model
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from .._extras import require
from .._files import replace_folder
from .._images import DataError
from ..inference.classifier import color_mode
from ..models import TokenLabelModel, token_label_loss
from .data import LabelledImages
from .evaluation import create_eval_loader
from .world import World

NAMES, INDICES, SCORES, INFO = 'names.txt', 'indices.npy', 'scores.npy', 'info.json'
_CHECKED = 2 ** 24  # values that are looked at together


class TokenMaps:
    """A folder of label maps, checked as a whole when it is opened, and read as needed."""

    def __init__(self, folder: Union[str, Path]) -> None:
        """
        Raises:
            DataError: It is no folder of label maps.
        """
        self.folder = Path(folder)
        try:
            self.info = json.loads((self.folder / INFO).read_text(encoding='utf-8'))
            names = (self.folder / NAMES).read_text(encoding='utf-8').splitlines()
            self.indices = np.load(self.folder / INDICES, mmap_mode='r')
            self.scores = np.load(self.folder / SCORES, mmap_mode='r')
            self.num_classes = self.info['num_classes']
            found = [(x.shape, x.dtype) for x in (self.indices, self.scores)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as e:
            raise DataError(f'token_labels: {str(folder)!r} is no folder of label maps ({e}).') from e
        if type(self.num_classes) is not int or not 1 <= self.num_classes <= 2 ** 16:
            raise DataError(f'token_labels: {self.folder / INFO}: num_classes is {self.num_classes!r:.100}.')
        (shape, kind), (scores_shape, scores_kind) = found
        if (kind, scores_kind) != (np.uint16, np.float16):
            raise DataError(
                f'token_labels: {folder}: indices are {kind} and scores {scores_kind}, must be uint16 and float16.')
        if shape != scores_shape or len(shape) != 4 or len(names) != shape[0] or min(shape) < 1:
            raise DataError(
                f'token_labels: {folder}: {len(names)} names, indices of shape {shape} and scores of shape'
                f' {scores_shape} do not fit.')
        if len(set(names)) < len(names):
            raise DataError(f'token_labels: {self.folder / NAMES}: names an image twice.')
        self._check_values(names)
        self.rows = {name: row for row, name in enumerate(names)}

    def _check_values(self, names: List[str]) -> None:
        size = max(1, _CHECKED // self.indices[0].size)
        for start in range(0, len(names), size):
            indices, scores = self.indices[start:start + size], self.scores[start:start + size]
            wrong = (indices >= self.num_classes) | ~(np.isfinite(scores) & (scores >= 0.))
            if wrong.any():
                place = tuple(np.argwhere(wrong)[0])
                raise DataError(
                    f'token_labels: {self.folder}: {names[start + place[0]]!r} has class {indices[place]} with score'
                    f' {scores[place]}, must be a class below {self.num_classes} and a finite score of at least 0.')

    def __getitem__(self, name: str) -> Tuple[torch.Tensor, torch.Tensor]:
        """Classes (k, h, w) int32 and probabilities (k, h, w) of an image."""
        row = self.rows[name]
        return (torch.from_numpy(self.indices[row].astype(np.int32)),
                torch.from_numpy(self.scores[row].astype(np.float32)))


class TokenTargets(NamedTuple):
    """Targets of B images whose label maps are still to be cropped, which the device does."""
    classes: torch.Tensor  # B
    indices: torch.Tensor  # B, k, h, w
    scores: torch.Tensor  # B, k, h, w
    boxes: torch.Tensor  # B, 4: left, top, right, bottom of the crop, in parts of the image
    flips: torch.Tensor  # B, 2: whether it was mirrored, left to right and top to bottom

    def to(self, *args, **kwargs) -> 'TokenTargets':
        """The same on another device."""
        return TokenTargets(*(x.to(*args, **kwargs) for x in self))

    def dense(self, size: Tuple[int, int], num_classes: int) -> torch.Tensor:
        """Probabilities (B, H, W, classes) of each token of the cropped images.

        Args:
            size: Height and width in tokens.
            num_classes: Number of classes.
        """
        B, _, h, w = self.indices.shape
        full = self.scores.new_zeros(B, num_classes, h, w).scatter_(1, self.indices.long(), self.scores)
        boxes = self.boxes * self.boxes.new_tensor([w, h, w, h])
        x = roi_align(full, list(boxes.split(1)), size, sampling_ratio=2, aligned=True)  # B, classes, H, W
        for axis, flipped in ((-1, self.flips[:, 0]), (-2, self.flips[:, 1])):
            x = torch.where(flipped[:, None, None, None], x.flip(axis), x)
        x = x.permute(0, 2, 3, 1)
        return x / x.sum(dim=-1, keepdim=True).clamp(min=1e-6)


class TokenLabelledImages(Dataset):
    """Images with label maps; both are cropped and mirrored alike."""

    def __init__(
            self,
            images: LabelledImages,
            maps: TokenMaps,
            transforms: Tuple[Any, Any, Any],
            hflip: float,
            vflip: float,
    ) -> None:
        """
        Args:
            images: The images.
            maps: Their maps.
            transforms: timm's transforms of training in three parts (`separate`), of which the first crops.
            hflip: Probability of a horizontal flip.
            vflip: Probability of a vertical flip.

        Raises:
            DataError: An image has no map.
        """
        missing = [name for name in images.names if name not in maps.rows]
        if missing:
            raise DataError(
                f'token_labels: {maps.folder} has no map of {missing[0]!r}, nor of {len(missing) - 1} others.')
        self.images, self.maps = images, maps
        self.crop: RandomResizedCropAndInterpolation = transforms[0].transforms[0]
        self.rest = transforms[1:]
        self.probabilities = torch.tensor([hflip, vflip])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[Any, Tuple[Any, ...]]:
        image = self.images.image(index)
        width, height = image.size
        crop = self.crop
        top, left, h, w = crop.get_params(image, crop.scale, crop.ratio)
        image = F.resized_crop(image, top, left, h, w, crop.size, crop.interpolation)
        flips = torch.rand(2) < self.probabilities
        if flips[0]:
            image = F.hflip(image)
        if flips[1]:
            image = F.vflip(image)
        for transform in self.rest:
            image = transform(image)
        box = torch.tensor([left / width, top / height, (left + w) / width, (top + h) / height])
        return image, (self.images.targets[index], *self.maps[self.images.names[index]], box, flips)


def collate(batch: List[Any]) -> Tuple[torch.Tensor, TokenTargets]:
    """A batch of `TokenLabelledImages`."""
    images, classes = fast_collate([(image, target[0]) for image, target in batch])
    return images, TokenTargets(classes, *(torch.stack(x) for x in zip(*(target[1:] for _, target in batch))))


class _TokenLabelForward(nn.Module):
    """A model whose forward is `forward_train`, so that DDP sees it; timm unwraps `module`."""

    def __init__(self, model: TokenLabelModel) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.module.forward_train(x)


class TokenLabelTask(ClassificationTask):
    """Token labelling (`All Tokens Matter` - https://arxiv.org/abs/2104.10858), with MixToken.

    Targets are classes, or pairs of classes and label maps (B, h, w, classes).
    """

    def __init__(self, model: TokenLabelModel, dense_weight: float, smoothing: float, device: torch.device) -> None:
        """
        Args:
            model: Has an aux head; `use_mix_token` makes it mix.
            dense_weight: Weight of the tokens' loss.
            smoothing: Label smoothing of both losses.
            device: Device of the model.
        """
        super().__init__(_TokenLabelForward(model), criterion=nn.Identity(), device=device, verbose=False)
        self.dense_weight = dense_weight
        self.smoothing = smoothing

    def setup_ema(self, **kwargs) -> nn.Module:
        """Keep a moving average of the model itself."""
        self.trainable_module_ema = ModelEmaV3(unwrap_model(self.trainable_module), **kwargs)
        return self.trainable_module_ema

    def compile(self, **kwargs) -> nn.Module:
        """Compile training and evaluation."""
        model = unwrap_model(self.trainable_module)
        self.trainable_module = torch.compile(self.trainable_module, **kwargs)
        self.eval_model = torch.compile(model, **kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The model with its own forward."""
        if not ema and module is None and not hasattr(self, 'eval_model'):
            return unwrap_model(self.trainable_module)
        return super().get_eval_model(module, ema=ema)

    def forward(self, input: torch.Tensor, target: Any) -> Dict[str, torch.Tensor]:
        """Loss of a batch: class token and tokens."""
        target, dense = target if isinstance(target, (tuple, list)) else (target, None)
        output = self.trainable_module(input)
        loss = token_label_loss(
            output, target, dense, dense_weight=self.dense_weight, label_smoothing=self.smoothing)
        return dict(loss=loss, output=output.logits)


def classify_places(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (B, h, w, classes) of a timm classifier for each place of its last map.

    Each place goes alone through the classifier's head, as if the image were nothing else.

    Args:
        model: Classifier in evaluation mode.
        images: (B, C, H, W).

    Raises:
        ValueError: The features are no map, and no tokens of a square.
    """
    x = model.forward_features(images)
    aux_head = getattr(model, 'aux_head', None)
    if aux_head is not None and x.ndim == 3:  # the model classifies its tokens itself
        x = aux_head(x[:, 1:])
        return x.unflatten(1, _square(x.shape[1]))
    if x.ndim == 3:
        prefix = getattr(model, 'num_prefix_tokens', 0)
        tokens = x[:, prefix:]
        h, w = _square(tokens.shape[1])
        # a place is its own class token, if there is one
        places = tokens.flatten(0, 1)[:, None].expand(-1, 1 + prefix, -1)
        return model.forward_head(places).view(len(x), h, w, -1)
    if x.ndim != 4:
        raise ValueError(f'model: features have shape {tuple(x.shape)}, must be a map or tokens.')
    if getattr(model, 'output_fmt', 'NCHW') != 'NHWC':
        x = x.permute(0, 2, 3, 1)
    B, h, w, C = x.shape
    places = x.reshape(B * h * w, 1, 1, C)
    if getattr(model, 'output_fmt', 'NCHW') != 'NHWC':
        places = places.permute(0, 3, 1, 2)
    return model.forward_head(places).view(B, h, w, -1)


def _square(number: int) -> Tuple[int, int]:
    side = round(number ** 0.5)
    if side * side != number:
        raise ValueError(f'model: gives {number} tokens, which are no square; must be given square images.')
    return side, side


@torch.no_grad()
def make_label_maps(
        model: nn.Module,
        name: str,
        images: LabelledImages,
        folder: Union[str, Path],
        size: Optional[Tuple[int, int]] = None,
        top_k: int = 5,
        batch_size: int = 64,
        workers: int = 0,
) -> None:
    """Write label maps of images as a teacher sees them.

    Args:
        model: Teacher, a timm classifier of the classes of the data, in evaluation mode.
        name: Its name, for info.json.
        images: The images; their transform is set.
        folder: Folder to write, which appears when it is complete. Former label maps are replaced.
        size: Height and width of the maps, None for those of the teacher's features.
        top_k: Classes to keep for each place.
        batch_size: Images at once.
        workers: Processes that load.

    Raises:
        DataError: An image cannot be read; a map of it would be wanting.
        OutputError: The folder holds other things.
    """
    config = resolve_data_config(model=model)
    device = next(model.parameters()).device
    images.mode = color_mode(config)
    images.transform = create_transform(
        config['input_size'], interpolation=config['interpolation'], crop_pct=1., crop_mode='squash',
        use_prefetcher=True)  # all of the image
    loader = create_eval_loader(images, batch_size, World(device), config, workers)
    with replace_folder(folder, (NAMES, INDICES, SCORES, INFO)) as temporary:
        indices = scores = None
        row = 0
        for batch, targets in require('tqdm').tqdm(loader, desc='label maps', unit='batch', disable=None):
            if (targets < 0).any():
                broken = images.names[row + (targets < 0).nonzero()[0].item()]
                raise DataError(f'{broken}: cannot be read. Remove it from the data, or mend it.')
            x = classify_places(model, batch).float().permute(0, 3, 1, 2)
            if size is not None and x.shape[-2:] != tuple(size):
                x = nn.functional.interpolate(x, size, mode='bilinear', align_corners=False)
            top = x.softmax(dim=1).topk(min(top_k, x.shape[1]), dim=1)
            if indices is None:
                shape = (len(images), *top.indices.shape[1:])
                indices = open_memmap(temporary / INDICES, 'w+', np.uint16, shape)
                scores = open_memmap(temporary / SCORES, 'w+', np.float16, shape)
            indices[row:row + len(batch)] = top.indices.cpu().numpy()
            scores[row:row + len(batch)] = top.values.cpu().numpy()
            row += len(batch)
        indices.flush()
        scores.flush()
        (temporary / NAMES).write_text(''.join(f'{name}\n' for name in images.names), encoding='utf-8')
        (temporary / INFO).write_text(json.dumps(dict(teacher=name, num_classes=model.num_classes)), encoding='utf-8')
