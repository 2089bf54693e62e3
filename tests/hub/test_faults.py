"""What goes wrong between a server and the cache: each time the right weights or one clear error, and nothing left."""
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import gdown
import pytest
import released
from children import run_child, start_child
from hub_helpers import assert_right, cache_files, load
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from servers import Fault

from elsa_models.hub import WeightsError, cache, cached_weights, sources

SMALL_CHUNKS = '''
import gdown
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = sys.modules['gdown.download'].CHUNK_SIZE = 1 << 12
'''


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """huggingface_hub's and gdown's own retries without the waiting between them, and chunks for small files."""
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1 << 12)
    monkeypatch.setattr(sys.modules['gdown.download'], 'CHUNK_SIZE', 1 << 12)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 1)
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 1)
    monkeypatch.setattr(file_download, '_ETAG_RETRY_TIMEOUT', 1, raising=False)  # not in old versions
    monkeypatch.setattr(sources, '_TIMEOUT', 1.)
    sleep = time.sleep
    for module in (_http, file_download):
        monkeypatch.setattr(module.time, 'sleep', lambda seconds: sleep(min(seconds, .01)))
    monkeypatch.setattr(sys.modules['gdown.download'], '_wait_or_cancel', lambda **kwargs: None, raising=False)


@pytest.fixture
def nothing_taken_for_good(on_hub, drive_server, weights, own_world):
    """After the test, both caches hold right files or none, and a healthy server repairs everything."""
    yield
    assert not [line for line in cached_weights().values() if not line.startswith('ok')]
    digests = {cache.sha256_of(p) for p in own_world.rglob('*') if p.is_file() and p.stat().st_size > 50000}
    hub_files = on_hub.repos[f'org/{released.NAME}']['commits']
    right = {cache.hashlib.sha256(tree['model.safetensors']).hexdigest() for tree in hub_files.values()}
    assert digests <= right
    on_hub.fault = drive_server.fault = None
    assert_right(load(), weights)


# the hub alone: Google Drive has nothing


@pytest.mark.parametrize('status, words', [
    (401, 'hf auth login'), (403, 'hf auth login'), (404, 'hf auth login'), (429, '429'), (500, '500'), (503, '503')])
def test_status_of_the_hub(on_hub, nothing_taken_for_good, own_world, status, words):
    on_hub.fault = Fault('status', status=status, methods=('HEAD', 'GET'))
    with pytest.raises(WeightsError) as e:
        load()
    assert f'the hub repository org/{released.NAME}: ' in str(e.value) and str(status) in str(e.value)
    assert words in str(e.value) and not cache_files(own_world)
    assert len(on_hub.requests) <= 8
    on_hub.fault = Fault('status', status=status, methods=('HEAD', 'GET'))
    with pytest.raises(WeightsError, match=str(status)) as e:
        load(pretrained_cfg_overlay=dict(hf_hub_id=f'org/{released.NAME}'))
    assert 'could not be had from the hub' in str(e.value)


@pytest.mark.parametrize('status', [429, 500])
def test_status_that_passes(on_hub, weights, status):
    on_hub.fault = Fault('status', times=3, status=status, methods=('HEAD',), headers={'Retry_After': '0'})
    assert_right(load(), weights)


@pytest.mark.parametrize('fault', [
    Fault('truncate'), Fault('drop', after=70000), Fault('hang', delay=5.), Fault('status', status=500)],
    ids=lambda f: f.kind)
def test_bodies_that_never_end_well(on_hub, nothing_taken_for_good, own_world, fault):
    on_hub.fault = fault
    with pytest.raises(WeightsError, match=f'the hub repository org/{released.NAME}: '):
        load()
    assert not cache_files(own_world) and not list(own_world.rglob('*.incomplete'))


@pytest.mark.parametrize('kind', ['truncate', 'drop', 'hang'])
def test_bodies_that_break_once_are_continued(on_hub, weights, kind):
    on_hub.fault = Fault(kind, times=1, after=70000, delay=5.)
    assert_right(load(), weights)
    ranges = [h.get('Range') for method, _, h in on_hub.requests if method == 'GET']
    assert len(ranges) == 2 and ranges[0] is None
    if kind != 'drop':  # after a reset, huggingface_hub gives up and begins anew when asked again
        assert 0 < int(ranges[1][6:-1]) <= 70000


def test_slow_but_steady(on_hub, weights):
    on_hub.fault = Fault('slow', delay=.02)
    assert_right(load(), weights)


