"""Detectors: any size, empty images, losses, targets that cannot be, the cascade."""
import pytest
import torch
import torch.nn as nn
from helpers import assert_near
from torchvision.ops import roi_align

import elsa_models  # noqa: F401
from elsa_models.dense import DenseBackbone
from elsa_models.dense.cascade import CascadeRoIHeads
from elsa_models.dense.detection import DETECTORS, AlignedRoIAlign, check_targets, create_detector, losses_of

SMALL = dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=30)


def _detector(detector='mask_rcnn', name='test_elsa_swin', **kwargs):
    args = dict(patch_size=8) if 'volo' in name else {}
    kwargs = {**dict(
        anchor_sizes=(8, 16, 24, 32, 48), fpn_channels=16, head_channels=32, min_size=48, max_size=100,
        detector_args=dict(detections_per_img=5) if detector == 'retinanet' else dict(SMALL, box_score_thresh=.01)),
        **kwargs}
    return create_detector(DenseBackbone(name, model_args=args), 3, detector, **kwargs).eval()


def _target(H=48, W=60, number=2):
    masks = torch.zeros(2, H, W, dtype=torch.uint8)
    masks[0, 5:20, 5:20] = masks[1, 20:40, 30:50] = 1
    boxes = torch.tensor([[5., 5, 20, 20], [30, 20, 50, 40]])
    return dict(boxes=boxes[:number], labels=torch.tensor([1, 3])[:number], masks=masks[:number])


