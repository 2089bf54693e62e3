import csv
import math

import pytest
import timm
import torch
from timm.task import ClassificationTask

import elsa_models  # noqa: F401
from elsa_models.training import BaseRecipe, DivergedError, Job, OutputError, RecipeError, Trainer, World
from elsa_models.training.loop import create_optimizer

WORLD = World(torch.device('cpu'))


class Loader:
    """Three steps of two parts each, the same in every epoch."""
    steps, batch_size = 3, 8

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, i % 3])) for i in range(6)]

    def epoch(self, epoch, start=0):
        for step in range(start, self.steps):
            yield self.batches[2 * step:2 * step + 2]

    def take_unreadable(self):
        return 0


class SmallJob(Job):
    metric = 'value'

    def __init__(self, recipe, world=WORLD, values=(), drop=0.5):
        torch.manual_seed(0)
        model = timm.create_model(
            'test_elsa_swin', num_classes=3, img_size=32, drop_path_rate=drop, drop_rate=drop, depths=(1, 1, 1, 1))
        self.task = ClassificationTask(model, verbose=False)
        self.train_loader = Loader()
        self.values = list(values)
        self.evaluated = []

    def evaluate(self, model):
        assert not model.training
        self.evaluated.append({k: x.clone() for k, x in model.state_dict().items()})
        return dict(value=self.values[len(self.evaluated) - 1] if self.values else 0.)

    def whole_model(self):
        raise NotImplementedError

    def finish(self, model, folder, history):
        raise NotImplementedError


def _recipe(**kwargs):
    return BaseRecipe(**{**dict(epochs=2, lr=1e-3, warmup_epochs=0.), **kwargs})


def _train(folder, job=None, **kwargs):
    recipe = _recipe(**kwargs)
    trainer = Trainer(recipe, job or SmallJob(recipe), WORLD, folder)
    trainer.run()
    return trainer


