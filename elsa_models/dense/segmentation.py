"""Semantic segmentation: any decoder of segmentation_models_pytorch on any backbone of `DenseBackbone`."""
import inspect
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._extras import require
from .._images import normalise
from ..layers.arguments import check_known
from ..layers.sizes import sizes_are_open
from ..models import families
from .features import DenseBackbone
from .metrics import IGNORE, check_labels
from .saved import load_model

smp = require('segmentation_models_pytorch', 'segmentation')
encoders = require('segmentation_models_pytorch.encoders', 'segmentation').encoders

TASK = 'semantic-segmentation'
_STRIDE = 32
_ENCODER = 'elsa_models.dense'  # in the library's registry
_backbone: ContextVar[DenseBackbone] = ContextVar('backbone')  # of the encoder to be made
_GIVEN = {'self', 'kwargs', 'encoder_name', 'encoder_weights', 'in_channels', 'classes'}  # not to be given again


class PyramidEncoder(nn.Module):
    """A `DenseBackbone` as an encoder of segmentation_models_pytorch."""
    output_stride = _STRIDE

    def __init__(self, backbone: DenseBackbone, depth: int = 5, output_stride: int = _STRIDE) -> None:
        """
        Args:
            backbone: Gives maps (B, C, H, W).
            depth: Must be 5.
            output_stride: Must be 32.

        Raises:
            ValueError: Another depth or stride is asked for.
        """
        super().__init__()
        if depth != 5 or output_stride != _STRIDE:
            raise ValueError(f'encoder_depth, output_stride: got {depth}, {output_stride}, must be 5, {_STRIDE}.')
        self.backbone = backbone
        # the library counts the image and a map of stride 2, which there is none of, first
        self.out_channels = [3, 0, *backbone.channels]

    def set_in_channels(self, in_channels: int, pretrained: bool = False) -> None:
        """Called by the library.

        Raises:
            ValueError: Other than three channels are asked for.
        """
        if in_channels != 3:
            raise ValueError(f'in_channels: got {in_channels}, must be 3.')

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Map images (B, 3, H, W) to themselves, an empty map of stride 2, and maps of strides 4, 8, 16 and 32."""
        empty = x.new_empty((x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2))
        return [x, empty, *self.backbone(x)]


def _register() -> None:
    # the library makes encoders by name alone. Nothing is registered later, so that threads do not meet
    def from_backbone(**kwargs) -> PyramidEncoder:
        return PyramidEncoder(_backbone.get(), **kwargs)

    def from_name(model: str, **kwargs) -> PyramidEncoder:
        return PyramidEncoder(DenseBackbone(model, model_args=dict(img_size=224)), **kwargs)

    encoders[_ENCODER] = dict(encoder=from_backbone, pretrained_settings={}, params={})
    # the library's own encoders for timm's models, tu-NAME, take no strides of 8 and 16
    for name in [name for family in families() for name in family.model_names if not name.startswith('test_')]:
        encoders.setdefault(name, dict(encoder=from_name, pretrained_settings={}, params=dict(model=name)))


_register()


class _AdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """Average pooling to a fixed size, which can be exported for maps of any size: PyTorch's graph of it holds for the
    size only that it was made with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C, *output_size)."""
        if not sizes_are_open():
            return super().forward(x)
        height, width = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
        return _bins(x.shape[-2], height, x) @ x @ _bins(x.shape[-1], width, x).mT


def _bins(size: int, number: int, like: torch.Tensor) -> torch.Tensor:
    """A matrix (number, size) that averages each of so many bins, which overlap where they do not divide the size."""
    places, bins = torch.arange(size, device=like.device), torch.arange(number, device=like.device)[:, None]
    inside = (places >= bins * size // number) & (places < ((bins + 1) * size + number - 1) // number)
    inside = inside.to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Segmenter(nn.Module):
    """A decoder on a backbone, with an auxiliary head on the map of stride 16 (FCN of
    `Fully Convolutional Networks for Semantic Segmentation` - https://arxiv.org/abs/1411.4038).

    Images of any size are padded to multiples of 32 at the right and the bottom.
    """

    def __init__(
            self,
            backbone: DenseBackbone,
            num_classes: int,
            decoder: str = 'upernet',
            decoder_args: Optional[Dict[str, Any]] = None,
            aux_channels: int = 256,
    ) -> None:
        """
        Args:
            backbone: Gives maps (B, C, H, W); with UPerNet its norms take the place of the decoder's own.
            num_classes: Classes of the label map, at least 2.
            decoder: Name of an architecture of segmentation_models_pytorch: 'upernet', 'unet', 'fpn', ...
            decoder_args: Its further arguments, such as decoder_channels.
            aux_channels: Channels of the auxiliary head, 0 for none.

        Raises:
            ValueError: A value is none of those above.
        """
        super().__init__()
        if num_classes < 2:
            raise ValueError(f'num_classes: got {num_classes}, must be at least 2.')
        token = _backbone.set(backbone)
        try:
            self.net = smp.create_model(
                decoder, _ENCODER, encoder_weights=None, classes=num_classes, **(decoder_args or {}))
        except (KeyError, RuntimeError, TypeError) as e:
            raise ValueError(f'decoder: {decoder!r} with decoder_args {decoder_args or {}} is not possible. {e}') from e
        finally:
            _backbone.reset(token)
        # the library hands what it does not know to the encoder, and drops it there
        known = inspect.signature(type(self.net).__init__).parameters.keys() - _GIVEN
        check_known('decoder_args', decoder_args or {}, known)
        for parent in list(self.net.modules()):
            for key, child in parent.named_children():
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    setattr(parent, key, _AdaptiveAvgPool(child.output_size))
        if hasattr(self.net.decoder, 'feature_norms') and isinstance(backbone.norm0, nn.LayerNorm):
            norms = self.net.decoder.feature_norms
            self.net.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in norms)
        self.aux_head = None
        if aux_channels:
            self.aux_head = nn.Sequential(
                nn.Conv2d(backbone.channels[2], aux_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(aux_channels),
                nn.ReLU(inplace=True),
                nn.Dropout2d(0.1),
                nn.Conv2d(aux_channels, num_classes, 1),
            )
        self.num_classes = num_classes

    @property
    def backbone(self) -> DenseBackbone:
        """The backbone."""
        return self.net.encoder.backbone

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the backbone's activations twice instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> Tuple[str, ...]:
        """The backbone's position tables."""
        return tuple(f'net.encoder.backbone.{name}' for name in self.backbone.no_weight_decay())

    def forward(self, x: torch.Tensor) -> Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]:
        """Map images (B, 3, H, W) to logits (B, num_classes, H, W); in training mode those of the auxiliary head."""
        H, W = x.shape[-2:]
        height, width = (H + _STRIDE - 1) // _STRIDE * _STRIDE, (W + _STRIDE - 1) // _STRIDE * _STRIDE
        maps = self.net.encoder(F.pad(x, (0, width - W, 0, height - H)))
        aux = maps[4]
        logits = self.net.segmentation_head(self.net.decoder(maps))[:, :, :H, :W]
        if not self.training or self.aux_head is None:
            return logits
        aux = F.interpolate(self.aux_head(aux), size=(height, width), mode='bilinear', align_corners=False)
        return logits, aux[:, :, :H, :W]


