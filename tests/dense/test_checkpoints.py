"""Checkpoints of detectors and segmenters in the names of mmdetection and mmsegmentation."""
import re

import pytest
import torch
from helpers import to_authors

import elsa_models  # noqa: F401
from elsa_models.dense import DenseBackbone
from elsa_models.dense.detection import create_detector
from elsa_models.models._checkpoint import WeightsError

pytest.importorskip('segmentation_models_pytorch')

from elsa_models.dense.checkpoints import load_authors_checkpoint  # noqa: E402
from elsa_models.dense.segmentation import Segmenter  # noqa: E402


def _detector(detector='mask_rcnn'):
    return create_detector(DenseBackbone('test_elsa_swin'), 3, detector, fpn_channels=16, head_channels=32)


def _segmenter():
    return Segmenter(DenseBackbone('test_elsa_swin'), 4, decoder_args=dict(decoder_channels=16), aux_channels=8)


def _backbone(model, prefix):
    """The backbone's part of a state dict, as the authors name it."""
    found = {k[len(prefix):]: x for k, x in model.state_dict().items() if k.startswith(prefix)}
    body = {k[5:].replace('layers_', 'layers.'): x for k, x in found.items() if k.startswith('body.')}
    return {**to_authors(body), **{k: x for k, x in found.items() if k.startswith('norm')}}


def _theirs(model, detector):
    """The state dict of a detector as mmdetection writes it."""
    w = {k: x for k, x in model.state_dict().items()}
    out = {f'backbone.{k}': x for k, x in _backbone(model, 'backbone.body.').items()}
    for part in ('weight', 'bias'):
        for i in range(4):
            out[f'neck.lateral_convs.{i}.conv.{part}'] = w[f'backbone.fpn.inner_blocks.{i}.0.{part}']
            out[f'neck.fpn_convs.{i}.conv.{part}'] = w[f'backbone.fpn.layer_blocks.{i}.0.{part}']
        out[f'rpn_head.rpn_conv.{part}'] = w[f'rpn.head.conv.0.0.{part}']
        out[f'rpn_head.rpn_cls.{part}'] = w[f'rpn.head.cls_logits.{part}']
        out[f'rpn_head.rpn_reg.{part}'] = w[f'rpn.head.bbox_pred.{part}']
        for i, stage in enumerate(['roi_heads.'] if detector == 'mask_rcnn' else [f'roi_heads.stages.{i}.' for i in
                                                                                 range(3)]):
            number = '' if detector == 'mask_rcnn' else f'{i}.'
            box, mask = f'roi_head.bbox_head.{number}', f'roi_head.mask_head.{number}'
            score = w[f'{stage}box_predictor.cls_score.{part}']
            out[f'{box}fc_cls.{part}'] = torch.cat([score[1:], score[:1]])  # the background is the last
            out[f'{box}fc_reg.{part}'] = w[f'{stage}box_predictor.bbox_pred.{part}'][4:]
            if detector == 'mask_rcnn':
                out[f'{box}shared_fcs.0.{part}'] = w[f'{stage}box_head.fc6.{part}']
                out[f'{box}shared_fcs.1.{part}'] = w[f'{stage}box_head.fc7.{part}']
            else:
                out[f'{box}shared_fcs.0.{part}'] = w[f'{stage}box_head.5.{part}']
            for j in range(4):
                out[f'{mask}convs.{j}.conv.{part}'] = w[f'{stage}mask_head.{j}.0.{part}']
                if detector != 'mask_rcnn':
                    if part == 'weight':
                        out[f'{box}shared_convs.{j}.conv.weight'] = w[f'{stage}box_head.{j}.0.weight']
                    for p in ('running_mean', 'running_var') if part == 'bias' else ('weight', 'bias'):
                        out[f'{box}shared_convs.{j}.bn.{p}'] = w[f'{stage}box_head.{j}.1.{p}']
            out[f'{mask}upsample.{part}'] = w[f'{stage}mask_predictor.conv5_mask.{part}']
            out[f'{mask}conv_logits.{part}'] = w[f'{stage}mask_predictor.mask_fcn_logits.{part}'][1:]
    return {k: x.clone() for k, x in out.items()}


@pytest.mark.parametrize('detector', ['mask_rcnn', 'cascade_mask_rcnn'])
def test_detectors(tmp_path, detector):
    source, model = _detector(detector), _detector(detector)
    for name, x in source.state_dict().items():
        if 'running' in name:
            x.add_(torch.rand_like(x))
    theirs = _theirs(source, detector)
    torch.save(dict(meta=dict(epoch=12), state_dict=theirs), tmp_path / 'x.pth')
    report = load_authors_checkpoint(model, tmp_path / 'x.pth')
    assert not report.missing
    assert all(re.search(r'relative_id|attn_mask', k) for k in report.unused) and len(report.unused) == 1
    weights = source.state_dict()
    for name, x in model.state_dict().items():
        if name.endswith('num_batches_tracked'):
            continue
        if re.search(r'roi_heads.*(bbox_pred|mask_fcn_logits)', name):  # the background has none there
            n = 4 if 'bbox_pred' in name else 1
            assert (x[:n] == 0).all() and torch.equal(x[n:], weights[name][n:]), name
        else:
            assert torch.equal(x, weights[name]), name
    assert f'{len(report.loaded)} loaded, 1 unused, 0 missing' in str(report)


