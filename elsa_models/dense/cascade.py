"""The box and mask heads of Cascade Mask R-CNN (`Cascade R-CNN: Delving into High Quality Object Detection` -
https://arxiv.org/abs/1712.00726), on torchvision's parts."""
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops, generalized_box_iou_loss

_Detections = List[Dict[str, torch.Tensor]]


class CascadeRoIHeads(nn.Module):
    """Heads one after the other: each takes the boxes that the one before has moved, and asks more of them.

    Boxes learn by generalised IoU, weight 10, and each class has its own, as in Swin's and ELSA's detectors. In
    evaluation the scores and the masks of all heads are averaged, and the last says where the boxes are.
    """

    def __init__(self, stages: Sequence[RoIHeads], loss_weights: Sequence[float] = (1., 0.5, 0.25)) -> None:
        """
        Args:
            stages: Heads with rising thresholds of IoU, which share neither weights nor samples.
            loss_weights: Weight of the losses of each.

        Raises:
            ValueError: There are not as many weights as heads.
        """
        super().__init__()
        if len(stages) != len(loss_weights):
            raise ValueError(f'loss_weights: got {len(loss_weights)} values, must be one for each of {len(stages)}.')
        self.stages = nn.ModuleList(stages)
        self.loss_weights = tuple(loss_weights)

    def forward(
            self,
            features: Dict[str, torch.Tensor],
            proposals: List[torch.Tensor],
            image_shapes: List[Tuple[int, int]],
            targets: Optional[List[Dict[str, torch.Tensor]]] = None,
    ) -> Tuple[_Detections, Dict[str, torch.Tensor]]:
        """As torchvision's `RoIHeads`.

        Args:
            features: Maps of the pyramid by name.
            proposals: Boxes (N, 4) of each image.
            image_shapes: Height and width of each image in the batch.
            targets: Boxes, labels and masks of each image, in training.

        Returns:
            Boxes, labels, scores and masks of each image, none in training; losses by name, none in evaluation.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(self, features, proposals, image_shapes, targets) -> Dict[str, torch.Tensor]:
        losses = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.loss_weights)):
            proposals, matched, labels, _ = stage.select_training_samples(proposals, targets)
            logits, deltas = _predict(stage, features, proposals, image_shapes)
            flat = torch.cat(labels)
            losses[f'loss_classifier{i}'] = weight * F.cross_entropy(logits, flat)
            boxes = stage.box_coder.decode(deltas, proposals)  # boxes, classes, 4
            positive = (flat > 0).nonzero().flatten()
            found = boxes[positive, flat[positive]]
            wanted = torch.cat([t['boxes'][m[k > 0]] for t, m, k in zip(targets, matched, labels)]).to(found)
            distance = generalized_box_iou_loss(found, wanted, reduction='sum')
            losses[f'loss_box_reg{i}'] = weight * 10. * distance / max(1, len(flat))

            chosen = [p[k > 0] for p, k in zip(proposals, labels)]
            x = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, chosen, image_shapes)))
            losses[f'loss_mask{i}'] = weight * maskrcnn_loss(
                x, chosen, [t['masks'] for t in targets], [t['labels'] for t in targets],
                [m[k > 0] for m, k in zip(matched, labels)])
            if i + 1 < len(self.stages):
                # samples that are nothing move as their likeliest class would
                classes = torch.where(flat > 0, flat, logits[:, 1:].argmax(1) + 1)
                moved = _move(boxes, classes, proposals, image_shapes)
                kept = []
                for before, after, target in zip(proposals, moved, targets):
                    is_truth = (before[:, None] == target['boxes'].to(before)).all(-1).any(1)  # every head adds these
                    after = after[~is_truth]
                    kept.append(after[box_ops.remove_small_boxes(after, 1.)])
                proposals = kept
        return losses

    def _detect(self, features, proposals, image_shapes) -> _Detections:
        total = 0.
        for i, stage in enumerate(self.stages):
            logits, deltas = _predict(stage, features, proposals, image_shapes)
            total = total + logits.softmax(-1)
            if i + 1 < len(self.stages):
                boxes = stage.box_coder.decode(deltas, proposals)
                proposals = _move(boxes, logits[:, 1:].argmax(1) + 1, proposals, image_shapes)
        # the softmax of logarithms of probabilities is those probabilities
        boxes, scores, labels = stage.postprocess_detections(
            (total / len(self.stages)).log(), deltas, proposals, image_shapes)
        masks = [0.] * len(boxes)
        for stage in self.stages:
            x = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, image_shapes)))
            masks = [total + part for total, part in zip(masks, maskrcnn_inference(x, labels))]
        return [
            dict(boxes=b, labels=k, scores=s, masks=m / len(self.stages))
            for b, k, s, m in zip(boxes, labels, scores, masks)]


def _predict(stage, features, proposals, image_shapes) -> Tuple[torch.Tensor, torch.Tensor]:
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, image_shapes)))


@torch.no_grad()
def _move(boxes, classes, proposals, image_shapes) -> List[torch.Tensor]:
    """The boxes of one class each, by image, inside their image."""
    rows = torch.arange(len(boxes), device=boxes.device)
    parts = boxes[rows, classes].split([len(p) for p in proposals])
    return [box_ops.clip_boxes_to_image(p.detach(), shape) for p, shape in zip(parts, image_shapes)]
