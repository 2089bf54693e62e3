"""Segmenters: any size, any decoder, losses, windows, mirrors, scores."""
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
from helpers import assert_near, max_error

import elsa_models  # noqa: F401

smp = pytest.importorskip('segmentation_models_pytorch')

from elsa_models.dense import DenseBackbone  # noqa: E402
from elsa_models.dense.metrics import confusion, segmentation_metrics  # noqa: E402
from elsa_models.dense.segmentation import (  # noqa: E402
    Segmenter,
    segment,
    segmentation_loss,
    sliding_logits,
)


def _segmenter(name='test_elsa_swin', decoder='upernet', **kwargs):
    args = dict(patch_size=8) if 'volo' in name else {}
    decoder_args = dict(decoder_channels=16) if decoder == 'upernet' else {}
    return Segmenter(
        DenseBackbone(name, model_args=args), 4, decoder, decoder_args, **{'aux_channels': 8, **kwargs}).eval()


LARGE = [pytest.param(size, marks=pytest.mark.slow, id=str(size)) for size in ((800, 1333), (1333, 800))]


@pytest.mark.parametrize('name', ['test_elsa_swin', 'test_elsa_volo'])
@pytest.mark.parametrize('size', [(33, 47), (64, 96), (130, 61), *LARGE], ids=str)
def test_any_size(name, size):
    model = _segmenter(name)
    x = torch.randn(2, 3, *size)
    logits = model(x)
    assert logits.shape == (2, 4, *size) and logits.isfinite().all()
    assert_near(model(x[1:]), logits[1:], 1e-4)
    together, aux = model.train()(x)
    assert together.shape == aux.shape == (2, 4, *size)


@pytest.mark.parametrize('kwargs, message', [
    (dict(decoder='no_such'), 'decoder: '),
    (dict(decoder_args=dict(no_such=1)), "decoder_args: got 'no_such'"),
    (dict(decoder_args=dict(classes=3)), "with decoder_args {'classes': 3}"),
    (dict(num_classes=1), 'num_classes: got 1'),
    (dict(decoder_args=dict(encoder_depth=4)), 'encoder_depth'),
])
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(DenseBackbone('test_elsa_swin'), **{'num_classes': 4, **kwargs})


@pytest.mark.parametrize('decoder', ['unet', 'fpn', 'segformer'])
def test_other_decoders(decoder):
    assert _segmenter(decoder=decoder)(torch.randn(1, 3, 40, 50)).shape == (1, 4, 40, 50)


def test_backbone_norms_take_the_place_of_the_decoders():
    assert all(isinstance(m, nn.Identity) for m in _segmenter().net.decoder.feature_norms)
    own = Segmenter(DenseBackbone('test_elsa_swin', norms=False), 4, decoder_args=dict(decoder_channels=16))
    assert all(isinstance(m, nn.LayerNorm) for m in own.net.decoder.feature_norms)


def test_our_volo_is_an_encoder_by_name():
    model = smp.create_model('upernet', 'elsa_volo_d1_224', encoder_weights=None, classes=4)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 96)).shape == (1, 4, 64, 96)
    names = smp.encoders.get_encoder_names()
    assert set(timm.list_models('elsa_volo_*')) <= set(names)


def test_threads_share_no_state_of_the_library():
    before = dict(smp.encoders.encoders)
    backbones = [DenseBackbone('test_elsa_swin', model_args=dict(embed_dim=8 * i)) for i in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda b: Segmenter(b, 4, 'unet'), backbones))
    assert all(m.backbone is b for m, b in zip(models, backbones))
    assert smp.encoders.encoders == before