def test_wrong_hash(on_hub, weights, nothing_taken_for_good, own_world):
    on_hub.fault = Fault('corrupt')
    with pytest.raises(WeightsError, match='does not have the sha256 that the hub gives for it'):
        load()
    assert not cache_files(own_world)
    on_hub.fault = Fault('corrupt')
    with pytest.raises(WeightsError, match='does not have the sha256'):
        load(f'hf-hub:org/{released.NAME}')
    assert not list(own_world.rglob('*.safetensors'))
    on_hub.fault = Fault('corrupt', times=1)  # one more try is made
    assert_right(load(), weights)


def test_rot_in_the_cache_of_huggingface_hub(on_hub, weights, own_world):
    load(f'hf-hub:org/{released.NAME}')
    path = next(own_world.rglob('model.safetensors')).resolve()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert_right(load(f'hf-hub:org/{released.NAME}'), weights)


def test_nobody_listens(drive_server, own_world):
    from elsa_models import set_hub_namespace
    set_hub_namespace('org')
    with pytest.raises(WeightsError, match='the hub repository .*(ConnectError|Connection)'):
        load()
    assert not cache_files(own_world)


# Google Drive alone


@pytest.mark.parametrize('fault, words', [
    ('quota', 'Too many users'), (404, 'Cannot retrieve'), (500, ''), (403, ''), (429, '')])
def test_pages_of_google_drive(on_drive, own_world, weights, fault, words):
    on_drive.page_fault = fault
    with pytest.raises(WeightsError) as e:
        load()
    assert 'the authors\' file on Google Drive' in str(e.value) and words in str(e.value)
    assert f'https://drive.google.com/file/d/{released.FILE_ID}/view' in str(e.value)
    assert not cache_files(own_world)
    on_drive.page_fault = None
    assert_right(load(), weights)


@pytest.mark.parametrize('fault', [
    Fault('truncate', after=70000), Fault('drop', after=70000), Fault('hang', after=70000, delay=5.)],
    ids=lambda f: f.kind)
def test_downloads_from_drive_that_break_are_continued_later(on_drive, own_world, weights, fault):
    on_drive.fault = fault
    fault.times = 1
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sources, '_RETRIES', 0)
        with pytest.raises(WeightsError, match='on Google Drive'):
            load()
    files = cache_files(own_world)
    assert len(files) == 1 and files[0].endswith('.part')  # no name of a weight
    assert_right(load(), weights)
    assert on_drive.downloads[-1] not in (None, 'bytes=0-')
    assert len(cache_files(own_world)) == 2


def test_downloads_from_drive_that_break_once_are_continued_at_once(on_drive, weights):
    on_drive.fault = Fault('drop', times=1, after=70000)
    assert_right(load(), weights)


def test_a_drive_that_cannot_continue_starts_again(on_drive, own_world, weights):
    on_drive.fault = Fault('truncate', times=1, after=70000)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sources, '_RETRIES', 0)
        with pytest.raises(WeightsError):
            load()
    on_drive.fault = Fault('no_ranges')
    assert_right(load(), weights)


def test_wrong_bytes_from_drive(on_drive, own_world, weights, authors_file):
    on_drive.files[released.FILE_ID] = ('x', b'<html>' * 20000)
    with pytest.raises(WeightsError, match='is a web page'):
        load()
    assert not cache_files(own_world)  # the file would be wrong the next time too
    on_drive.files[released.FILE_ID] = ('x', authors_file)
    assert_right(load(), weights)


def test_a_complete_download_left_by_a_killed_process_is_used_or_replaced(on_drive, own_world, weights, authors_file):
    partial = own_world / 'elsa_models' / released.NAME / 'partial'
    partial.mkdir(parents=True)
    (partial / 'checkpoint').write_bytes(authors_file)
    assert_right(load(), weights)
    assert not on_drive.requests
    for path in partial.parent.iterdir():
        if path.is_file():
            path.unlink()
    partial.mkdir()
    (partial / 'checkpoint').write_bytes(authors_file[:-100])
    assert_right(load(), weights)
    assert on_drive.downloads == [None]


@pytest.mark.parametrize('overlay', [{}, dict(hf_hub_id=f'org/{released.NAME}')])
def test_server_that_fails_once(on_hub, weights, overlay):
    on_hub.fault = Fault('status', times=1, status=500)
    assert_right(load(pretrained_cfg_overlay=overlay), weights)
    assert on_hub.fault.times == 0


def test_record_nested_too_deep(on_hub, weights, own_world):
    load()
    record, = (own_world / 'elsa_models').rglob(cache.RECORD)
    record.write_text('[' * 100_000)
    assert 'cannot be read' in cached_weights()[record.parent.name]
    assert_right(load(), weights)


# offline


