import resource
import signal

import pytest
import torch

from elsa_models.training import OutputError
from elsa_models.training.checkpoint import Checkpoints


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_newest_are_kept_and_the_best_beside_them(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'deep' / 'checkpoints', keep=2)
    assert checkpoints.load_newest() is None
    checkpoints.create_folder()
    for step in (1, 20, 300):
        checkpoints.save(step, dict(step=step, x=torch.full((3,), step)))
        checkpoints.save_best(dict(step=20))
    assert _names(checkpoints.folder) == ['best.pt', 'step-0000000020.pt', 'step-0000000300.pt']
    state = checkpoints.load_newest()
    assert state['step'] == 300 and state['x'].tolist() == [300] * 3
    assert checkpoints.load_best() == dict(step=20)


def test_damaged_best_weights_are_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save_best(dict(x=torch.randn(1000)))
    content = bytearray(checkpoints.best.read_bytes())
    content[len(content) // 2] ^= 64
    checkpoints.best.write_bytes(content)
    with pytest.raises(OutputError, match=r'best\.pt: cannot be read .*is not what was written.*goes on from the one'):
        checkpoints.load_best()


@pytest.mark.parametrize('damage', ['empty', 'cut', 'noise', 'bit', 'list', 'other', 'IndexError', 'KeyError'])
def test_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, dict(step=step, x=torch.randn(1000)))
    newest = checkpoints.files()[0]
    content = newest.read_bytes()
    if damage in ('list', 'other'):
        torch.save([1, 2] if damage == 'list' else dict(epoch=1), newest)
    elif damage.endswith('Error'):  # what torch raises for pickles that are not cut at random
        load, error = torch.load, dict(IndexError=IndexError, KeyError=KeyError)[damage]

        def damaged(file, **kwargs):
            if file == newest:
                raise error('pop from empty list')
            return load(file, **kwargs)

        monkeypatch.setattr(torch, 'load', damaged)
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 64  # of a weight
        newest.write_bytes(dict(
            empty=b'', cut=content[:len(content) // 2], noise=bytes(range(256)) * 20, bit=flipped)[damage])
    assert checkpoints.load_newest(['step'])['step'] == 1
    assert 'step-0000000002.pt: cannot be read' in caplog.text
    checkpoints.files()[1].write_bytes(b'')
    newest.write_bytes(b'')
    with pytest.raises(OutputError, match='none of its checkpoints can be read'):  # and not afresh without a word
        checkpoints.load_newest()


def test_full_disk_leaves_the_former_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, dict(step=1))
    checkpoints.save_best(dict(step=1))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # files of 100 kB at most
    try:
        for save in (lambda x: checkpoints.save(2, x), checkpoints.save_best):
            with pytest.raises(OutputError, match='cannot be written .* Former checkpoints are as they were'):
                save(dict(x=torch.randn(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_folder_that_was_moved_away_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints', keep=1)
    checkpoints.create_folder()
    checkpoints.save(1, dict(step=1))
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    with pytest.raises(OutputError, match='its folder has been moved or removed'):
        checkpoints.save(2, dict(step=2))
    assert not (tmp_path / 'run').exists()
