"""Detectors of torchvision on any backbone of `DenseBackbone`: Mask R-CNN, Cascade Mask R-CNN, RetinaNet."""
import inspect
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from PIL import Image
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms.v2 import functional as vf

from .._images import read_image
from ..layers.arguments import check_known
from .cascade import CascadeRoIHeads
from .features import DenseBackbone
from .saved import load_model

TASK = 'object-detection'
DETECTORS = ('mask_rcnn', 'cascade_mask_rcnn', 'retinanet')
_GIVEN = {  # arguments of torchvision's classes that follow from others
    'self', 'kwargs', 'backbone', 'num_classes', 'min_size', 'max_size', 'image_mean', 'image_std', 'anchor_generator',
    'rpn_anchor_generator', 'head', 'rpn_head', 'box_roi_pool', 'box_head', 'box_predictor', 'mask_roi_pool',
    'mask_head', 'mask_predictor', 'proposal_matcher'}
_IOUS = (0.5, 0.6, 0.7)  # of a cascade, and what its heads divide offsets by
_BOX_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class FpnBackbone(nn.Module):
    """A backbone with a feature pyramid network, as torchvision's detectors want it.

    Attributes:
        out_channels: Channels of each map.
    """

    def __init__(self, body: DenseBackbone, out_channels: int = 256, first: int = 0) -> None:
        """
        Args:
            body: Gives maps (B, C, H, W) of strides 4 to 32.
            out_channels: Channels of the pyramid.
            first: First map that is taken. With all four, max pooling makes a fifth (Mask R-CNN); without the first,
                two convolutions make two more (RetinaNet).
        """
        super().__init__()
        self.body, self.first, self.out_channels = body, first, out_channels
        for i in range(first):  # several processes need every parameter to be used
            setattr(body, f'norm{i}', nn.Identity())
        if first and body.pyramid is not None:
            body.pyramid.up = nn.Upsample(scale_factor=2)  # the map that nobody looks at
        extra = LastLevelMaxPool() if first == 0 else LastLevelP6P7(out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(list(body.channels[first:]), out_channels, extra)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Map images (B, 3, H, W) to five maps (B, out_channels, h, w) by name."""
        maps = self.body(x)[self.first:]
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign as in mmdetection and Detectron2: boxes in the coordinates of the cells' centres, and as many samples as
    a box has cells. torchvision's is half a cell off. Boxes narrower than a cell are taken as one cell wide.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: Height and width of what is cut out.
        """
        super().__init__(['0', '1', '2', '3'], size, sampling_ratio=0)
        self._levels = LevelMapper(2, 5)  # of strides 4 to 32

    def forward(
            self,
            x: Dict[str, torch.Tensor],
            boxes: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
    ) -> torch.Tensor:
        """Cut boxes (N, 4) of each image out of the maps of strides 4 to 32, to (all boxes, C, size, size)."""
        half = 2. * 2. ** self._levels(boxes)  # of a cell, in pixels
        moved = [b - h[:, None] for b, h in zip(boxes, half.split([len(b) for b in boxes]))]
        return super().forward(x, moved, image_shapes)


class _Backboned:
    """What the training loop asks of a detector."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the backbone's activations twice instead of keeping them."""
        self.backbone.body.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> Tuple[str, ...]:
        """The backbone's position tables."""
        return tuple(f'backbone.body.{name}' for name in self.backbone.body.no_weight_decay())


class BackboneMaskRCNN(_Backboned, MaskRCNN):
    """torchvision's Mask R-CNN."""


class BackboneRetinaNet(_Backboned, RetinaNet):
    """torchvision's RetinaNet."""


def create_detector(
        backbone: DenseBackbone,
        num_classes: int,
        detector: str = 'mask_rcnn',
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        fpn_channels: int = 256,
        head_channels: int = 1024,
        min_size: int = 800,
        max_size: int = 1333,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
        detector_args: Optional[Dict[str, Any]] = None,
) -> nn.Module:
    """A detector that takes lists of images (3, H, W) between 0 and 1, of any sizes.

    In training mode it takes targets as well and returns losses by name; images are not resized then. In evaluation it
    resizes them and returns boxes, labels from 1, scores and, but for RetinaNet, masks, in pixels of the images given.

    Args:
        backbone: Gives maps (B, C, H, W).
        num_classes: Classes without background.
        detector: 'mask_rcnn', 'cascade_mask_rcnn' or 'retinanet'.
        anchor_sizes: Side of the anchors of each of the five maps, in pixels.
        fpn_channels: Channels of the pyramid and the convolutions of all heads.
        head_channels: Channels of the linear layers of the box heads.
        min_size: Shorter side in evaluation, in pixels.
        max_size: Largest longer side in evaluation, in pixels.
        mean: Mean of each channel, ImageNet's if None.
        std: Standard deviation of each channel, ImageNet's if None.
        detector_args: Further arguments of torchvision's class: box_batch_size_per_image, ...

    Raises:
        ValueError: A value is none of those above.
    """
    if detector not in DETECTORS:
        raise ValueError(f'detector: got {detector!r}, must be one of {", ".join(DETECTORS)}.')
    if num_classes < 1:
        raise ValueError(f'num_classes: got {num_classes}, must be at least 1.')
    if len(anchor_sizes) != 5:
        raise ValueError(f'anchor_sizes: got {len(anchor_sizes)} values, must be one for each of 5 maps.')
    kind = RetinaNet if detector == 'retinanet' else MaskRCNN
    known = inspect.signature(kind.__init__).parameters.keys() - _GIVEN
    if detector == 'cascade_mask_rcnn':  # each head has its own
        known = known - {'box_fg_iou_thresh', 'box_bg_iou_thresh', 'bbox_reg_weights'}
    check_known('detector_args', detector_args or {}, known)  # torchvision drops those that it does not know
    args = dict(
        min_size=min_size, max_size=max_size, image_mean=mean, image_std=std, _skip_resize=True,
        **(detector_args or {}))
    outputs = num_classes + 1
    ratios = ((0.5, 1., 2.),) * 5
    if detector == 'retinanet':
        scales = tuple(tuple(int(size * 2 ** (i / 3)) for i in range(3)) for size in anchor_sizes)
        model = BackboneRetinaNet(
            FpnBackbone(backbone, fpn_channels, first=1), outputs, anchor_generator=AnchorGenerator(scales, ratios),
            **args)
        model.head.register_forward_hook(_widen)
        return model
    model = BackboneMaskRCNN(
        FpnBackbone(backbone, fpn_channels),
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in anchor_sizes), ratios),
        box_roi_pool=AlignedRoIAlign(7),
        box_head=TwoMLPHead(fpn_channels * 49, head_channels),
        box_predictor=FastRCNNPredictor(head_channels, outputs),
        mask_roi_pool=AlignedRoIAlign(14),
        mask_head=MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(fpn_channels, fpn_channels, outputs),
        **args)
    if detector == 'cascade_mask_rcnn':
        model.roi_heads = _cascade(model.roi_heads, fpn_channels, head_channels, outputs)
    for module in model.modules():
        if isinstance(module, (RPNHead, FastRCNNPredictor, MaskRCNNPredictor)):
            module.register_forward_hook(_widen)
    return model


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    """Return what a head says in float32 at least: torchvision places boxes in the precision of their offsets, and in
    bfloat16, that of autocast, pixels from 256 on are two apart."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {k: _widen(module, args, x) for k, x in output.items()}
    return type(output)(_widen(module, args, x) for x in output)


def _cascade(single: RoIHeads, fpn_channels: int, head_channels: int, outputs: int) -> CascadeRoIHeads:
    """Three heads with the settings of a single one; four convolutions and a linear layer each."""
    stages = []
    for iou, stds in zip(_IOUS, _BOX_STDS):
        stages.append(RoIHeads(
            AlignedRoIAlign(7),
            FastRCNNConvFCHead((fpn_channels, 7, 7), [fpn_channels] * 4, [head_channels], nn.BatchNorm2d),
            FastRCNNPredictor(head_channels, outputs),
            iou,
            iou,
            single.fg_bg_sampler.batch_size_per_image,
            single.fg_bg_sampler.positive_fraction,
            tuple(1. / s for s in stds),
            single.score_thresh,
            single.nms_thresh,
            single.detections_per_img,
            mask_roi_pool=AlignedRoIAlign(14),
            mask_head=MaskRCNNHeads(fpn_channels, (fpn_channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(fpn_channels, fpn_channels, outputs),
        ))
    return CascadeRoIHeads(stages)


def check_targets(images: Sequence[torch.Tensor], targets: Sequence[Dict[str, torch.Tensor]], num_classes: int) -> None:
    """Require that targets are what the detectors can learn from.

    Args:
        images: Images (3, H, W).
        targets: For each, boxes (N, 4), left, top, right, bottom in pixels, labels (N,) from 1, masks (N, H, W).
        num_classes: Classes without background.

    Raises:
        ValueError: Numbers or sizes do not match, a class is out of range, or a box is empty or outside its image.
    """
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        H, W = image.shape[-2:]
        boxes, labels, masks = target['boxes'], target['labels'], target['masks']
        if boxes.shape != (len(labels), 4):
            raise ValueError(f'boxes of image {i}: got shape {tuple(boxes.shape)}, must be {(len(labels), 4)}.')
        if masks.shape != (len(labels), H, W):
            raise ValueError(f'masks of image {i}: got shape {tuple(masks.shape)}, must be {(len(labels), H, W)}.')
        strange = labels[(labels < 1) | (labels > num_classes)]
        if len(strange):
            raise ValueError(f'labels of image {i}: got class {strange[0].item()}, must be from 1 to {num_classes}.')
        wrong = (boxes[:, :2] < 0).any(1) | (boxes[:, 2] > W) | (boxes[:, 3] > H)
        wrong = wrong | (boxes[:, :2] >= boxes[:, 2:]).any(1)
        if wrong.any():
            raise ValueError(
                f'boxes of image {i}: got {boxes[wrong][0].tolist()}, must be left, top, right, bottom within {W} x {H}'
                f' pixels.')


def losses_of(model: nn.Module, images: List[torch.Tensor], targets: List[Dict[str, torch.Tensor]]) -> Dict[str, Any]:
    """The losses of a detector by name, and their sum as 'loss'."""
    losses = model(images, targets)
    return dict(loss=sum(losses.values()), **losses)


def build_detector(config: Dict[str, Any], backbone: Optional[DenseBackbone] = None) -> nn.Module:
    """A detector from the config of a saved one; its backbone has no weights if None."""
    return create_detector(
        backbone or DenseBackbone(config['model'], model_args=config['model_args']),
        len(config['class_names']),
        config['detector'],
        config['anchor_sizes'],
        config['fpn_channels'],
        config['head_channels'],
        config['eval_short_side'],
        config['max_side'],
        config['mean'],
        config['std'],
        config['detector_args'],
    )


def load_detector(folder: Union[str, Path]) -> Tuple[nn.Module, Dict[str, Any]]:
    """A trained detector in evaluation mode, and its config, from the folder `model` of a run.

    Raises:
        WeightsError: There is no such model.
    """
    return load_model(folder, TASK, build_detector)


@torch.no_grad()
def detect(model: nn.Module, image: Image.Image, threshold: float = 0.5) -> Dict[str, torch.Tensor]:
    """What a detector finds on an image, on the CPU.

    Args:
        model: Detector in evaluation mode.
        image: Of any size.
        threshold: Lowest score.
    """
    x = vf.pil_to_tensor(read_image(image)).to(next(model.parameters()).device).float() / 255.
    found, = model([x])
    keep = found['scores'] >= threshold
    return {k: v[keep].cpu() for k, v in found.items()}
