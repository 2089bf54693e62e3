"""Runs that are killed, at every write and between steps, and stopped by signals: all end as one that was let alone."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elsa_models._files as files
from elsa_models.training import ClassificationJob, OutputError, Recipe, run_job

ROOT = Path(__file__).parents[2]
SMALL = dict(
    epochs=1, limit=6, batch_size=16, checkpoint_steps=1, onnx=False, figures=False, device='cpu',
    model_args=dict(img_size=32, kernel_size=3))


def _run(output, **kwargs):
    return run_job(Recipe(**{**SMALL, 'output': str(output), **kwargs}), ClassificationJob)


def _weights(folder):
    return (folder / 'model' / 'model.safetensors').read_bytes()


def _killed_at(number, output):
    """Run in a child that is killed at the write of this number; whether it was."""
    child = os.fork()
    if child == 0:
        sync, count = os.fsync, 0

        def killed(descriptor):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return sync(descriptor)

        files.os.fsync = killed
        try:
            _run(output)
            os._exit(0)
        except BaseException as e:
            print(e, file=sys.stderr)
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    return _run(tmp_path_factory.mktemp('straight'))


def test_killed_at_every_write_it_ends_as_if_nothing_had_been(tmp_path, straight):
    kills = 0
    while _killed_at(kills + 1, tmp_path):  # each goes on where the one before was killed
        kills += 1
    assert kills > 5
    assert _weights(tmp_path / 'digits') == _weights(straight.folder)
    assert [p.name for p in tmp_path.iterdir()] == ['digits']
    assert sorted(p.name for p in (tmp_path / 'digits').iterdir()) == sorted(
        p.name for p in straight.folder.iterdir())


@pytest.mark.parametrize(
    'left', ['.model-1a2b3c4d', '.model-x_y0z1w2', '.log.csv-1a2b3c4d.tmp', '.recipe.yaml-1a2b3c4d'])
@pytest.mark.parametrize('resume', [True, False])
def test_what_a_kill_has_left_is_no_strangers(tmp_path, straight, left, resume):
    working = tmp_path / 'digits-running'
    working.mkdir()
    (working / '.lock').touch()
    if left.startswith('.model'):  # of the export
        (working / left).mkdir()
    (working / left / 'graph.onnx' if left.startswith('.model') else working / left).write_bytes(b'half')
    result = _run(tmp_path, resume=resume)
    names = ['checkpoints', 'labels.json', 'log.csv', 'model', 'recipe.yaml']
    assert sorted(p.name for p in result.folder.iterdir()) == names


def test_strangers_files_are_still_refused(tmp_path):
    (tmp_path / 'digits-running').mkdir()
    (tmp_path / 'digits-running' / '.thesis-1a2b3c4d.tmp').write_text('x')
    with pytest.raises(OutputError, match=r"holds '\.thesis-1a2b3c4d\.tmp'"):
        _run(tmp_path)


@pytest.mark.parametrize('number, workers', [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_signal_ends_with_a_checkpoint_a_sentence_and_a_status(tmp_path, straight, number, workers):
    values = [x for k, v in SMALL.items() if k not in ('model_args', 'onnx', 'figures')
              for x in (f'--{k.replace("_", "-")}', str(v))]
    command = [
        sys.executable, str(ROOT / 'scripts' / 'train.py'), *values, '--no-figures', '--no-onnx', '--model-args',
        'img_size=32', 'kernel_size=3', '--output', str(tmp_path), '--workers', str(workers)]
    slow = command + ['--epochs', '1000']
    process = subprocess.Popen(slow, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / 'digits-running' / 'log.csv'
    for _ in range(1200):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    if workers:
        os.killpg(process.pid, number)  # as a terminal and Slurm do
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert 'stopped; the same command goes on from the last checkpoint' in errors and 'Traceback' not in errors
    assert list((tmp_path / 'digits-running' / 'checkpoints').glob('step-*.pt'))
    assert not (tmp_path / 'digits-running' / '.lock').exists()
