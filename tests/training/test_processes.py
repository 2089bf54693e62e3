"""Runs as processes of their own: killed and continued, and several that work together."""
import ast
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forked import Forked
from safetensors.torch import load_file

from elsa_models.training.world import join_world, leave_world

ROOT = Path(__file__).parents[2]
DENSE = [
    '--epochs', '2', '--train-images', '12', '--val-images', '5', '--size', '48', '--batch-size', '4', '--model-args',
    'img_size=48', 'window_size=3', 'drop_path_rate=0.1', '--short-sides', '48', '56', '--device', 'cpu']
JOBS = {  # script, recipe, small values, steps of an epoch
    'classification': ('train.py', 'digits.yaml', [
        '--epochs', '2', '--limit', '24', '--model-args', 'img_size=32', 'kernel_size=3', 'drop_path_rate=0.1',
        '--batch-size', '16', '--no-onnx', '--no-figures', '--device', 'cpu'], 11),
    'detection': ('train_detection.py', 'detection/shapes.yaml', [
        *DENSE, '--fpn-channels', '16', '--head-channels', '32', '--anchor-sizes', '8', '16', '24', '32', '48',
        '--eval-short-side', '48', '--max-side', '100'], 3),
    'segmentation': ('train_segmentation.py', 'segmentation/shapes.yaml', [
        *DENSE, '--decoder-args', 'decoder_channels=16', '--aux-channels', '8', '--crop-size', '64'], 3),
}


def _arguments(folder, job, arguments):
    _, recipe, small, _ = JOBS[job]
    return ['--config', str(ROOT / 'configs' / recipe), *small, '--output', str(folder), *arguments]


def _run(script, arguments):
    """What the scripts do, in a process that has imported everything already."""
    torch.set_num_threads(1)
    command = importlib.import_module(f'elsa_models.commands.{script.removesuffix(".py")}')
    sys.exit(command.main(arguments))


def _need(job):
    packages = {'detection': 'pycocotools', 'segmentation': 'segmentation_models_pytorch'}
    if job in packages:
        pytest.importorskip(packages[job])


def _start(folder, *arguments, job='classification'):
    return Forked(_run, (JOBS[job][0], _arguments(folder, job, arguments)), cwd=ROOT)


class _Pair:
    """Two forked processes that work together, with the variables that torchrun sets; used as `Forked` is."""

    def __init__(self, function, args=()):
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        variables = dict(os.environ, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
        self._processes = [
            Forked(function, args, dict(variables, RANK=rank, LOCAL_RANK=rank), cwd=ROOT) for rank in '01']

    @property
    def returncode(self):
        """That of a process which has failed, None while all go on."""
        statuses = [process.returncode for process in self._processes]
        return next(filter(None, statuses), None if None in statuses else 0)

    def poll(self):
        return self.returncode

    def terminate(self):
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)

    def communicate(self, timeout=60):
        end = time.monotonic() + timeout
        while self.returncode is None and time.monotonic() < end:
            time.sleep(.02)
        if self.returncode != 0:
            time.sleep(2)  # for the other's error, if it has one
            for process in self._processes:
                if process.returncode is None:
                    process.send_signal(signal.SIGKILL)
        outputs, errors = zip(*(process.communicate() for process in self._processes), strict=True)
        return ''.join(outputs), ''.join(errors)


def _fork_two(folder, *arguments, job='classification'):
    return _Pair(_run, (JOBS[job][0], _arguments(folder, job, arguments)))