def test_offline(on_hub, on_drive, weights, monkeypatch, own_world):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError) as e:
        load()
    assert str(e.value).count('OFFLINE') >= 2 and 'unset HF_HUB_OFFLINE' in str(e.value)
    assert not on_hub.requests and not on_drive.requests
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    load()
    load(f'hf-hub:org/{released.NAME}')
    on_hub.requests.clear()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert_right(load(), weights)
    assert_right(load(f'hf-hub:org/{released.NAME}'), weights)
    for path in (own_world / 'elsa_models').rglob('*'):
        if path.is_file():
            path.unlink()
    assert_right(load(), weights)  # from huggingface_hub's cache
    assert not on_hub.requests and not on_drive.requests


WITHOUT_NETWORK = """
import sys, time
import timm, elsa_models
from elsa_models.models._naming import create_named
model = timm.create_model('test_elsa_swin')
start = time.monotonic()
for use in (lambda name: elsa_models.warm_start(model, name), lambda name: create_named(name, pretrained=True)):
    try:
        use('test_vit.r160_in1k')
    except elsa_models.WeightsError as e:
        print(e, file=sys.stderr)
assert time.monotonic() - start < 10, 'it takes too long'
"""


def test_without_a_network_one_line_says_so_at_once(own_world):
    env = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(own_world), 'HF_HUB_OFFLINE': '0'}
    done = subprocess.run([sys.executable, '-c', WITHOUT_NETWORK], env=env, text=True, capture_output=True, timeout=120)
    first, second = done.stderr.splitlines()
    assert first.startswith("source: 'test_vit.r160_in1k' could not be had. ConnectError")
    assert second.startswith("'test_vit.r160_in1k' could not be had. ConnectError")


def test_drive_without_a_network_is_given_up_at_once(monkeypatch, capfd):
    from elsa_models.models._naming import create_named

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(sources, '_why_unreachable', lambda: OSError('no route'))
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    monkeypatch.setattr(urllib.request, 'getproxies', dict)
    monkeypatch.setattr(gdown, 'download', lambda **kwargs: pytest.fail('asks for the file'))
    for use in (lambda: load(), lambda: create_named(released.NAME, pretrained=True)):
        with pytest.raises(WeightsError) as e:
            use()
        assert 'drive.google.com is not to be found, as without a network' in str(e.value)
        assert 'OFFLINE' not in str(e.value)  # which nobody has set
    assert capfd.readouterr().err == ''


def test_threads_without_a_network_leave_the_hubs_mode_as_it_was(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(sources, '_why_unreachable', lambda: OSError('no route'))
    first, second = sources.reaching_hub(), sources.reaching_hub()
    first.__enter__()
    second.__enter__()
    assert constants.HF_HUB_OFFLINE
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE  # the second is at work
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE and sources._unreachable is None


# the disk


LOAD = f'timm.create_model({released.NAME!r}, pretrained=True)'
EXPECT_ERROR = f'''
try:
    {LOAD}
except WeightsError as e:
    print(e)
'''


@pytest.mark.parametrize('where', ['hub', 'drive'])
def test_disk_full_by_a_limit(on_hub, on_drive, weights, own_world, where):
    """Writing beyond 100 kB fails in the operating system, as on a full disk."""
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))'
    env = dict(ELSA_HUB_NAMESPACE='org') if where == 'hub' else {}
    out = run_child(limit + EXPECT_ERROR, own_world, hub=on_hub.url, drive=on_drive.url, **env)
    assert 'File too large' in out and 'export ELSA_CACHE=FOLDER' in out
    assert not [f for f in cache_files(own_world) if f.endswith(('.safetensors', '.json'))]
    out = run_child(LOAD, own_world, hub=on_hub.url, drive=on_drive.url, **env)  # the limit is gone
    assert list(cached_weights().values())[0].startswith('ok')


