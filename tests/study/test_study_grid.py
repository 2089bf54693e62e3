"""A study's file, its runs, and the choice of learning rates."""
import pytest
import yaml

from elsa_models.study.grid import MACS, Study, choose_lr, macs
from elsa_models.study.runner import Places, _missing, chosen_lrs
from elsa_models.training import RecipeError

MIXERS = {'window_bias': None, 'depthwise': None, 'own': {'mixer': 'sasa', 'border': 'mask'}}
SETTINGS = dict(
    mixers=MIXERS, lrs=[.1, .2], seeds=[0, 1, 2], recipe=dict(model_args=dict(img_size=32, patch_size=2), epochs=1))


def make(folder, name='tiny', **changes):
    path = folder / f'{name}.yaml'
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}, sort_keys=False))
    return Study(path)


def row(study, cell, score):
    return dict(
        {k: str(v) for k, v in cell._asdict().items()}, data='', digest=study.digest(cell, ''), status='done',
        score=str(score), loss='1.', train_loss='1.')


def test_mixers_and_readings(tmp_path):
    study = make(tmp_path)
    assert study.size == 3 * 2 + 3 * 3 + 2 * 3  # the baseline is the same in both readings
    assert study.model_args('depthwise') == dict(img_size=32, patch_size=2, mixer='depthwise')
    assert study.model_args('own')['border'] == 'mask'
    assert study.model_args('window_bias', MACS) == study.model_args('window_bias')
    baseline = macs('test_mixer_swin', study.model_args('window_bias'))
    ours = macs('test_mixer_swin', study.model_args('depthwise', MACS))
    assert abs(ours - baseline) <= .01 * baseline
    assert macs('test_mixer_swin', study.model_args('depthwise')) < .9 * baseline


def test_digest_is_of_what_decides_the_result(tmp_path):
    study = make(tmp_path)
    cell = study.test_cells('own', .1, 'swap')[0]
    digest = study.digest(cell, 'data')
    assert study.digest(cell, 'data') == digest
    assert study.digest(cell, 'other data') != digest
    for changes in (dict(threads=2), dict(recipe=dict(SETTINGS['recipe'], epochs=2)),
                    dict(mixers={**MIXERS, 'own': {'mixer': 'sasa'}})):
        assert make(tmp_path, **changes).digest(cell, 'data') != digest
    for changes in (dict(seeds=[0, 9]), dict(lrs=[.1]), dict(recipe=dict(SETTINGS['recipe'], workers=3))):
        assert make(tmp_path, **changes).digest(cell, 'data') == digest
    assert all(study.digest(other, 'data') != digest for other in study.test_cells('own', .1, 'swap')[1:])


def test_learning_rate_of_the_best_score(tmp_path):
    study = make(tmp_path, tune_seeds=[7, 8])
    cells = study.tune_cells('own')
    rows = [row(study, cell, 50 + 10 * cell.lr) for cell in cells]
    assert choose_lr(study, 'own', rows) == .2
    assert choose_lr(study, 'own', rows[:-1]) is None  # not complete
    assert choose_lr(make(tmp_path, tune_seeds=[7, 8], threads=2), 'own', rows) is None  # of other runs
    rows[-1]['status'] = 'diverged'
    assert choose_lr(study, 'own', rows) == .1
    rows[0]['status'] = 'diverged'
    with pytest.raises(RecipeError, match='own diverges at every'):
        choose_lr(study, 'own', rows)
    equal = [dict(row(study, cell, 50), loss=str(cell.lr)) for cell in cells]
    assert choose_lr(study, 'own', equal) == .1  # of the lower loss


def test_learning_rates_of_another_study(tmp_path):
    first, second = make(tmp_path), make(tmp_path, 'second', lrs=[], lr_from='tiny')
    assert second.tune_cells('own') == [] and second.size == 3 * 3 + 2 * 3
    places = Places(tmp_path / 'results', tmp_path / 'work')
    assert chosen_lrs(second, places) == dict.fromkeys(MIXERS)
    places.of('tiny').add(row(first, cell, cell.lr) for mixer in MIXERS for cell in first.tune_cells(mixer))
    assert chosen_lrs(second, places) == dict.fromkeys(MIXERS, .2)


def test_order_and_shards(tmp_path):
    """Learning rates first, then seed by seed; shards divide the runs, and none waits for another's."""
    study = make(tmp_path, readings=['swap', 'macs'])
    places = Places(tmp_path / 'results', tmp_path / 'work')
    parts = {study.name: type('Parts', (), dict(digest=''))}

    def missing(mixers):
        return [cell for _, cell in _missing([study], parts, places, mixers) if cell is not None]

    tune = missing(set(MIXERS))
    assert {cell.phase for cell in tune} == {'tune'} and len(tune) == 6
    places.of(study.name).add(row(study, cell, cell.lr) for cell in tune)
    test = missing(set(MIXERS))
    assert len(test) == study.size - len(tune)
    assert [cell.seed for cell in test if cell.reading == 'swap'] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {cell.lr for cell in test} == {.2}
    alone = [missing({mixer}) for mixer in MIXERS]
    assert sorted(sum(alone, [])) == sorted(test)


@pytest.mark.parametrize('changes, words', [
    (dict(baseline='swin'), "baseline: got 'swin'"), (dict(lrs=[]), 'lrs: got none'),
    (dict(seeds=[1, 1]), 'seeds: must all differ'), (dict(tune_seeds=[0]), 'tune_seeds: must not be among'),
    (dict(readings=['best']), 'readings: got'), (dict(recipe=dict(lr=1.)), "must not say 'lr'"),
    (dict(mixers={'window_bias': 3}), 'mixers: window_bias'), (dict(nonsense=1), "unknown key 'nonsense'"),
])
def test_bad_settings(changes, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        make(tmp_path, **changes)
