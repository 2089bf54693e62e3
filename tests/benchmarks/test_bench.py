"""The harness measures what it says, refuses wrong numbers, and loses no row. Nothing here looks at a time."""
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elsa_models.ops import local_attention_reference

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench
    return bench


@pytest.fixture
def harness(bench):
    return bench.harness


def _args(bench, monkeypatch, *options):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *options])
    return bench.parse_args()


def test_rows_are_kept_when_columns_change(harness, tmp_path):
    path = tmp_path / 'x.csv'
    harness.append(path, dict(a=1, b='x, y'))
    harness.append(path, dict(b='z', c=3))
    assert harness.read(path) == [dict(a='1', b='x, y', c=''), dict(a='', b='z', c='3')]
    assert [p.name for p in tmp_path.iterdir()] == ['x.csv']


def test_a_failed_write_loses_nothing(harness, tmp_path, monkeypatch):
    path = tmp_path / 'x.csv'
    harness.append(path, dict(a=1))

    def fail(*args):
        raise OSError('disk full')

    monkeypatch.setattr(csv.DictWriter, 'writerows', fail)
    with pytest.raises(OSError, match='disk full'):
        harness.append(path, dict(a=2))
    assert harness.read(path) == [dict(a='1')]


def test_steps_take_turns(harness):
    order = []
    times = harness.interleave([lambda: order.append('a'), lambda: order.append('b')], 'cpu', 3, 0, 0.)
    assert [len(t) for t in times] == [3, 3]
    assert ''.join(order) == 'ab' + 3 * 'ab'


def test_ratio_is_of_neighbours(harness):
    row = harness.compare([1., 20., 3.], [2., 10., 3.])
    assert row['ratio'] == '1.000' and row['ratio_p20'] == '0.500' and row['ratio_p80'] == '2.000'


@pytest.mark.parametrize('ghosts', ['', 'm', 'a', 'ma'])
def test_unfolded_is_the_formula(bench, ghosts):
    value, logits = torch.randn(2, 5, 6, 6).double(), torch.randn(2, 5, 6, 3, 9).double()
    mul, add = (torch.randn(6, 3, 3).double() if x in ghosts else None for x in 'ma')
    expected = local_attention_reference(value, logits, 3, 1, mul, add)
    assert torch.allclose(bench.unfolded(value, logits, 3, mul, add), expected)


def test_wrong_numbers_are_not_measured(bench, monkeypatch, tmp_path):
    args = _args(bench, monkeypatch, 'ops', '--quick', '--img-size', '32', '--results', str(tmp_path))
    monkeypatch.setattr(bench, 'ours', lambda value, logits, K, mul, add: value)
    with pytest.raises(SystemExit, match='is wrong.*Not measured'):
        bench.check_op(dict(size=32, stage=0, kernel_size=3, ghosts='a'), args)
    assert not list(tmp_path.iterdir())


def test_floor_of_the_first_stage(bench, monkeypatch):
    args = _args(bench, monkeypatch, '--quick')
    spec = dict(size=224, stage=0, kernel_size=7, ghosts='a', batch=1, mode='infer')
    moved, done = bench.floor_of(spec, bench.make_problem(spec, args))
    assert moved == 56 * 56 * 4 * (2 * 96 + 3 * 49) and done == 56 * 56 * 96 * 49 * 4


@pytest.mark.parametrize('what, figure', [
    ('ops', 'roofline_cpu.png'), pytest.param('models', 'latency_cpu.png', marks=pytest.mark.slow)])
def test_measures_and_draws(what, figure, tmp_path):
    results, images = tmp_path / 'results', tmp_path / 'images'
    command = [
        sys.executable, str(BENCHMARKS / 'bench.py'), what, '--quick', '--runs', '1', '--warmup', '0',
        '--min-seconds', '0', '--pair', 'test_elsa_swin:test_vit', '--img-size', '32', '--mode', 'train',
        '--kernel-size', '3', '--baseline', 'depthwise', '--results', str(results)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    row, = csv.DictReader((results / f'{what}.csv').open())
    for name in ('ms', 'baseline_ms', 'ratio', 'peak_mib', 'arithmetic_share'):
        assert float(row[name]) > 0, name
    assert row['commit'] and row['hardware'] and row['torch'] == torch.__version__
    command = [sys.executable, str(BENCHMARKS / 'plot.py'), '--results', str(results), '--images', str(images)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [p.name for p in images.iterdir()] == [figure]


@pytest.mark.parametrize('options, message', [
    (['--form', 'graph'], 'needs --device cuda'), (['--runs', '0'], 'at least 1')])
def test_bad_options_are_named(bench, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        _args(bench, monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_peers_become_rows_and_a_figure(bench, monkeypatch, tmp_path):
    import peers
    import plot
    monkeypatch.setattr(peers, 'REFERENCE', 'test_resnet')
    monkeypatch.setattr(peers, 'REFERENCE_SIZE', 64)
    monkeypatch.setattr(peers, 'PEERS', [
        peers.Peer('test_elsa_swin', 64, 50., peers.PAPER), peers.Peer('test_resnet', 64, 40.),
        peers.Peer('test_vit', 160, None)])
    options = ['--batch', '1', '--runtime', 'eager', '--runs', '2', '--min-seconds', '0', '--results', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['peers.py', *options])
    monkeypatch.setattr(peers.harness, 'keep_freed_memory', lambda: None)
    peers.main()
    rows = bench.harness.read(tmp_path / 'peers.csv')
    assert [(r['model'], r['img_size'], r['top1'], r['source']) for r in rows] == [
        ('test_elsa_swin', '64', '50.0', 'paper'), ('test_resnet', '64', '40.0', 'timm'),
        ('test_vit', '160', '', 'timm')]
    assert all(r['baseline'] == 'test_resnet at 64' and float(r['gmacs']) > 0 for r in rows)
    monkeypatch.setattr(sys, 'argv', ['plot.py', '--results', str(tmp_path), '--images', str(tmp_path)])
    plot.main()
    assert (tmp_path / 'peers_cpu.png').stat().st_size > 10_000