def test_segmenter(tmp_path):
    source, model = _segmenter(), _segmenter()
    w = source.state_dict()
    theirs = {f'backbone.{k}': x for k, x in _backbone(source, 'net.encoder.backbone.').items()}
    convs = {f'psp_modules.{i}.1': f'psp.blocks.{i}.1' for i in range(4)}
    convs.update(bottleneck='psp.out_conv', fpn_bottleneck='fusion_block')
    for i, j in ((0, 2), (1, 1), (2, 0)):
        convs[f'lateral_convs.{i}'] = f'fpn_lateral_blocks.{j}.conv_norm_relu'
        convs[f'fpn_convs.{i}'] = f'fpn_conv_blocks.{j}'
    places = {f'decode_head.{a}': f'net.decoder.{b}' for a, b in convs.items()}
    places['auxiliary_head.convs.0'] = 'aux_head'
    for a, b in places.items():
        theirs[f'{a}.conv.weight'] = w[f'{b}.0.weight']
        theirs.update({f'{a}.bn.{p}': w[f'{b}.1.{p}'] for p in ('weight', 'bias', 'running_mean', 'running_var')})
    for p in ('weight', 'bias'):
        theirs[f'decode_head.conv_seg.{p}'] = w[f'net.segmentation_head.0.{p}']
        theirs[f'auxiliary_head.conv_seg.{p}'] = w[f'aux_head.4.{p}']
    torch.save(dict(state_dict=theirs), tmp_path / 'x.pth')
    report = load_authors_checkpoint(model, tmp_path / 'x.pth')
    assert not report.missing and len(report.unused) == 1
    for name, x in model.state_dict().items():
        assert name.endswith('num_batches_tracked') or torch.equal(x, w[name]), name
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(images), source.eval()(images))


def test_a_backbone_alone(tmp_path):
    source = _detector()
    torch.save(dict(state_dict=_theirs(source, 'mask_rcnn')), tmp_path / 'x.pth')
    backbone = DenseBackbone('test_elsa_swin').eval()
    load_authors_checkpoint(backbone, tmp_path / 'x.pth')
    x = torch.randn(1, 3, 40, 60)
    for a, b in zip(backbone(x), source.eval().backbone.body(x)):
        assert torch.equal(a, b)
    model = _segmenter()
    report = load_authors_checkpoint(model, tmp_path / 'x.pth', heads=False)
    assert report.missing and not any(k.startswith('net.encoder.') for k in report.missing)


@pytest.mark.parametrize('heads', [False, True])
def test_a_retinanet_takes_the_backbone(tmp_path, heads):
    theirs, model = _theirs(_detector(), 'mask_rcnn'), _detector('retinanet')
    torch.save(dict(state_dict=theirs), tmp_path / 'x.pth')
    report = load_authors_checkpoint(model, tmp_path / 'x.pth', heads=heads)
    body = model.backbone.body
    assert torch.equal(body.norm1.weight, theirs['backbone.norm1.weight'])
    assert torch.equal(body.body['patch_embed'].proj.weight, theirs['backbone.patch_embed.proj.weight'])
    assert 'backbone.norm0.weight' in report.unused
    assert not any(k.startswith('backbone.body.') for k in report.missing)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('backbone.norm2.bias'), 'backbone.body.norm2.bias is missing'),
    (lambda s: s.update({'neck.fpn_convs.0.conv.bias': torch.zeros(3)}), r'has shape \(3,\) instead of \(16,\)'),
    (lambda s: s.update({'backbone.norm4.bias': torch.zeros(3)}), 'norm4.bias is unknown'),
])
def test_what_does_not_fit_changes_nothing(tmp_path, change, message):
    model, theirs = _detector(), _theirs(_detector(), 'mask_rcnn')
    change(theirs)
    torch.save(dict(state_dict=theirs), tmp_path / 'x.pth')
    before = {k: x.clone() for k, x in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_authors_checkpoint(model, tmp_path / 'x.pth')
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_other_models_are_named(tmp_path):
    torch.save(dict(state_dict=_theirs(_detector(), 'mask_rcnn')), tmp_path / 'x.pth')
    with pytest.raises(WeightsError, match='test_elsa_volo: must be the name of a model'):
        load_authors_checkpoint(DenseBackbone('test_elsa_volo', model_args=dict(patch_size=8)), tmp_path / 'x.pth')
    with pytest.raises(WeightsError, match='0 backbones'):
        load_authors_checkpoint(torch.nn.Linear(1, 1), tmp_path / 'x.pth')
