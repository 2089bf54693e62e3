"""A study runs to its end whatever stops it, with the same bits, and a check finds numbers that are not."""
import csv

import pytest
import timm
import torch
import yaml
from PIL import Image

from elsa_models.study import pictures, report, runner
from elsa_models.study.runner import Places, StudyError, check, progress, run

MIXERS = {'window_bias': None, 'depthwise': None}
UNLIKE = ('seconds', 'cpu_seconds', 'commit')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """Two mixers, two learning rates, two seeds: eight runs of six images, and two of equal multiply-accumulates."""
    folder = tmp_path_factory.mktemp('study')
    for c in 'ab':
        (folder / 'images' / c).mkdir(parents=True)
        for i in range(8):
            Image.radial_gradient('L').resize((16 + i, 16)).rotate(45 * (c == 'a')).save(
                folder / 'images' / c / f'{i}.png')
    path = folder / 'tiny.yaml'
    recipe = dict(
        model_args=dict(img_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[1, 2]),
        epochs=1, batch_size=4, warmup_epochs=0.)
    path.write_text(yaml.safe_dump(dict(
        data=str(folder / 'images'), mixers=MIXERS, lrs=[.001, .01], seeds=[0, 1], recipe=recipe), sort_keys=False))
    return path


def rows(places):
    found = places.of('tiny').rows()
    return sorted(tuple(v for k, v in row.items() if k not in UNLIKE) for row in found)


@pytest.fixture(scope='module')
def whole(study, tmp_path_factory):
    """Run without a stop."""
    folder = tmp_path_factory.mktemp('whole')
    places = Places(folder / 'results', folder / 'work')
    run([study], places)
    return places


def test_whole(study, whole):
    assert len(rows(whole)) == 10 and progress([study], whole) == [('tiny', 10, 10)]
    assert not list((whole.work / 'runs').iterdir())
    assert all(whole.model(runner.Study(study), mixer).is_dir() for mixer in MIXERS)
    found = whole.of('tiny').rows()
    assert {row['status'] for row in found} == {'done'} and len({row['weights'] for row in found}) == 10
    assert [row['mlp_ratio'] != '' for row in found] == [False] * 8 + [True] * 2
    run([study], whole)  # nothing is left to do
    assert whole.of('tiny').rows() == found


def test_stopped_anywhere(study, whole, tmp_path, monkeypatch):
    """After a run, between a run's end and its row, within a run: all rows are those of an unstopped study."""
    places = Places(tmp_path / 'results', tmp_path / 'work')
    run([study], places, limit=1)
    assert len(rows(places)) == 1

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.Results, 'add', stop)
        with pytest.raises(KeyboardInterrupt):
            run([study], places)
    assert len(list((places.work / 'runs').iterdir())) == 1  # done, but not recorded
    with monkeypatch.context() as patch:
        patch.setattr(runner, 'run_job', stop)  # which is not called for it
        with pytest.raises(KeyboardInterrupt):
            run([study], places)
    assert len(rows(places)) == 2
    with pytest.raises(StudyError, match='elsa: is a mixer of none'):
        run([study], places, mixers=['elsa'])
    run([study], places, mixers=['window_bias'])
    assert {row['mixer'] for row in places.of('tiny').rows()[2:]} == {'window_bias'}
    elsewhere = Places(tmp_path / 'elsewhere', tmp_path / 'work2')
    run([study], elsewhere, shard=(1, 2))
    assert {row['mixer'] for row in elsewhere.of('tiny').rows()} == {'depthwise'}
    assert places.of('tiny').merge(elsewhere.results / 'tiny.csv') == 6
    assert places.of('tiny').merge(elsewhere.results / 'tiny.csv') == 0
    assert rows(places) == rows(whole)


def test_who_takes_a_run_has_it_alone(study, whole, tmp_path):
    cell = runner.Study(study).tune_cells('depthwise')[0]
    places = Places(tmp_path / 'results', tmp_path / 'work')
    with runner._claim(places, runner.Study(study), cell) as ours:
        assert ours
        with runner._claim(places, runner.Study(study), cell) as theirs:
            assert not theirs


def test_check(study, whole, tmp_path):
    assert check([study], whole, 2) == []
    path = tmp_path / 'tiny.csv'
    with open(whole.results / 'tiny.csv', newline='') as file:
        recorded = list(csv.DictReader(file))
    recorded[-1]['loss'] = repr(float(recorded[-1]['loss']) + 1e-15)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, recorded[0])
        writer.writeheader()
        writer.writerows(recorded)
    changed = Places(tmp_path, whole.work)
    differences = check([study], changed, 2)
    assert len(differences) == 1 and 'test-macs-depthwise' in differences[0] and 'loss' in differences[0]
    with pytest.raises(StudyError, match='10 runs are recorded'):
        check([study], changed, 11)


def test_diverged_runs_are_rows(study, tmp_path, monkeypatch):
    def diverge(*args):
        raise runner.DivergedError

    monkeypatch.setattr(runner, 'run_job', diverge)
    places = Places(tmp_path / 'results', tmp_path / 'work')
    run([study], places, limit=1)
    row, = places.of('tiny').rows()
    assert row['status'] == 'diverged' and row['score'] == ''


def test_pictures(study, whole, tmp_path):
    assert pictures.draw(study, whole, tmp_path).stat().st_size > 1000
    model = timm.create_model('test_mixer_swin', mixer='elsa')
    heads = pictures.look(model, torch.randn(3, 64, 64))
    assert [tuple(x.shape) for x in heads] == [(5, 5)] * 4  # of attention and of the ghost head
    torch.testing.assert_close(heads[0].sum(), torch.ones(()))


@pytest.mark.slow  # three processes import torch
def test_processes_share_the_runs(study, whole, tmp_path):
    places = Places(tmp_path / 'results', tmp_path / 'work')
    run([study], places, jobs=2)
    assert rows(places) == rows(whole)


def test_report(study, whole, tmp_path):
    document = tmp_path / 'study.md'
    names = ('progress', 'tiny swap', 'tiny macs', 'claims')
    document.write_text('before\n' + ''.join(f'<!-- begin {n} -->\nold\n<!-- end {n} -->\n' for n in names) + 'after\n')
    written = report.report([study], whole, document, tmp_path)
    text = document.read_text()
    assert 'old' not in text and text.startswith('before\n') and text.endswith('after\n')
    assert '| tiny | 10 | 10 |' in text
    outcome = report.Outcome(runner.Study(study), whole)
    scores = outcome.scores['swap']
    mean = sum(scores['depthwise'].values()) / 2
    assert f'| depthwise | {outcome.lrs["depthwise"]:g} | 2 | {mean:.2f} ±' in text
    expected = report.paired(scores['depthwise'], scores['window_bias'])
    assert report.shown(expected) in text
    assert len(written) == 3 and all(path.is_file() for path in written)
    report.report([study], whole, document, tmp_path)
    assert document.read_text() == text


def test_nothing_is_said_of_differences_before_all_seeds_have_run(study, whole, tmp_path):
    part = whole._replace(results=tmp_path)
    found = whole.of('tiny').rows()
    last = next(row for row in found if (row['mixer'], row['phase'], row['reading']) == ('depthwise', 'test', 'swap'))
    part.of('tiny').add(row for row in found if row != last)
    outcome = report.Outcome(runner.Study(study), part)
    assert len(outcome.scores['swap']['depthwise']) == 1
    assert outcome.difference('depthwise', 'window_bias', 'swap') is None
    assert report.Outcome(runner.Study(study), whole).difference('depthwise', 'window_bias', 'swap') is not None