NAMES = ['test_elsa_swin', 'test_elsa_volo']
LARGE = [pytest.param(size, marks=pytest.mark.slow, id=str(size)) for size in ((800, 1333), (1333, 800))]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('size', [(33, 47), (61, 130), (128, 160), *LARGE], ids=str)
def test_any_size_passes_through_backbone_pyramid_and_heads(name, size):
    for detector in DETECTORS:
        model = _detector(detector, name, min_size=min(size), max_size=max(size))  # as it is
        with torch.no_grad():
            maps = model.backbone(torch.rand(2, 3, *size))
            found, = model([torch.rand(3, *size)])
        sides = [[-(-s // stride) for s in size] for stride in (4, 8, 16, 32, 64, 128)]
        first = 1 if detector == 'retinanet' else 0
        assert [list(m.shape) for m in maps.values()] == [[2, 16, *s] for s in sides[first:first + 5]]
        assert all(m.isfinite().all() for m in maps.values()) and found['boxes'].isfinite().all()
        assert (found['boxes'] >= 0).all() and (found['boxes'] <= torch.tensor(size[::-1] * 2)).all()
        if detector != 'retinanet':
            assert found['masks'].shape == (len(found['boxes']), 1, *size) and len(found['boxes'])
        losses = losses_of(model.train(), [torch.rand(3, *size)], [_target(*size, number=1)])
        assert losses['loss'].isfinite()


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('detector', DETECTORS)
def test_images_of_one_size_do_not_depend_on_their_batch(detector, name):
    torch.manual_seed(0)
    # rounding must not decide which box is suppressed
    model = _detector(detector, name).double()
    images = [torch.rand(3, 48, 61, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        together = model(images)
        for image, found in zip(images, together):
            alone, = model([image])
            assert alone.keys() == found.keys() and torch.equal(alone['labels'], found['labels'])
            assert detector == 'retinanet' or len(found['boxes'])
            for k in ('boxes', 'scores', 'masks'):
                if k in found:
                    assert_near(alone[k], found[k], 1e-9)


@pytest.mark.parametrize('detector', DETECTORS)
@pytest.mark.parametrize('name', NAMES)
def test_any_sizes_at_once(detector, name):
    images = [torch.rand(3, 33, 47), torch.rand(3, 100, 30)]
    with torch.no_grad():
        found = _detector(detector, name)(images)
    for image, f in zip(images, found):
        H, W = image.shape[1:]
        assert f['labels'].numel() == 0 or 1 <= f['labels'].min() and f['labels'].max() <= 3
        assert (f['boxes'] >= 0).all() and (f['boxes'][:, 2] <= W).all() and (f['boxes'][:, 3] <= H).all()
        assert ('masks' in f) == (detector != 'retinanet')
        if 'masks' in f:
            assert f['masks'].shape == (len(f['boxes']), 1, H, W) and len(f['boxes'])


def test_boxes_are_cut_out_where_they_are():
    generator = torch.Generator().manual_seed(0)
    sizes = [(256, 320), (200, 256)]
    maps = {str(i): torch.randn(2, 3, 256 // s, 320 // s, generator=generator) for i, s in enumerate((4, 8, 16, 32))}
    corners = 150 * torch.rand(2, 40, 2, generator=generator)
    sides = 32 * 2 ** (3 * torch.rand(2, 40, 1, generator=generator)) * torch.tensor([1., 1.1])
    boxes = list(torch.cat([corners, corners + sides], -1))
    found = AlignedRoIAlign(7)(maps, boxes, sizes)
    levels = (4 + (sides.prod(-1).sqrt() / 224).log2()).floor().clamp(2, 5).int().flatten() - 2
    assert len(set(levels.tolist())) == 3
    for level in set(levels.tolist()):
        stride = 4 * 2 ** level
        expected = roi_align(maps[str(level)], boxes, 7, 1 / stride, sampling_ratio=-1, aligned=True)
        assert_near(found[levels == level], expected[levels == level], 1e-4)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('detector', DETECTORS)
def test_every_parameter_learns(detector, name):
    model = _detector(detector, name).train()
    losses = losses_of(model, [torch.rand(3, 48, 60)] * 2, [_target(), _target(number=1)])
    losses['loss'].backward()
    assert losses['loss'] == sum(v for k, v in losses.items() if k != 'loss')
    # the finest convolutions of the pyramid get no boxes in so small an image
    assert all(p.grad is not None for p in model.parameters())
    assert sum(bool(p.grad.abs().sum() > 0) for p in model.parameters()) > .9 * len(list(model.parameters()))


@pytest.mark.parametrize('detector', DETECTORS)
def test_mixed_precision_leaves_boxes_where_they_are(detector):
    torch.manual_seed(0)
    args = dict(SMALL, box_score_thresh=0.) if detector != 'retinanet' else dict(score_thresh=0.)
    model = _detector(detector, min_size=300, max_size=400, detector_args=dict(args, **(
        dict(detections_per_img=20) if detector == 'retinanet' else dict(box_detections_per_img=20))))
    image = torch.rand(3, 300, 400)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        found, = model([image])
    assert all(found[k].dtype == torch.float32 for k in ('boxes', 'scores')) and len(found['boxes'])
    assert (found['boxes'] != found['boxes'].bfloat16()).any(1).all()
    target = _target(300, 400)
    for m in model.modules():
        if hasattr(m, 'drop_prob'):
            m.drop_prob = 0.
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(losses_of(model.train(), [image], [target]))
        losses[-1]['loss'].backward()
    assert losses[0]['loss'].item() == pytest.approx(losses[1]['loss'].item(), rel=.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('detector', DETECTORS)
def test_images_without_objects(detector):
    model = _detector(detector).train()
    for targets in ([_target(number=0)] * 2, [_target(number=0), _target()]):
        losses = losses_of(model, [torch.rand(3, 48, 60)] * 2, targets)
        losses['loss'].backward()
        assert all(v.isfinite() for v in losses.values())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('detector', [  # the first is of the second's parts and ours
    'cascade_mask_rcnn', *(pytest.param(name, marks=pytest.mark.slow) for name in ('mask_rcnn', 'retinanet'))])
def test_overfits_one_image(detector):
    torch.manual_seed(0)
    # the backbone's output hangs on drop path no more, and anchors fit the objects
    args = dict(detections_per_img=20) if detector == 'retinanet' else dict(SMALL)
    model = _detector(detector, fpn_channels=32, head_channels=64, detector_args=args).train()
    for m in model.modules():
        if hasattr(m, 'drop_prob'):
            m.drop_prob = 0.
    image, target = .2 * torch.rand(3, 48, 60), _target()
    image[0, 5:20, 5:20] += .8
    image[1, 20:40, 30:50] += .8
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(120):
        loss = losses_of(model, [image, image], [target, target])['loss']
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
    with torch.no_grad():
        found, = model.eval()([image])
    best = {k: x[:2] for k, x in found.items()}
    order = best['labels'].argsort()
    assert best['labels'][order].tolist() == [1, 3]
    assert (best['boxes'][order] - target['boxes']).abs().max() < 4
    if 'masks' in best:
        masks = best['masks'][order, 0] > .5
        overlap = (masks & target['masks'].bool()).sum((1, 2)) / (masks | target['masks'].bool()).sum((1, 2))
        assert overlap.min() > .7


def test_a_cascade_of_one_head_scores_as_that_head():
    model = _detector('cascade_mask_rcnn')
    images = [torch.rand(3, 48, 60)]
    stage = model.roi_heads.stages[0]
    with torch.no_grad():
        model.roi_heads = CascadeRoIHeads([stage], [1.]).eval()
        found, = model(images)
        model.roi_heads = stage  # torchvision's own
        expected, = model(images)
    assert found.keys() == expected.keys() and len(found['boxes'])
    for k in found:
        assert_near(found[k], expected[k], 1e-4)


def test_heads_of_a_cascade_ask_for_more_and_start_where_the_last_ended(monkeypatch):
    model = _detector('cascade_mask_rcnn').train()
    stages = model.roi_heads.stages
    assert [s.proposal_matcher.high_threshold for s in stages] == [.5, .6, .7]
    for stage, (centre, side) in zip(stages, ((.1, .2), (.05, .1), (.033, .067))):
        assert [1 / w for w in stage.box_coder.weights] == pytest.approx([centre, centre, side, side])
    given = []
    for stage in stages:
        original = stage.select_training_samples

        def keep(proposals, targets, original=original):
            given.append([p.clone() for p in proposals])
            return original(proposals, targets)
        monkeypatch.setattr(stage, 'select_training_samples', keep)
    target = _target()
    model([torch.rand(3, 48, 60)], [target])
    assert len(given) == 3 and not any(p.requires_grad for g in given for p in g)
    for later in given[1:]:
        # boxes of the truth are given by each head anew, and not handed on
        assert not (later[0][:, None] == target['boxes']).all(-1).any()
        assert 0 < len(later[0]) <= SMALL['box_batch_size_per_image']


def test_a_cascade_does_not_hand_on_truths(monkeypatch):
    model = _detector('cascade_mask_rcnn').train()
    target, given, sampled = _target(), [], []
    for stage in model.roi_heads.stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)  # nothing moves: a truth handed on would still be one
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
        original = stage.select_training_samples

        def keep(proposals, targets, original=original):
            given.append(proposals[0])
            result = original(proposals, targets)
            sampled.append(result[0][0])
            return result
        monkeypatch.setattr(stage, 'select_training_samples', keep)
    model([torch.rand(3, 48, 60)], [target])

    def is_truth(boxes):
        return ((boxes[:, None] - target['boxes']).abs().amax(-1) < .01).any(1)

    assert [int(is_truth(boxes).sum()) for boxes in sampled] == [2, 2, 2]
    for before, after in zip(sampled, given[1:]):
        assert len(after) and not is_truth(after).any()
        torch.testing.assert_close(after, before[~is_truth(before)], atol=1e-3, rtol=0.)


def test_weights_of_a_cascade_are_one_for_each_head():
    with pytest.raises(ValueError, match='loss_weights'):
        CascadeRoIHeads([], [1.])


PUBLISHED = {  # millions; Mask R-CNN, Cascade Mask R-CNN
    'elsa_swin_tiny': (49, 86), 'elsa_swin_small': (72, 110)}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_those_published(name):
    for detector, published in zip(('mask_rcnn', 'cascade_mask_rcnn'), PUBLISHED[name]):
        with torch.device('meta'):
            model = create_detector(DenseBackbone(name), 80, detector)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - published) <= .5


@pytest.mark.parametrize('change, message', [
    (dict(labels=torch.tensor([1, 4])), 'class 4'),
    (dict(labels=torch.tensor([0, 1])), 'class 0'),
    (dict(labels=torch.tensor([1])), 'boxes of image 1: got shape'),
    (dict(masks=torch.zeros(2, 48, 61)), 'masks of image 1: got shape'),
    (dict(masks=torch.zeros(1, 48, 60)), 'masks of image 1: got shape'),
    (dict(boxes=torch.tensor([[5., 5, 20, 20], [30, 20, 61, 40]])), r'boxes of image 1: got \[30'),
    (dict(boxes=torch.tensor([[5., -1, 20, 20], [30, 20, 50, 40]])), r'boxes of image 1: got \[5'),
    (dict(boxes=torch.tensor([[5., 5, 20, 20], [30, 20, 30, 40]])), r'boxes of image 1: got \[30'),
])
def test_bad_targets_are_named(change, message):
    images = [torch.rand(3, 48, 60)] * 2
    check_targets(images, [_target(), _target()], 3)
    with pytest.raises(ValueError, match=message):
        check_targets(images, [_target(), {**_target(), **change}], 3)


@pytest.mark.parametrize('kwargs, message', [
    (dict(detector='yolo'), "detector: got 'yolo'"),
    (dict(anchor_sizes=(8, 16)), 'anchor_sizes: got 2'),
    (dict(detector_args=dict(no_such=1)), "detector_args: got 'no_such'"),
    (dict(detector='cascade_mask_rcnn', detector_args=dict(box_fg_iou_thresh=.5)), 'detector_args: got'),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _detector(**kwargs)


def test_the_loop_finds_what_it_asks_for():
    model = _detector()
    model.set_grad_checkpointing()
    assert model.backbone.body.body['layers_0'].grad_checkpointing
    names = dict(model.named_parameters())
    assert model.no_weight_decay() and all(n in names for n in model.no_weight_decay())