@pytest.mark.parametrize('aux', [0, 8])
def test_every_parameter_learns(aux):
    model = _segmenter(aux_channels=aux).train()
    segmentation_loss(model(torch.randn(2, 3, 64, 64)), torch.randint(4, (2, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for k, p in model.named_parameters())


def test_loss_by_hand():
    logits, aux = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, 1] = 255
    valid = labels != 255

    def by_hand(x):
        picked = x.log_softmax(1).gather(1, labels.where(valid, 0)[:, None])[:, 0]
        return -picked[valid].mean()

    assert_near(segmentation_loss(logits, labels), by_hand(logits), 1e-6)
    assert_near(segmentation_loss((logits, aux), labels, .3), by_hand(logits) + .3 * by_hand(aux), 1e-6)
    assert segmentation_loss(logits, torch.full_like(labels, 255)) == 0.


@pytest.mark.parametrize('labels, message', [
    (torch.zeros(2, 4, 4, dtype=torch.long), 'shape'),
    (torch.full((2, 4, 5), 3), 'class 3'),
    (torch.full((2, 4, 5), -1), 'class -1'),
])
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        segmentation_loss(torch.randn(2, 3, 4, 5), labels)
    with pytest.raises(ValueError, match=message):
        confusion(torch.zeros(2, 4, 5, dtype=torch.long), labels, 3)


def _pixelwise(x):
    """A model that looks at single pixels."""
    return torch.cat([x, x.square()], 1)


@pytest.mark.parametrize('size', [(16, 16), (20, 33), (7, 40)], ids=str)
@pytest.mark.parametrize('stride', [16, 10, 3])
def test_windows_cover_everything(size, stride):
    x = torch.randn(2, 3, *size)
    seen = []

    def model(part):
        seen.append(part.shape[-2:])
        return _pixelwise(part)

    assert_near(sliding_logits(model, x, 16, stride), _pixelwise(x), 1e-6)
    assert set(seen) == {(min(16, size[0]), min(16, size[1]))}


@pytest.mark.parametrize('stride', [0, 17])
def test_windows_leave_nothing_out(stride):
    with pytest.raises(ValueError, match=f'stride: got {stride}'):
        sliding_logits(_pixelwise, torch.randn(1, 3, 40, 40), 16, stride)


def test_mirrors_are_mirrored_back():
    x = torch.randn(1, 3, 8, 12)
    assert_near(segment(_pixelwise, x, flip=True), _pixelwise(x).softmax(1), 1e-6)
    half = torch.linspace(0, 1, 12).expand(1, 1, 8, 12)

    def biased(x):  # sees the left half alone
        return torch.cat([x * (torch.arange(12) < 6), torch.zeros(1, 1, 8, 12)], 1)

    found = segment(biased, half, flip=True)
    expected = (biased(half).softmax(1) + biased(half.flip(-1)).flip(-1).softmax(1)) / 2
    assert_near(found, expected, 1e-6)
    assert max_error(found, segment(biased, half)) > .01


def test_scales_are_averaged():
    x, seen = torch.randn(1, 3, 20, 30), []

    def model(x):
        seen.append(tuple(x.shape[-2:]))
        return _pixelwise(x)

    found = segment(model, x, scales=(.5, 1., 1.5), flip=True)
    assert seen == [(10, 15)] * 2 + [(20, 30)] * 2 + [(30, 45)] * 2
    assert_near(found.sum(1), torch.ones(1, 20, 30), 1e-5)
    for scales in ((), (0.,)):
        with pytest.raises(ValueError, match='scales'):
            segment(model, x, scales=scales)


def test_scores_by_hand():
    labels = torch.tensor([[0, 0, 1], [1, 255, 2]])
    predicted = torch.tensor([[0, 1, 1], [1, 0, 0]])
    matrix = confusion(predicted, labels, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    metrics = segmentation_metrics(matrix)
    assert metrics['miou'] == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)
    assert metrics['macc'] == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)
    assert metrics['pixel_acc'] == pytest.approx(60)


@pytest.mark.slow  # test_features.py has the backbones
@pytest.mark.parametrize('name', ['test_elsa_swin', 'test_elsa_volo'])
def test_exports_to_onnx_with_open_sizes(tmp_path, name):
    onnxruntime = pytest.importorskip('onnxruntime')
    model = _segmenter(name)
    # symbolic sizes that are multiples of 32 keep the graph free of branches on them
    dim = torch.export.Dim
    sizes = {0: dim('batch', min=1, max=8), 2: 32 * dim('h', min=1, max=40), 3: 32 * dim('w', min=1, max=40)}
    torch.onnx.export(
        model, (torch.randn(2, 3, 96, 128),), tmp_path / 'model.onnx', input_names=['image'], dynamic_shapes=(sizes,),
        dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    for size in ((1, 3, 160, 64), (2, 3, 96, 128), (1, 3, 32, 32), (3, 3, 64, 224), (1, 3, 256, 192)):
        x = torch.randn(size)
        with torch.no_grad():
            assert_near(torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), model(x), 1e-4)
