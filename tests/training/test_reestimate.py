"""Statistics of batch norms found anew before a training and before a measurement."""
import pytest
import timm
import torch

from elsa_models.training import Recipe, RecipeError, Validation
from elsa_models.training.data import load_splits
from elsa_models.training.evaluation import reestimate
from elsa_models.training.jobs.classification import ClassificationJob
from elsa_models.training.validate import validate
from elsa_models.training.world import World

ARGS = dict(img_size=32, in_chans=1, depth=2, num_classes=10)
CONFIG = dict(input_size=(1, 32, 32), interpolation='bilinear', mean=(.5,), std=(.5,), crop_pct=1., crop_mode='center')


def statistics(model):
    return {k: x for k, x in model.state_dict().items() if 'running' in k}


def test_statistics_are_those_of_training_images():
    model = timm.create_model('test_refiner_vit', **ARGS)
    splits = load_splits(Recipe(data='digits'), mode='L')
    transform = splits.train.transform
    weights = {k: x.clone() for k, x in model.state_dict().items() if 'running' not in k and 'tracked' not in k}
    before = {k: x.clone() for k, x in statistics(model).items()}
    found = []
    for batch_size in (40, 16):
        reestimate(model, splits.train, 40, batch_size, World(torch.device('cpu')), CONFIG)
        found.append(statistics(model)['patch_embed.bn1.running_mean'].clone())
        assert model.patch_embed.bn1.num_batches_tracked == 40 // batch_size
    assert splits.train.transform is transform
    assert all((statistics(model)[k] - x).abs().max() > 0 for k, x in before.items())
    assert all(torch.equal(model.state_dict()[k], x) for k, x in weights.items())
    torch.testing.assert_close(*found, rtol=.3, atol=.02)  # 32 of the 40 images


def test_before_a_measurement(tmp_path):
    values = dict(
        data='digits', model='test_refiner_vit', pretrained=False, model_args=dict(img_size=32, depth=2),
        num_classes=10, limit=12)
    torch.manual_seed(0)
    plain = validate(Validation(**values))
    torch.manual_seed(0)
    anew = validate(Validation(**values, reestimate=32))
    assert anew['images'] == plain['images'] and anew['loss'] != plain['loss']


def test_before_a_training():
    recipe = Recipe(
        data='digits', model='test_refiner_vit', model_args=dict(img_size=32, depth=2), limit=12, reestimate=32,
        figures=False, onnx=False)
    job = ClassificationJob(recipe, World(torch.device('cpu')))
    assert job.model.blocks[1].attn.refine.bn1.num_batches_tracked == 1
    assert job.splits.train.transform is not None


def test_what_cannot_be_found_anew_is_refused():
    splits = load_splits(Recipe(data='digits'), mode='L')
    model = timm.create_model('test_vit', img_size=32, in_chans=1)
    with pytest.raises(RecipeError, match='reestimate: .* has no BatchNorm'):
        reestimate(model, splits.train, 8, 8, World(torch.device('cpu')), CONFIG)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(RecipeError, match='reestimate: images that come as a stream'):
        reestimate(model, Stream(), 8, 8, World(torch.device('cpu')), CONFIG)


@pytest.mark.parametrize('part', ['val', 'all'])
def test_what_cannot_be_read_is_named_once(image_folder, caplog, part):
    (image_folder / 'red' / '3.png').write_bytes(b'no image')
    validate(Validation(
        data=str(image_folder), model='test_refiner_vit', pretrained=False, model_args=dict(img_size=32, depth=1),
        num_classes=2, part=part, reestimate=1000, val_fraction=.25))
    assert sum('3.png' in record.getMessage() for record in caplog.records) == 1


def test_a_training_names_what_cannot_be_read_when_it_comes_to_it(image_folder, caplog):
    (image_folder / 'red' / '3.png').write_bytes(b'no image')
    ClassificationJob(Recipe(
        data=str(image_folder), model='test_refiner_vit', model_args=dict(img_size=32, depth=1), reestimate=1000,
        figures=False, onnx=False), World(torch.device('cpu')))
    assert not any('3.png' in record.getMessage() for record in caplog.records)
