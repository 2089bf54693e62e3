"""Runs as processes of their own: killed and continued, and several that work together."""
import ast
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SMALL = [
    '--epochs', '2', '--limit', '24', '--model-args', 'img_size=32', 'kernel_size=3', 'drop_path_rate=0.1',
    '--batch-size', '16', '--no-onnx', '--no-figures', '--device', 'cpu']


def _command(folder, *arguments, processes=1):
    launcher = [] if processes == 1 else [
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    script = [str(ROOT / 'scripts' / 'train.py'), '--config', str(ROOT / 'configs' / 'digits.yaml')]
    return [sys.executable, *launcher, *script, *SMALL, '--output', str(folder), *arguments]


def _start(*args, **kwargs):
    return subprocess.Popen(
        _command(*args, **kwargs), env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _train(*args, **kwargs):
    process = _start(*args, **kwargs)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def _result(folder):
    """Weights and log of a run; of the log what does not depend on time."""
    checkpoint = torch.load(sorted((folder / 'digits' / 'checkpoints').glob('step-*.pt'))[-1], weights_only=True)
    log = [{k: v for k, v in row.items() if k != 'images_per_second'} for row in checkpoint['history']]
    return load_file(folder / 'digits' / 'model' / 'model.safetensors'), checkpoint, log


def _assert_same_bits(folder, other):
    (model, checkpoint, log), (model2, checkpoint2, log2) = _result(folder), _result(other)
    assert all(torch.equal(x, model2[k]) for k, x in model.items()) and log == log2
    for part in ('model', 'ema'):
        assert all(torch.equal(x, checkpoint2[part][k]) for k, x in checkpoint[part].items())


def _kill_and_continue(tmp_path, kills, epochs):
    """Kill a run at random moments; each kill lets it begin at least one step after the checkpoint it found."""
    arguments = [
        '--epochs', str(epochs), '--checkpoint-steps', '1', '--ema-decay', '0.9', '--mixup', '0.2', '--re-prob', '0.3']
    _train(tmp_path / 'whole', *arguments)
    steps = epochs * 11
    generator = random.Random(0)
    folder = tmp_path / 'killed' / 'digits-running' / 'checkpoints'
    # at ten random steps, and there at any moment within a step
    for target in sorted(generator.sample(range(1, steps), kills)):
        process = _start(tmp_path / 'killed', *arguments)
        while not (folder / f'step-{target:010d}.pt').exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        time.sleep(generator.uniform(0., 0.1))
        process.kill()
        process.wait()
        assert (folder / f'step-{target:010d}.pt').exists() or folder.exists()
    _train(tmp_path / 'killed', *arguments)
    assert sorted(p.name for p in (tmp_path / 'killed').iterdir()) == ['digits']
    _assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')


def test_killed_twice_the_weights_are_the_same_bits(tmp_path):
    _kill_and_continue(tmp_path, kills=2, epochs=1)


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_weights_are_the_same_bits(tmp_path):
    _kill_and_continue(tmp_path, kills=10, epochs=6)


@pytest.mark.parametrize('arguments', [
    ['--accumulate', '2', '--clip-grad', '1.', '--head-epochs', '1'],
    ['--fsdp', '--ema-decay', '0.9', '--clip-grad', '1.'],
])
def test_two_processes_follow_one(tmp_path, arguments):
    # AdamW turns rounding of gradients near zero into steps of the size of lr
    arguments = [*arguments, '--model-args', 'drop_path_rate=0.', '--lr', '5e-4']
    _train(tmp_path / 'one', *arguments)
    _train(tmp_path / 'two', *arguments, processes=2)
    (model, _, log), (model2, _, log2) = _result(tmp_path / 'one'), _result(tmp_path / 'two')
    assert model.keys() == model2.keys()
    for name, x in model.items():
        torch.testing.assert_close(model2[name], x, atol=1e-5, rtol=1e-5)
    for row, row2 in zip(log, log2, strict=True):
        assert row == pytest.approx(row2, rel=1e-4)
        assert (row['val_top1'], row['val_top5'], row['val_images']) == (
            row2['val_top1'], row2['val_top5'], row2['val_images'])


VOLO = ['--model', 'test_elsa_volo', '--token-labels', 'image', '--config', str(ROOT / 'configs' / 'digits_volo.yaml')]


@pytest.mark.parametrize('arguments', [
    [],
    pytest.param(['--fsdp', '--head-epochs', '1', '--epochs', '2'], marks=pytest.mark.slow),
    pytest.param([*VOLO, '--model-args', 'use_mix_token=true', '--fsdp'], marks=pytest.mark.slow),
    pytest.param([*VOLO, '--model-args', 'use_mix_token=true', '--amp', 'bfloat16'], marks=pytest.mark.slow),
])
def test_two_processes_go_on(tmp_path, arguments):
    arguments = ['--ema-decay', '0.9', '--checkpoint-steps', '4', '--epochs', '1', *arguments]
    _train(tmp_path / 'whole', *arguments, processes=2)
    process = _start(tmp_path / 'killed', *arguments, processes=2)
    checkpoint = tmp_path / 'killed' / 'digits-running' / 'checkpoints' / 'step-0000000004.pt'
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.terminate()  # torchrun ends its processes
    process.communicate(timeout=60)
    assert not (tmp_path / 'killed' / 'digits').exists()
    _train(tmp_path / 'killed', *arguments, processes=2)
    _assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')


EVALUATE = '''
import sys, torch, timm, elsa_models
from elsa_models.training import ClassificationJob, Recipe
from elsa_models.training.world import join_world
world = join_world('cpu')
torch.manual_seed(0)
recipe = Recipe(limit=21, eval_batch_size=8, model_args=dict(img_size=32, kernel_size=3))
job = ClassificationJob(recipe, world)
job.model.eval()
with torch.no_grad():
    metrics = job.evaluate(job.model)
if world.is_main:
    print(metrics)
'''


def test_two_processes_evaluate_as_one(tmp_path):
    script = tmp_path / 'evaluate.py'
    script.write_text(EVALUATE)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    printed = []
    for launcher in ([], ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']):
        printed.append(subprocess.run(
            [sys.executable, *launcher, str(script)], env=environment, capture_output=True, text=True, check=True,
            timeout=300).stdout)
    one, two = (ast.literal_eval(text) for text in printed)
    assert one['images'] == 50
    assert one == two  # to the last digit
