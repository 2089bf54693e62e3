"""Processes of their own for tests of the hub."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from forked import Forked

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def _environment(home, hub, env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'ELSA_'))}
    clean.update(HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1', OMP_NUM_THREADS='1')
    clean['HF_ENDPOINT'] = hub or 'http://127.0.0.1:9'
    return {**clean, **env}


def _run(code, drive):
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars
    home = Path(os.environ['HF_HOME'])  # huggingface_hub has read the variables when it was imported
    constants.HF_HOME, constants.HF_HUB_CACHE = str(home), str(home / 'hub')
    constants.HF_TOKEN_PATH, constants.HF_HUB_DISABLE_XET = str(home / 'token'), True
    constants.ENDPOINT = os.environ['HF_ENDPOINT']
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}'
    disable_progress_bars()
    import released  # noqa: F401
    import servers
    import timm
    import torch

    from elsa_models.models._checkpoint import WeightsError
    names = dict(sys=sys, timm=timm, torch=torch, WeightsError=WeightsError)
    with servers.redirected_drive(drive):
        exec(compile(textwrap.dedent(code), '<child>', 'exec'), names)


def start_child(code, home, hub=None, drive=None, **env):
    """A forked process that runs `code`, in which sys, timm, torch and WeightsError are imported."""
    return Forked(_run, (code, drive), _environment(home, hub, env), paths=PATHS)


def run_child(*args, **kwargs):
    """What such a process prints; it must end well."""
    return start_child(*args, **kwargs).result()


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
    code = FRESH.format(paths=PATHS, drive=drive) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, '-c', code], env=_environment(home, hub, env), text=True, capture_output=True, cwd='/',
        timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