def _weights(trainer):
    return {k: x.clone() for k, x in trainer.job.model.state_dict().items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


def test_learning_rate_warms_up_and_ends_at_its_minimum():
    model = torch.nn.Linear(1, 1)
    recipe = BaseRecipe(epochs=4, lr=0.1, warmup_epochs=1., warmup_lr=0.01, min_lr=0.001, opt='sgd', cooldown_epochs=1)
    optimizer, scheduler = create_optimizer(recipe, model, 3)
    rates = [optimizer.param_groups[0]['lr']]
    for step in range(1, 16):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    assert rates[:3] == pytest.approx([0.01, 0.04, 0.07])
    # the cosine has run since the start, as timm's does
    expected = [0.001 + 0.0495 * (1 + math.cos(math.pi * step / 12)) for step in range(3, 13)]
    assert rates[3:] == pytest.approx(expected + [0.001] * 3)


def test_layer_decay_and_optimiser_arguments():
    model = SmallJob(None).model
    optimizer, _ = create_optimizer(_recipe(layer_decay=0.5, opt_args={'betas': [0.8, 0.9]}), model, 1)
    assert len({group['lr_scale'] for group in optimizer.param_groups}) > 3
    assert optimizer.param_groups[0]['betas'] == (0.8, 0.9)


@pytest.mark.parametrize('values,tolerance', [
    (dict(clip_grad=0.5), 1e-3),
    # AdamW, and a norm that is clipped, forgive a factor of all gradients; these do not
    (dict(opt='sgd', lr=0.01), 1e-3),
    (dict(opt='sgd', lr=0.01, clip_grad=0.5, amp='float16'), .05),
])
def test_step_is_that_of_plain_pytorch(tmp_path, values, tolerance):
    values = dict(values, sched='none')
    trainer = Trainer(_recipe(epochs=1, **values), SmallJob(None, drop=0.), WORLD, tmp_path)
    if trainer.scaler.is_enabled():  # one that does not overflow, which would skip a step
        trainer.scaler = torch.amp.GradScaler('cpu', init_scale=256.)
    trainer.run()
    job = SmallJob(None, drop=0.)
    before = {k: x.clone() for k, x in job.model.state_dict().items()}
    optimizer, _ = create_optimizer(_recipe(**values), job.model, 3)
    for step in range(3):
        images, targets = (torch.cat(x) for x in zip(*job.train_loader.batches[2 * step:2 * step + 2]))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(job.model.train()(images), targets).backward()
        if 'clip_grad' in values:
            torch.nn.utils.clip_grad_norm_(job.model.parameters(), values['clip_grad'])
        optimizer.step()
    expected, found = (
        torch.cat([(x - before[k]).flatten() for k, x in model.state_dict().items()])
        for model in (job.model, trainer.job.model))
    assert expected.norm() > 0 and (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize('values', [
    dict(), dict(ema_decay=0.9), dict(opt='momentum', sched='step', sched_args=dict(decay_epochs=1)),
    dict(amp='bfloat16'), dict(head_epochs=1), dict(amp='float16', clip_grad=1.),
])
def test_stopped_at_every_step_it_goes_on_as_if_nothing_had_been(tmp_path, values):
    whole = _train(tmp_path / 'whole', **values)

    class Stop(Exception):
        pass

    stops = 0
    while True:
        job = SmallJob(None)
        trainer = Trainer(_recipe(checkpoint_steps=1, **values), job, WORLD, tmp_path / 'parts')
        save = trainer.save

        def save_and_stop(*args, save=save):
            save(*args)
            raise Stop

        trainer.save = save_and_stop
        try:
            trainer.run()
            break
        except Stop:
            stops += 1
    assert stops == 6
    assert _equal(_weights(trainer), _weights(whole))
    losses = [[row['train_loss'] for row in t.history] for t in (trainer, whole)]
    assert losses[0] == losses[1] and trainer.best == whole.best
    assert _equal(trainer.checkpoints.load_best()['model'], whole.checkpoints.load_best()['model'])


@pytest.mark.parametrize('sched', ['tanh', 'poly', 'step', 'multistep', 'wsd', 'rsqrt', 'constant', 'none'])
def test_every_schedule_goes_on(tmp_path, sched):
    whole = _train(tmp_path / 'whole', sched=sched, warmup_epochs=0.5)
    recipe = _recipe(sched=sched, warmup_epochs=0.5)
    trainer = Trainer(recipe, SmallJob(recipe), WORLD, tmp_path / 'parts')
    trainer.epochs = 1
    trainer.run()
    assert _equal(_weights(_train(tmp_path / 'parts', sched=sched, warmup_epochs=0.5)), _weights(whole))


def test_log_has_a_row_for_each_epoch(tmp_path):
    _train(tmp_path, SmallJob(None, values=[1., 3.]))
    with open(tmp_path / 'log.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['epoch'], row['step'], row['val_value']) for row in rows] == [('1', '3', '1'), ('2', '6', '3')]
    assert [float(row['lr']) for row in rows] == pytest.approx([5e-4, 0.]) and 0. < float(rows[0]['train_loss']) < 3.


@pytest.mark.parametrize('higher, best', [(True, 1), (False, 2)])
def test_best_epoch_is_kept(tmp_path, higher, best):
    job = SmallJob(None, values=[2., 5., 1., 4.])
    job.higher_is_better = higher
    trainer = _train(tmp_path, job, epochs=4)
    assert trainer.best == (best, [5., 1.][best - 1])
    assert _equal(trainer.best_model().state_dict(), job.evaluated[best])


def test_moving_average_is_what_is_evaluated_and_kept(tmp_path):
    job = SmallJob(None)
    trainer = _train(tmp_path, job, ema_decay=0.9, epochs=1)
    ema = {k[7:]: x for k, x in job.evaluated[0].items()}
    assert not _equal(ema, _weights(trainer))
    assert _equal(trainer.best_model().state_dict(), ema)
    expected = None
    weights = [SmallJob(None).model.state_dict()]
    # replayed: step by step, the average of the weights after each
    job = SmallJob(None)
    trainer = Trainer(_recipe(epochs=1), job, WORLD, tmp_path / 'other')
    step = trainer.train_step

    def record(parts):
        loss = step(parts)
        weights.append(_weights(trainer))
        return loss

    trainer.train_step = record
    trainer.run()
    expected = weights[1]  # timm takes the first as it is
    for w in weights[2:]:
        expected = {k: 0.9 * x + 0.1 * w[k] if x.is_floating_point() else x for k, x in expected.items()}
    for name, x in expected.items():
        torch.testing.assert_close(ema[name], x, atol=1e-6, rtol=1e-5)


def test_frozen_modules_and_head_epochs(tmp_path):
    before = SmallJob(None).model.state_dict()

    def moved(trainer):
        return {n.split('.')[0] + '.' + n.split('.')[1] for n, x in _weights(trainer).items()
                if not torch.equal(x, before[n])}

    trainer = _train(tmp_path / 'a', freeze=('patch_embed', 'layers.[01]'))
    assert moved(trainer) == {'layers.2', 'layers.3', 'norm.weight', 'norm.bias', 'head.fc'}
    assert moved(_train(tmp_path / 'b', epochs=1, head_epochs=1)) == {'head.fc'}
    trainer = _train(tmp_path / 'c', epochs=2, head_epochs=1, freeze=('layers.0',))
    assert 'layers.1' in moved(trainer) and 'layers.0' not in moved(trainer)
    with pytest.raises(RecipeError, match="freeze: 'stem' is the name of no module; the topmost are patch_embed"):
        _train(tmp_path / 'd', freeze=('stem',))
    with pytest.raises(RecipeError, match='leaves nothing to train'):
        _train(tmp_path / 'd', freeze=('*',))


def test_what_a_job_has_frozen_stays_frozen(tmp_path):
    job = SmallJob(None)
    job.model.layers[0].requires_grad_(False)
    before = {k: x.clone() for k, x in job.model.state_dict().items()}
    after = _weights(_train(tmp_path, job, head_epochs=1, freeze=('layers.1',)))
    moved = {k for k, x in after.items() if not torch.equal(x, before[k])}
    assert not any(k.startswith(('layers.0', 'layers.1')) for k in moved)
    assert any(k.startswith('layers.2') for k in moved)


def test_frozen_modules_are_at_rest(tmp_path):
    recipe = _recipe(freeze=('layers',))
    trainer = Trainer(recipe, SmallJob(recipe), WORLD, tmp_path)
    trainer._start_phase()
    trainer._train_mode()
    model = trainer.job.model
    assert model.training and model.head.training and not any(m.training for m in model.layers.modules())


@pytest.mark.parametrize('values', [dict(grad_checkpointing=True), dict(channels_last=True)])
def test_ways_to_compute_change_nothing_but_rounding(tmp_path, values):
    expected = _weights(_train(tmp_path / 'a', epochs=1))
    found = _weights(_train(tmp_path / 'b', epochs=1, **values))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize('amp', ['bfloat16', 'float16'])
def test_mixed_precision_is_used(tmp_path, amp):
    trainer = _train(tmp_path, epochs=1, amp=amp)
    seen = []
    trainer.job.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.job.evaluated.clear()
    trainer.job.evaluate = lambda model: model(torch.randn(2, 3, 32, 32)) is None or {}
    trainer.evaluate()
    assert trainer.scaler.is_enabled() == (amp == 'float16')
    assert _weights(trainer)['norm.weight'].dtype == torch.float32
    head = trainer.job.model.head.fc
    head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.evaluate()
    assert seen[-1] == getattr(torch, amp)


def test_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path):
    job = SmallJob(None)
    trainer = Trainer(_recipe(checkpoint_steps=1), job, WORLD, tmp_path)
    job.train_loader.batches[4][0].fill_(float('nan'))
    with pytest.raises(DivergedError, match='the loss of epoch 1 is nan, before or at step 3 of 3'):
        trainer.run()
    state = trainer.checkpoints.load_newest()
    assert (state['epoch'], state['step']) == (0, 2) and all(x.isfinite().all() for x in state['model'].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    job = SmallJob(None)
    trainer = _train(tmp_path, job)
    files = {p.name: p.read_bytes() for p in trainer.checkpoints.folder.iterdir()}
    job.model.head.fc.bias.data[0] = float('inf')
    trainer.step = 1
    with pytest.raises(DivergedError, match=r'head\.fc\.bias is no longer finite'):
        trainer.save(True)
    assert {p.name: p.read_bytes() for p in trainer.checkpoints.folder.iterdir()} == files


def test_other_data_is_not_resumed(tmp_path):
    _train(tmp_path, epochs=1)
    job = SmallJob(None)
    job.train_loader.steps = 2
    with pytest.raises(RecipeError, match='an epoch of the unfinished run had 3 steps, now it has 2'):
        _train(tmp_path, job)


def test_log_that_cannot_be_written(tmp_path):
    (tmp_path / 'log.csv').mkdir()
    with pytest.raises(OutputError, match=r'log\.csv: cannot be written'):
        _train(tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    job = SmallJob(None)
    job.preview = lambda args: args[0].sigmoid()
    _train(tmp_path, job, tensorboard=True, log_steps=1)
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert [e.step for e in events.Scalars('train/loss')] == [1, 2, 3, 4, 5, 6]
    assert {'train/lr', 'train/images_per_second', 'epoch/val_value'} <= set(events.Tags()['scalars'])
    assert events.Tags()['images'] == ['inputs']