def _torchrun(folder, *arguments, job='classification'):
    """The same under torchrun, whose processes import everything first."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / 'scripts' / JOBS[job][0]), *_arguments(folder, job, arguments)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)


def _train(*args, start=_start, **kwargs):
    process = start(*args, **kwargs)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def _wait_for(path, process, timeout=300):
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.001)


def _result(folder):
    """Weights and log of a run; of the log what does not depend on time."""
    run, = folder.iterdir()
    checkpoint = torch.load(sorted((run / 'checkpoints').glob('step-*.pt'))[-1], weights_only=True)
    log = [{k: v for k, v in row.items() if k != 'images_per_second'} for row in checkpoint['history']]
    return load_file(run / 'model' / 'model.safetensors'), checkpoint, log


def _assert_same_bits(folder, other):
    (model, checkpoint, log), (model2, checkpoint2, log2) = _result(folder), _result(other)
    assert all(torch.equal(x, model2[k]) for k, x in model.items()) and log == log2
    for part in ('model', 'ema'):
        assert all(torch.equal(x, checkpoint2[part][k]) for k, x in checkpoint[part].items())


def _kill_and_continue(tmp_path, kills, epochs, *values, job='classification'):
    """Kill a run at random moments; each kill lets it begin at least one step after the checkpoint it found."""
    arguments = ['--epochs', str(epochs), '--checkpoint-steps', '1', '--ema-decay', '0.9', *values]
    _train(tmp_path / 'whole', *arguments, job=job)
    name, = (p.name for p in (tmp_path / 'whole').iterdir())
    steps = epochs * JOBS[job][3]
    generator = random.Random(0)
    folder = tmp_path / 'killed' / f'{name}-running' / 'checkpoints'
    # at random steps, and there at any moment within a step
    for target in sorted(generator.sample(range(1, steps), kills)):
        process = _start(tmp_path / 'killed', *arguments, job=job)
        _wait_for(folder / f'step-{target:010d}.pt', process)
        time.sleep(generator.uniform(0., 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not at its end
    _train(tmp_path / 'killed', *arguments, job=job)
    assert sorted(p.name for p in (tmp_path / 'killed').iterdir()) == [name]
    _assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')


BLENDED = '--mixup', '0.2', '--re-prob', '0.3'


def test_killed_twice_the_weights_are_the_same_bits(tmp_path):
    _kill_and_continue(tmp_path, 2, 1, *BLENDED)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_weights_are_the_same_bits(tmp_path):
    _kill_and_continue(tmp_path, 10, 6, *BLENDED)


@pytest.mark.slow
@pytest.mark.parametrize('values', [['--workers', '1'], ['--amp', 'bfloat16', '--accumulate', '2']], ids=' '.join)
@pytest.mark.parametrize('job', ['detection', 'segmentation'])
def test_dense_jobs_that_are_killed_twice_end_with_the_same_bits(tmp_path, job, values):
    _need(job)
    _kill_and_continue(tmp_path, 2, 2, *values, job=job)


def test_unreadable_images_of_a_repeated_batch_are_counted_once(tmp_path, image_folder):
    (image_folder / 'red' / '3.png').write_bytes(b'no image')
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
        str(ROOT / 'scripts' / 'validate.py'), '--data', str(image_folder), '--part', 'all', '--no-pretrained',
        '--num-classes', '2', '--model-args', 'img_size=32', '--batch-size', '16', '--device', 'cpu', '--output',
        str(tmp_path / 'numbers.json')]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    subprocess.run(command, check=True, timeout=300, env=env)
    numbers = json.loads((tmp_path / 'numbers.json').read_text())
    assert (numbers['images'], numbers['unreadable']) == (15, 1)


@pytest.mark.parametrize('arguments', [
    ['--accumulate', '2', '--clip-grad', '1.', '--head-epochs', '1'],
    ['--fsdp', '--ema-decay', '0.9', '--clip-grad', '1.'],
])
def test_two_processes_follow_one(tmp_path, arguments):
    # AdamW turns rounding of gradients near zero into steps of the size of lr
    arguments = [*arguments, '--model-args', 'drop_path_rate=0.', '--lr', '5e-4']
    _train(tmp_path / 'one', *arguments)
    _train(tmp_path / 'two', *arguments, start=_fork_two)
    (model, _, log), (model2, _, log2) = _result(tmp_path / 'one'), _result(tmp_path / 'two')
    assert model.keys() == model2.keys()
    for name, x in model.items():
        torch.testing.assert_close(model2[name], x, atol=1e-5, rtol=1e-5)
    for row, row2 in zip(log, log2, strict=True):
        assert row == pytest.approx(row2, rel=1e-4)
        assert (row['val_top1'], row['val_top5'], row['val_images']) == (
            row2['val_top1'], row2['val_top5'], row2['val_images'])


@pytest.mark.slow
@pytest.mark.parametrize('job', ['detection', 'segmentation'])
def test_dense_jobs_in_two_processes_go_on(tmp_path, job):
    _need(job)
    arguments = ['--ema-decay', '0.9', '--checkpoint-steps', '2', '--epochs', '2', '--clip-grad', '1.']
    _train(tmp_path / 'whole', *arguments, start=_torchrun, job=job)
    process = _torchrun(tmp_path / 'killed', *arguments, job=job)
    _wait_for(tmp_path / 'killed' / f'shapes_{job}-running' / 'checkpoints' / 'step-0000000002.pt', process)
    process.terminate()
    process.communicate(timeout=60)
    assert not (tmp_path / 'killed' / f'shapes_{job}').exists()
    _train(tmp_path / 'killed', *arguments, start=_torchrun, job=job)
    _assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')


VOLO = ['--model', 'test_elsa_volo', '--token-labels', 'image', '--config', str(ROOT / 'configs' / 'digits_volo.yaml')]


@pytest.mark.parametrize('start, arguments', [
    (_fork_two, []),
    pytest.param(_torchrun, [], marks=pytest.mark.slow),
    pytest.param(_fork_two, ['--fsdp', '--head-epochs', '1', '--epochs', '2'], marks=pytest.mark.slow),
    pytest.param(_fork_two, [*VOLO, '--model-args', 'use_mix_token=true', '--fsdp'], marks=pytest.mark.slow),
    pytest.param(_fork_two, [*VOLO, '--model-args', 'use_mix_token=true', '--amp', 'bfloat16'], marks=pytest.mark.slow),
])
def test_two_processes_go_on(tmp_path, start, arguments):
    # processes agree on a stop where they log
    arguments = ['--ema-decay', '0.9', '--checkpoint-steps', '4', '--log-steps', '1', '--epochs', '1', *arguments]
    _train(tmp_path / 'whole', *arguments, start=start)
    process = start(tmp_path / 'killed', *arguments)
    _wait_for(tmp_path / 'killed' / 'digits-running' / 'checkpoints' / 'step-0000000004.pt', process)
    process.terminate()
    process.communicate(timeout=60)
    assert not (tmp_path / 'killed' / 'digits').exists()
    _train(tmp_path / 'killed', *arguments, start=start)
    _assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')


def _evaluate(job):
    torch.set_num_threads(1)
    world = join_world('cpu')
    torch.manual_seed(0)
    dense = dict(size=48, train_images=8, val_images=5, batch_size=4, model_args=dict(img_size=48, window_size=3))
    if job == 'classification':
        from elsa_models.training import ClassificationJob as Job, Recipe
        recipe = Recipe(limit=21, eval_batch_size=8, model_args=dict(img_size=32, kernel_size=3))
    elif job == 'detection':
        from elsa_models.training.jobs.detection import DetectionJob as Job, DetectionRecipe
        recipe = DetectionRecipe(
            **dense, fpn_channels=16, head_channels=32, anchor_sizes=(8, 16, 24, 32, 48), eval_short_side=48)
    else:
        from elsa_models.training.jobs.segmentation import SegmentationJob as Job, SegmentationRecipe
        recipe = SegmentationRecipe(**dense, decoder_args=dict(decoder_channels=16), aux_channels=8, eval_flip=True)
    evaluated = Job(recipe, world)
    model = evaluated.model.eval()
    if job == 'detection':  # untrained, it finds nothing
        known = [evaluated.val_images[i] for i in range(5)]

        def model(images):
            i, truth = next((i, t) for i, (x, t) in enumerate(known) if torch.equal(x.float() / 255., images[0]))
            n = len(truth['labels'])
            return [dict(
                boxes=truth['boxes'] + 2., labels=truth['labels'], scores=torch.linspace(.9 - i / 10, .5, n),
                masks=truth['masks'][:, None].float().roll(i, -1))]
    with torch.no_grad():
        metrics = evaluated.evaluate(model)
    if world.is_main:
        print(metrics)
    world.barrier()  # nobody ends while others still listen
    leave_world()


@pytest.mark.parametrize('job', [
    'classification', *(pytest.param(name, marks=pytest.mark.slow) for name in ('detection', 'segmentation'))])
def test_two_processes_evaluate_as_one(job):
    _need(job)
    printed = []
    for start in (partial(Forked, cwd=ROOT), _Pair):
        process = start(_evaluate, (job,))
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        printed.append(output)
    one, two = (ast.literal_eval(text) for text in printed)
    if job == 'classification':
        assert one['images'] == 50
    if job == 'detection':
        assert 0. < one['box_ap'] < 100. and 0. < one['mask_ap'] < 100.
    assert one == two  # to the last digit