def segmentation_loss(
        output: Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]],
        labels: torch.Tensor,
        aux_weight: float = 0.4,
) -> torch.Tensor:
    """Mean cross-entropy of all pixels that count, plus that of the auxiliary head.

    Args:
        output: Of a `Segmenter`.
        labels: (B, H, W), classes or 255 for pixels that do not count.
        aux_weight: Weight of the auxiliary head's.

    Returns:
        A scalar; 0 where no pixel counts.

    Raises:
        ValueError: Sizes do not match, or a class is out of range.
    """
    logits, aux = output if isinstance(output, tuple) else (output, None)
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f'labels: got shape {tuple(labels.shape)}, must be {(logits.shape[0], *logits.shape[2:])} as the images.')
    check_labels(labels, logits.shape[1])
    count = (labels != IGNORE).sum().clamp(min=1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.float(), labels, ignore_index=IGNORE, reduction='sum') / count

    return loss(logits) if aux is None else loss(logits) + aux_weight * loss(aux)


def _starts(size: int, window: int, stride: int) -> List[int]:
    if size <= window:
        return [0]
    return [*range(0, size - window, stride), size - window]


def sliding_logits(model: nn.Module, images: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Logits of large images from overlapping windows, averaged where those overlap.

    Args:
        model: Maps images (B, 3, h, w) to logits (B, classes, h, w).
        images: (B, 3, H, W).
        window: Height and width of a window in pixels.
        stride: Pixels from one window to the next; the last ones are moved inwards.

    Returns:
        (B, classes, H, W).

    Raises:
        ValueError: The stride leaves pixels out.
    """
    if not 0 < stride <= window:
        raise ValueError(f'stride: got {stride}, must be from 1 to the window, {window}.')
    H, W = images.shape[-2:]
    total, count = None, images.new_zeros((1, 1, H, W))
    for y in _starts(H, window, stride):
        for x in _starts(W, window, stride):
            part = model(images[:, :, y:y + window, x:x + window])
            if total is None:
                total = part.new_zeros((len(images), part.shape[1], H, W))
            total[:, :, y:y + window, x:x + window] += part
            count[:, :, y:y + window, x:x + window] += 1
    return total / count


def segment(
        model: nn.Module,
        images: torch.Tensor,
        scales: Sequence[float] = (1.,),
        flip: bool = False,
        window: Optional[int] = None,
        stride: Optional[int] = None,
) -> torch.Tensor:
    """Probabilities of each pixel's classes, averaged over scales and mirror images.

    Args:
        model: Segmenter in evaluation mode.
        images: (B, 3, H, W), normalised.
        scales: Sizes at which they are looked at, relative to theirs.
        flip: Look at mirror images, too.
        window: Look at windows of so many pixels a side, None for whole images.
        stride: Pixels from one window to the next; two thirds of the window if None.

    Returns:
        (B, classes, H, W).

    Raises:
        ValueError: There are no scales, or the stride leaves pixels out.
    """
    if not scales or min(scales) <= 0.:
        raise ValueError(f'scales: got {tuple(scales)}, must be positive numbers.')
    H, W = images.shape[-2:]
    total = 0.
    for scale in scales:
        size = (max(1, round(H * scale)), max(1, round(W * scale)))
        scaled = images if size == (H, W) else F.interpolate(images, size, mode='bilinear', align_corners=False)
        for mirrored in (False, True) if flip else (False,):
            x = scaled.flip(-1) if mirrored else scaled
            logits = model(x) if window is None else sliding_logits(model, x, window, stride or window * 2 // 3)
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != (H, W):
                logits = F.interpolate(logits, (H, W), mode='bilinear', align_corners=False)
            total = total + logits.float().softmax(1)
    return total / (len(scales) * (2 if flip else 1))


def build_segmenter(config: Dict[str, Any]) -> Segmenter:
    """A segmenter without weights, from the config of a saved one."""
    backbone = DenseBackbone(config['model'], model_args=config['model_args'])
    return Segmenter(
        backbone, len(config['class_names']), config['decoder'], config['decoder_args'], config['aux_channels'])


def load_segmenter(folder: Union[str, Path]) -> Tuple[Segmenter, Dict[str, Any]]:
    """A trained segmenter in evaluation mode, and its config, from the folder `model` of a run.

    Raises:
        WeightsError: There is no such model.
    """
    return load_model(folder, TASK, build_segmenter)


def predict_labels(model: nn.Module, image: torch.Tensor, config: Dict[str, Any]) -> torch.Tensor:
    """Classes (H, W) of an image's pixels, as a recipe's evaluation finds them.

    Args:
        model: Segmenter in evaluation mode.
        image: (3, H, W), uint8, on the device of the model.
        config: Values mean, std, eval_short_side, eval_window, eval_scales and eval_flip.
    """
    H, W = image.shape[-2:]
    x = normalise(image[None], config['mean'], config['std'])
    if config['eval_short_side']:
        scale = config['eval_short_side'] / min(H, W)
        x = nn.functional.interpolate(
            x, (max(1, round(H * scale)), max(1, round(W * scale))), mode='bilinear', align_corners=False,
            antialias=True)
    probabilities = segment(
        model, x, config['eval_scales'], config['eval_flip'], window=config['eval_window'] or None)
    if probabilities.shape[-2:] != (H, W):
        probabilities = nn.functional.interpolate(probabilities, (H, W), mode='bilinear', align_corners=False)
    return probabilities[0].argmax(0)
