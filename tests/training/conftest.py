import io
import json
import os
import tarfile

import pytest
import torch
from PIL import Image

from elsa_models.training import Trainer, World


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of eight pictures: red and blue squares of changing brightness and size."""
    folder = tmp_path / 'pictures'
    for name, channel in (('red', 0), ('blue', 2)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            color = [0, 0, 0]
            color[channel] = 120 + 15 * i
            Image.new('RGB', (20 + i, 30), tuple(color)).save(folder / name / f'{i}.png')
    return folder


@pytest.fixture
def shards(image_folder, tmp_path):
    """The pictures as WebDataset shards: two of eight to train on, one of eight to hold out."""
    pytest.importorskip('webdataset')
    folder = tmp_path / 'shards'
    folder.mkdir()
    files = [(file, label) for i in range(8) for label, name in enumerate(('blue', 'red'))
             for file in [image_folder / name / f'{i}.png']]
    splits = {}
    for split, names in (('train', ['train-0.tar', 'train-1.tar']), ('validation', ['validation-0.tar'])):
        for n, name in enumerate(names):
            with tarfile.open(folder / name, 'w') as tar:
                for i, (file, label) in enumerate(files[8 * n:8 * n + 8]):
                    for end, content in (('png', file.read_bytes()), ('cls', str(label).encode())):
                        info = tarfile.TarInfo(f'{i:03d}.{end}')
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        splits[split] = dict(
            name=split, num_samples=8 * len(names), filenames=names, shard_lengths=[8] * len(names))
    (folder / 'info.json').write_text(json.dumps(dict(splits=splits)))
    return folder


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    monkeypatch.setitem(os.environ, 'HF_HUB_OFFLINE', '1')


@pytest.fixture
def first_step(tmp_path):
    """Takes the first step of a recipe and requires that the loss is finite and the parameters have gradients."""
    def step(recipe, kind):
        world = World(torch.device('cpu'))
        trainer = Trainer(recipe, kind(recipe, world), world, tmp_path / 'run')
        trainer._start_phase()
        trainer._train_mode()
        loss = trainer.train_step(next(trainer.job.train_loader.epoch(0)))
        assert loss.isfinite() and loss > 0.
        states = [trainer.optimizer.state[p] for p in trainer.job.model.parameters()]
        assert all(states) and sum(bool(s['exp_avg'].abs().sum() > 0) for s in states) > .8 * len(states)  # drop path
        return trainer
    return step
