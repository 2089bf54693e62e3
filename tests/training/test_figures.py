import csv

import pytest
import timm
import torch
from PIL import Image

import elsa_models  # noqa: F401
from elsa_models._fonts import legible, shorten
from elsa_models.inference import figures
from elsa_models.inference.classifier import Predictions
from elsa_models.training.data import LabelledImages


def _predictions(targets, predicted):
    targets, predicted = torch.tensor(targets), torch.tensor(predicted)
    number = len(targets)
    return Predictions(
        targets, predicted, torch.full((number,), 0.9), torch.zeros(number), targets >= 0, torch.arange(number))


HARD = [
    '$x^{$', '$', 'a_b^c\\frac{', '大きな犬', 'größe', 'عربي', '\udcff\n', '=1+1,"x"', '<b>', '\U000fffff', 'x' * 99]


def test_any_name_is_drawn(tmp_path, recwarn, caplog):
    targets = torch.arange(len(HARD))
    images = LabelledImages([Image.new('RGB', (9, 9))] * len(HARD), targets.tolist())
    predictions = _predictions(targets.tolist(), targets.flip(0).tolist())
    figures.draw_confusion(targets, targets.flip(0), HARD, tmp_path / 'c.png')
    figures.draw_predictions(images, predictions, HARD, tmp_path / 'p.png')
    Image.new('RGB', (9, 9)).save(tmp_path / 'x.png')
    answers = [figures.Answer(str(tmp_path / 'x.png'), [name], [1.], [0]) for name in HARD]
    figures.draw_contact_sheet(answers, tmp_path / 's.png')
    assert all((tmp_path / f'{name}.png').stat().st_size > 1000 for name in 'cps')
    assert not [w for w in recwarn if 'lyph' in str(w.message)] and not caplog.text


def test_names_without_a_font_are_numbered():
    assert legible(['cat', '\U00013000', '$5']) == ['cat', 'class 1', '$5']
    assert legible(['\U00013000'], [7]) == ['class 7']
    assert len(shorten('a name of many words and more')) <= 18


def test_classes_are_measured(tmp_path):
    from sklearn.metrics import precision_recall_fscore_support
    targets, predicted = torch.randint(4, (2, 50)).unbind()
    figures.write_classes(targets, predicted, ['=a', 'b,', 'c"', 'd', 'absent'], tmp_path / 'c.csv')
    with open(tmp_path / 'c.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == ["'=a", 'b,', 'c"', 'd', 'absent']
    expected = precision_recall_fscore_support(targets, predicted, zero_division=0.)
    for column, values in zip(('precision', 'recall', 'f1', 'images'), expected, strict=True):
        scale = 1 if column == 'images' else 100
        assert [float(row[column]) for row in rows[:4]] == pytest.approx((values * scale).tolist(), abs=0.01)
    assert rows[4]['images'] == '0' and rows[4]['recall'] == ''


def test_curves_are_drawn(tmp_path):
    history = [dict(epoch=i + 1, train_loss=1. / (i + 1), val_loss=2. / (i + 1), val_top1=10. * i) for i in range(3)]
    figures.draw_curves(history, tmp_path / 'c.png')
    with Image.open(tmp_path / 'c.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 24)) > 50


@pytest.mark.parametrize('number', [2, 60])
def test_confusion_is_drawn(tmp_path, number):
    targets = torch.arange(number).repeat(3)
    predicted = targets.clone()
    predicted[0] = 1
    figures.draw_confusion(targets, predicted, [f'class {i}' for i in range(number)], tmp_path / 'c.png')
    with Image.open(tmp_path / 'c.png') as image:
        assert len(image.convert('RGB').getcolors(1 << 24)) > 50


@pytest.fixture
def model():
    return timm.create_model('test_elsa_swin', num_classes=3, img_size=32, depths=(1, 2, 1, 1)).eval()


def test_attention_of_every_layer_is_what_the_layer_computes(model):
    image = torch.randn(3, 32, 32)
    model.train()
    model.layers[1].eval()  # frozen
    layers = figures.attention_layers(model, image)
    assert model.training and model.layers[0].blocks[0].training and not model.layers[1].blocks[0].training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [layer.name for layer in layers] == [
        'layers.0.blocks.0.attn', 'layers.1.blocks.0.attn', 'layers.1.blocks.1.attn', 'layers.2.blocks.0.attn']
    assert [tuple(layer.weights.shape) for layer in layers] == [
        (8, 8, 1, 5, 5), (4, 4, 2, 5, 5), (4, 4, 2, 5, 5), (2, 2, 4, 5, 5)]
    model.eval()
    with torch.no_grad():
        block = model.layers[0].blocks[0]
        x = block.norm1(model.patch_embed(image[None]))
        expected = block.attn.attention_map(x)[0]
    torch.testing.assert_close(layers[0].weights.flatten(3), expected)


def _layer(weights, kernel_size=3):
    return figures.AttentionLayer('x', kernel_size, 1, weights)


def test_spread_counts_neighbours():
    weights = torch.full((1, 2, 1, 3, 3), 1 / 9)
    weights[0, 1] = 0.
    weights[0, 1, 0, 0, 0] = 1.
    torch.testing.assert_close(figures._spread(_layer(weights)), torch.tensor([[9., 1.]]))


def test_query_is_the_sharpest_pixel_inside():
    weights = torch.full((6, 7, 1, 3, 3), 1 / 9)
    for i, j in ((0, 0), (3, 4)):
        weights[i, j] = 0.
        weights[i, j, 0, 1, 1] = 1.
    assert figures._choose_query(_layer(weights)) == [3, 4]


@pytest.mark.parametrize('number, wrong', [(1, 0), (3, 3), (50, 30)])
@pytest.mark.parametrize('size', [(8, 8), (100, 40)])
def test_predictions_are_drawn(tmp_path, number, wrong, size):
    images = LabelledImages([Image.new('RGB', size, (i, 0, 0)) for i in range(number)], [0] * number)
    predictions = _predictions([0] * number, [1] * wrong + [0] * (number - wrong))
    figures.draw_predictions(images, predictions, ['a class of a very long name', 'other'], tmp_path / 'p.png')
    with Image.open(tmp_path / 'p.png') as image:
        colors = {c for _, c in image.convert('RGB').getcolors(1 << 24)}
    assert ((0xc5, 0x1b, 0x2b) in colors) == (wrong > 0)
    assert ((0x1b, 0x78, 0x37) in colors) == (wrong < number)


@pytest.mark.parametrize('in_chans', [1, 3])
def test_attention_is_drawn(tmp_path, in_chans):
    model = timm.create_model('test_elsa_swin', num_classes=3, img_size=(16, 48), in_chans=in_chans)
    config = dict(mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    figures.draw_attention(
        model, lambda index: torch.zeros(in_chans, 16, 48), config, _predictions([0], [0]), ['a', 'b', 'c'],
        tmp_path / 'a.png')
    with Image.open(tmp_path / 'a.png') as image:
        colors = {c for _, c in image.convert('RGB').getcolors(1 << 24)}
    assert (0xff, 0x7f, 0x0e) in colors and (0x2f, 0x9b, 0xff) in colors
    assert (128, 128, 128) in colors  # grey stays grey, and is not stretched to black or white


def test_attention_needs_a_local_layer(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    with pytest.raises(ValueError, match='no local attention'):
        figures.draw_attention(
            model, lambda index: torch.randn(3, 32, 32), model.pretrained_cfg, _predictions([0], [0]),
            ['a', 'b', 'c'], tmp_path / 'a.png')
