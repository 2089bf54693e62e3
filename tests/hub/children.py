"""Processes of their own for tests of the hub, forked from one that has imported everything."""
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'timm', 'gdown', 'elsa_models'])


def _environment(home, hub, env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'ELSA_'))}
    clean.update(HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', OMP_NUM_THREADS='1')
    clean['HF_ENDPOINT'] = hub or 'http://127.0.0.1:9'
    return {**clean, **env}


def _run(code, env, drive, paths, output):
    """Target of the forked process: what `python -c` does with `code`, with its streams in files."""
    for stream, path in zip((1, 2), output):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, 'w', closefd=False) for stream in (1, 2))
    os.chdir('/')
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = paths
    status = 0
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars
        home = Path(env['HF_HOME'])  # the variables are read at import, which lies behind
        constants.HF_HOME, constants.HF_HUB_CACHE = str(home), str(home / 'hub')
        constants.HF_TOKEN_PATH, constants.HF_HUB_DISABLE_XET = str(home / 'token'), True
        constants.ENDPOINT = env['HF_ENDPOINT']
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}'
        constants.HF_HUB_OFFLINE = env.get('HF_HUB_OFFLINE') == '1'
        disable_progress_bars()
        import released  # noqa: F401
        import servers
        import timm
        import torch

        from elsa_models.models._checkpoint import WeightsError
        names = dict(sys=sys, timm=timm, torch=torch, servers=servers, WeightsError=WeightsError)
        with servers.redirected_drive(drive):
            exec(compile(textwrap.dedent(code), '<child>', 'exec'), names)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class Child:
    """The part of `subprocess.Popen` that these tests use, around a forked process that runs `code`.

    timm, torch, servers and WeightsError are there already. The process is set up as the environment variables would
    have it, which huggingface_hub reads when it is imported, that is, before the fork.
    """

    def __init__(self, code, home, hub=None, drive=None, **env):
        self._folder = tempfile.TemporaryDirectory()
        self._output = [str(Path(self._folder.name, name)) for name in ('out', 'err')]
        for path in self._output:
            Path(path).touch()
        arguments = (code, _environment(home, hub, env), drive, [str(HERE), str(HERE.parent)], self._output)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def communicate(self, timeout=60):
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(f'the process did not end within {timeout} seconds')
        texts = tuple(Path(path).read_text() for path in self._output)
        self._folder.cleanup()
        return texts


def run_child(*args, **kwargs):
    """What a process prints that must end well."""
    child = Child(*args, **kwargs)
    out, err = child.communicate()
    assert child.returncode == 0, err[-3000:]
    return out


FRESH = '''
import sys
sys.path[:0] = {paths}
import servers
redirect = servers.redirected_drive({drive!r})
redirect.__enter__()
import timm, torch, released, elsa_models
'''


def run_fresh_child(code, home, hub=None, drive=None, **env):
    """What a new interpreter prints, configured by environment variables alone; it must end well."""
    import subprocess
    code = FRESH.format(paths=[str(HERE), str(HERE.parent)], drive=drive) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, '-c', code], env=_environment(home, hub, env), text=True, capture_output=True, cwd='/',
        timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
