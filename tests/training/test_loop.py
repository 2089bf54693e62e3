import math

import pytest
import timm
import torch
from timm.task import ClassificationTask

import elsa_models  # noqa: F401
from elsa_models.training import Recipe
from elsa_models.training.loop import create_optimizer, evaluate, predict, train_epoch


@pytest.fixture
def task():
    model = timm.create_model('test_elsa_swin', num_classes=3, img_size=32, drop_path_rate=0.5, drop_rate=0.5)
    return ClassificationTask(model, verbose=False)


@pytest.fixture
def batches():
    return [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, i])) for i in range(3)]


def test_predictions_are_those_of_the_model_at_rest(task, batches):
    task.train()
    logits, targets = predict(task, batches)
    assert targets.tolist() == torch.cat([t for _, t in batches]).tolist()
    task.trainable_module.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, torch.cat([task.trainable_module(x) for x, _ in batches]))
    metrics = evaluate(task, batches)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(dim=-1) == targets).float().mean().item())
    assert metrics['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_learning_rate_warms_up_and_ends_at_its_minimum(task, batches):
    recipe = Recipe(epochs=4, lr=0.1, warmup_epochs=1., warmup_lr=0.01, min_lr=0.001, opt='sgd')
    optimizer, scheduler = create_optimizer(recipe, task.trainable_module, len(batches))
    rates = [optimizer.param_groups[0]['lr']]
    for step in range(1, 13):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[:3] == pytest.approx([0.01, 0.04, 0.07])
    # the cosine has run since the start, as timm's does
    expected = [0.001 + 0.0495 * (1 + math.cos(math.pi * step / 12)) for step in range(3, 13)]
    assert rates[3:] == pytest.approx(expected)


def test_layer_decay_and_optimiser_arguments(task):
    recipe = Recipe(layer_decay=0.5, opt_args={'betas': [0.8, 0.9]})
    optimizer, _ = create_optimizer(recipe, task.trainable_module, 1)
    assert len({group['lr_scale'] for group in optimizer.param_groups}) > 3
    assert optimizer.param_groups[0]['betas'] == (0.8, 0.9)


def test_gradient_is_clipped(task, batches):
    recipe = Recipe(opt='momentum', lr=1., sched='none', weight_decay=0.)
    weights = [p.detach().clone() for p in task.parameters()]
    optimizer, scheduler = create_optimizer(recipe, task.trainable_module, 1)
    assert scheduler is None
    train_epoch(task, batches[:1], optimizer, scheduler, 0, clip_grad=1e-3)
    moved = sum((p.detach() - w).square().sum() for p, w in zip(task.parameters(), weights, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=0.05)
