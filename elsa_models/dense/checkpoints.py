"""Detectors and segmenters of authors whose parts are named as in mmdetection and mmsegmentation."""
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple, Union

import torch
import torch.nn as nn

from ..models._checkpoint import WeightsError, read_checkpoint, unwrap
from ..models._family import family_of
from ..models._follow import follow
from .detection import BackboneMaskRCNN
from .features import DenseBackbone

# names of mmdetection and mmsegmentation, and those of torchvision and segmentation_models_pytorch
_BOX = (
    (r'shared_fcs\.0\.', 'box_head.fc6.'),
    (r'shared_fcs\.1\.', 'box_head.fc7.'),
    (r'fc_cls\.', 'box_predictor.cls_score.'),
    (r'fc_reg\.', 'box_predictor.bbox_pred.'),
)
_CASCADE_BOX = (
    (r'shared_convs\.(\d)\.conv\.', r'box_head.\1.0.'),
    (r'shared_convs\.(\d)\.bn\.', r'box_head.\1.1.'),
    (r'shared_fcs\.0\.', 'box_head.5.'),
    *_BOX[2:],
)
_MASK = (
    (r'convs\.(\d)\.conv\.', r'mask_head.\1.0.'),
    (r'upsample\.', 'mask_predictor.conv5_mask.'),
    (r'conv_logits\.', 'mask_predictor.mask_fcn_logits.'),
)
_DETECTOR = (
    (r'neck\.lateral_convs\.(\d)\.conv\.', r'backbone.fpn.inner_blocks.\1.0.'),
    (r'neck\.fpn_convs\.(\d)\.conv\.', r'backbone.fpn.layer_blocks.\1.0.'),
    (r'rpn_head\.rpn_conv\.', 'rpn.head.conv.0.0.'),
    (r'rpn_head\.rpn_cls\.', 'rpn.head.cls_logits.'),
    (r'rpn_head\.rpn_reg\.', 'rpn.head.bbox_pred.'),
    *((rf'roi_head\.bbox_head\.{a}', f'roi_heads.{b}') for a, b in _BOX),
    *((rf'roi_head\.mask_head\.{a}', f'roi_heads.{b}') for a, b in _MASK),
    *((rf'roi_head\.bbox_head\.{i}\.{a}', f'roi_heads.stages.{i}.{b}') for i in range(3) for a, b in _CASCADE_BOX),
    *((rf'roi_head\.mask_head\.{i}\.{a}', f'roi_heads.stages.{i}.{b}') for i in range(3) for a, b in _MASK),
)
_LAYERS = ((r'conv\.', '0.'), (r'bn\.', '1.'))
_DECODER = 'net.decoder.'
_SEGMENTER = (
    *((rf'decode_head\.psp_modules\.(\d)\.1\.{a}', rf'{_DECODER}psp.blocks.\1.1.{b}') for a, b in _LAYERS),
    *((rf'decode_head\.bottleneck\.{a}', f'{_DECODER}psp.out_conv.{b}') for a, b in _LAYERS),
    # counted from the finest map there, from the coarsest here
    *((rf'decode_head\.lateral_convs\.{i}\.{a}', f'{_DECODER}fpn_lateral_blocks.{2 - i}.conv_norm_relu.{b}')
      for i in range(3) for a, b in _LAYERS),
    *((rf'decode_head\.fpn_convs\.{i}\.{a}', f'{_DECODER}fpn_conv_blocks.{2 - i}.{b}')
      for i in range(3) for a, b in _LAYERS),
    *((rf'decode_head\.fpn_bottleneck\.{a}', f'{_DECODER}fusion_block.{b}') for a, b in _LAYERS),
    (r'decode_head\.conv_seg\.', 'net.segmentation_head.0.'),
    *((rf'auxiliary_head\.convs\.0\.{a}', f'aux_head.{b}') for a, b in _LAYERS),
    (r'auxiliary_head\.conv_seg\.', 'aux_head.4.'),
)


_NORM = re.compile(r'norm[0-3]\.')  # of the backbone's outputs


class LoadReport(NamedTuple):
    """What became of the entries of a checkpoint."""
    loaded: Tuple[Tuple[str, str], ...]  # entries of the file, and of the model
    unused: Tuple[str, ...]  # entries of the file
    missing: Tuple[str, ...]  # entries of the model, which are as they were

    def __str__(self) -> str:
        lines = [f'loaded   {a} -> {b}' for a, b in self.loaded]
        lines += [f'unused   {a}' for a in self.unused] + [f'missing  {b}' for b in self.missing]
        numbers = f'{len(self.loaded)} loaded, {len(self.unused)} unused, {len(self.missing)} missing'
        return '\n'.join([*lines, numbers])


