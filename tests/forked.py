"""Processes forked from one that has imported everything: as good as new ones, without seconds of imports."""
import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'timm', 'gdown', 'onnxruntime', 'elsa_models'])
_AT_FIRST = dict(os.environ)  # what modules read when they are imported may not depend on the test that comes first


def _run(function, args, env, cwd, paths, output):
    """Target of the forked process: call `function`, with the standard streams in files."""
    for stream, path in zip((1, 2), output):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, 'w', closefd=False) for stream in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    from huggingface_hub import constants  # imported already, when the variable was another
    constants.HF_HUB_OFFLINE = env.get('HF_HUB_OFFLINE') == '1'
    sys.path[:0] = paths
    status = 0
    try:
        function(*args)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


class Forked:
    """The part of `subprocess.Popen` that tests use, around a forked process that calls a function.

    Args:
        function: A function of a module's top level.
        args: Its arguments, which are pickled.
        env: All environment variables; what is read from them at import has been read already.
        cwd: Working folder.
        paths: Folders for the front of sys.path.
    """

    def __init__(self, function, args=(), env=None, cwd='/', paths=()):
        self._folder = tempfile.TemporaryDirectory()
        self._output = [str(Path(self._folder.name, name)) for name in ('out', 'err')]
        for path in self._output:
            Path(path).touch()
        env = dict(os.environ if env is None else env)
        arguments = (function, args, env, str(cwd), [str(p) for p in paths], self._output)
        self._process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        with mock.patch.dict(os.environ, _AT_FIRST, clear=True):
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

    def result(self, timeout=60):
        """What a process prints that must end well."""
        out, err = self.communicate(timeout)
        assert self.returncode == 0, err[-3000:]
        return out