def test_disk_full_for_the_converted_file(on_drive, weights, own_world, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith('.safetensors'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(cache.os, 'replace', full)
        with pytest.raises(WeightsError, match='No space left on device'):
            load()
    assert not [f for f in cache_files(own_world) if 'partial' not in f]
    assert_right(load(), weights)


@pytest.mark.parametrize('where', ['hub', 'drive'])
def test_disk_full_on_a_small_disk(on_hub, on_drive, own_world, tmp_path, where):
    disk = tmp_path / 'disk'
    disk.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=150k', 'tmpfs', str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip('may not mount a disk here')
    try:
        env = dict(ELSA_HUB_NAMESPACE='org') if where == 'hub' else {}
        out = run_child(EXPECT_ERROR, disk, hub=on_hub.url, drive=on_drive.url, **env)
        assert 'No space left on device' in out and 'export ELSA_CACHE=FOLDER' in out
        assert not [f for f in cache_files(disk) if f.endswith(('.safetensors', '.json'))]
    finally:
        subprocess.run(['umount', str(disk)], check=True)


@pytest.fixture
def foreign_folder():
    """A folder that an unprivileged user may enter, and how to become one."""
    if os.name == 'nt':
        pytest.skip('no users of this kind')
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob('*'):
        if path.is_dir():
            path.chmod(0o755)
    subprocess.run(['rm', '-rf', str(folder)], check=True)


DROP = 'import os\nif os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n'


def test_cache_that_is_read_only(on_hub, on_drive, foreign_folder):
    home = foreign_folder / 'home'
    home.mkdir()
    home.chmod(0o555)
    out = run_child(DROP + EXPECT_ERROR, home, hub=on_hub.url, drive=on_drive.url, ELSA_HUB_NAMESPACE='org')
    assert 'Permission denied' in out and 'export ELSA_CACHE=FOLDER' in out
    home.chmod(0o755)
    run_child(LOAD, home, hub=on_hub.url, ELSA_HUB_NAMESPACE='org')
    for path in [home, *home.rglob('*')]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    count = len(on_hub.requests)
    run_child(DROP + LOAD, home, hub=on_hub.url, ELSA_HUB_NAMESPACE='org')  # what is there can be used
    assert len(on_hub.requests) == count


# processes


@pytest.mark.parametrize('where', ['hub', 'drive'])
def test_killed_half_way(on_hub, on_drive, weights, own_world, where):
    env = dict(ELSA_HUB_NAMESPACE='org') if where == 'hub' else {}
    server = on_hub if where == 'hub' else on_drive
    server.fault = Fault('slow', delay=.3)
    child = start_child(SMALL_CHUNKS + LOAD, own_world, hub=on_hub.url, drive=on_drive.url, **env)
    pattern = '*.incomplete' if where == 'hub' else '*.part'
    deadline = time.monotonic() + 50
    while not [p for p in own_world.rglob(pattern) if p.stat().st_size > 30000]:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not [f for f in cache_files(own_world) if f.endswith(('.safetensors', '.json', 'checkpoint'))]
    assert not list(own_world.rglob('model.safetensors'))
    server.fault = None
    count = len(server.requests)
    if where == 'drive':
        from elsa_models import set_hub_namespace
        set_hub_namespace('')
    assert_right(load(), weights)
    if where == 'drive':
        assert int(on_drive.downloads[-1][6:-1]) > 0  # continued
    assert len(server.requests) > count and list(cached_weights().values())[0].startswith('ok')


def test_killed_while_it_converts(on_drive, weights, own_world):
    code = f'''
    import os, signal
    from elsa_models.hub import cache
    replace = os.replace
    def kill_before_the_record(source, target):
        if str(target).endswith('weights.json'):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    cache.os.replace = kill_before_the_record
    {LOAD}
    '''
    child = start_child(code, own_world, drive=on_drive.url)
    child.communicate(timeout=50)
    assert child.returncode == -signal.SIGKILL
    files = cache_files(own_world)
    assert [f for f in files if f.endswith('.safetensors')] and not any(f.endswith('/weights.json') for f in files)
    count = len(on_drive.downloads)
    assert_right(load(), weights)
    assert len(on_drive.downloads) == count  # the complete download was used, the file without a record was not
    assert len(cache_files(own_world)) == 2


@pytest.mark.parametrize('where', ['hub', 'drive'])
def test_two_processes_at_once(on_hub, on_drive, own_world, weights, where):
    env = dict(ELSA_HUB_NAMESPACE='org') if where == 'hub' else {}
    server = on_hub if where == 'hub' else on_drive
    server.fault = Fault('slow', delay=.2)
    code = f'print(sum(x.double().sum().item() for x in {LOAD}.state_dict().values()))'
    children = [start_child(code, own_world, hub=on_hub.url, drive=on_drive.url, **env) for _ in range(2)]
    outs = [child.communicate(timeout=55) for child in children]
    assert [child.returncode for child in children] == [0, 0], outs
    expected = sum(x.double().sum().item() for x in weights.state_dict().values())
    assert [float(out) for out, _ in outs] == [expected] * 2
    downloads = [1 for method, path, _ in server.requests if method == 'GET' and path.startswith((
        '/download', f'/org/{released.NAME}/resolve'))]
    assert len(downloads) == 1


def test_the_lock_of_a_dead_process_is_free(on_hub, weights, own_world):
    code = f'''
    import os, signal
    from elsa_models.hub.cache import CacheEntry, cache_root
    with CacheEntry(cache_root() / {released.NAME!r}).lock():
        os.kill(os.getpid(), signal.SIGKILL)
    '''
    child = start_child(code, own_world)
    child.communicate(timeout=50)
    assert child.returncode == -signal.SIGKILL
    assert (own_world / 'elsa_models' / released.NAME / '.lock').exists()
    assert_right(load(), weights)