def _background_first(name: str, x: torch.Tensor) -> torch.Tensor:
    """Move the background, which is the last class there and the first here, or add it where it has no weights."""
    if name.endswith(('cls_score.weight', 'cls_score.bias')):
        return torch.cat([x[-1:], x[:-1]])
    if '.bbox_pred.' in name and name.startswith('roi_heads.'):
        return torch.cat([x.new_zeros(4, *x.shape[1:]), x])
    if '.mask_fcn_logits.' in name:
        return torch.cat([x.new_zeros(1, *x.shape[1:]), x])
    return x


def load_authors_checkpoint(model: nn.Module, path: Union[str, Path], heads: bool = True) -> LoadReport:
    """Load the backbone with its four norms, and what corresponds of the heads, from the authors' checkpoint.

    Checkpoints of Mask R-CNN and Cascade Mask R-CNN with FPN and of UPerNet are read; a RetinaNet takes the backbone
    alone. Norms that the model lacks are left out. No code in them is run.

    Args:
        model: A detector of `create_detector`, a `Segmenter` with UPerNet, or a `DenseBackbone`; its backbone is a
            model of which the authors released detectors, such as elsa_swin_tiny.
        path: File to read.
        heads: Load more than the backbone. Heads of other classes must be left out.

    Returns:
        What was loaded; running statistics that no file counts are not listed as missing.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, lacks a part of the backbone, or has entries of other shapes. The model is as
            it was.
    """
    path = Path(path)
    found = unwrap(read_checkpoint(path))
    backbones = [(n, m) for n, m in model.named_modules() if isinstance(m, DenseBackbone)]
    if len(backbones) != 1:
        raise WeightsError(f'{type(model).__name__}: holds {len(backbones)} backbones, must be one.')
    name, backbone = backbones[0]
    family = family_of(backbone.architecture)
    if family is None or not family.reads_dense:
        raise WeightsError(
            f'{backbone.architecture}: must be the name of a model of which the authors released detectors.')
    place = f'{name}.' if name else ''
    prefix = 'backbone.' if any(k.startswith('backbone.') for k in found) else ''
    body = {k: x for k, x in found.items() if k.startswith(prefix) and not _NORM.match(k[len(prefix):])}
    body = {k[len(prefix):]: x for k, x in body.items()}
    targets_of, converted = follow(body, family.to_own_names), family.to_own_names(body)
    rules = _DETECTOR if isinstance(model, BackboneMaskRCNN) else _SEGMENTER if name else ()
    fitted: Dict[str, torch.Tensor] = {}
    loaded: List[Tuple[str, str]] = []
    unused = []
    for key, x in found.items():
        inner = key[len(prefix):]
        if inner in body and key.startswith(prefix):
            targets = {place + _in_body(k, backbone): converted[k] for k in targets_of[inner]}
        elif key.startswith(prefix) and _NORM.match(inner):
            targets = {place + inner: x} if isinstance(getattr(backbone, inner[:5]), nn.LayerNorm) else {}
        else:
            targets = {}
            for pattern, replacement in rules if heads else ():
                target, count = re.subn(f'^{pattern}', replacement, key)
                if count:
                    targets = {target: _background_first(target, x)}
                    break
        fitted.update(targets)
        loaded += [(key, target) for target in targets]
        if not targets:
            unused.append(key)
    expected = model.state_dict()
    wrong = [f'{k} is unknown' for k in fitted if k not in expected]
    wrong += [
        f'{k} has shape {tuple(x.shape)} instead of {tuple(expected[k].shape)}' for k, x in fitted.items()
        if k in expected and x.shape != expected[k].shape]
    missing = [k for k in expected if k not in fitted and not k.endswith('num_batches_tracked')]
    wrong += [f'{k} is missing' for k in missing if k.startswith(place)]
    if wrong:
        raise WeightsError(f'{path}: does not fit. {"; ".join(wrong)}.')
    model.load_state_dict(fitted, strict=False)
    return LoadReport(tuple(loaded), tuple(unused), tuple(missing))


def _in_body(name: str, backbone: DenseBackbone) -> str:
    """The name in a `DenseBackbone` of a classifier's entry: timm flattens the names of stages."""
    for stage in backbone.body.feature_info.module_name():
        if name.startswith(f'{stage}.'):
            name = stage.replace('.', '_') + name[len(stage):]
    return f'body.{name}'
