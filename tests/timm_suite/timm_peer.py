"""Run timm's own model tests, unmodified, on the models of this package.

The tests are not part of timm's wheel, so they come from the sdist of the very version that is installed.

Also a command line program, with model name wildcards: `python tests/timm_suite/timm_peer.py 'elsa_swin_*'`
"""
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Sequence, Set, Tuple

import timm

import elsa_models

SUITE_DIR = Path(__file__).resolve().parent
TEST_FILE = 'tests/test_models.py'


class SdistError(RuntimeError):
    """timm's sdist cannot be had, or is not that of the installed version."""


def _sdist_version(path: Path) -> str:
    """Version in the metadata of timm's sdist.

    Raises:
        SdistError: If the file is not a readable sdist of timm.
    """
    try:
        with tarfile.open(path) as archive:
            name = next(n for n in archive.getnames() if re.fullmatch(r'timm-[^/]+/PKG-INFO', n))
            metadata = archive.extractfile(name).read().decode()
    except (OSError, EOFError, tarfile.TarError, zlib.error, StopIteration) as e:
        raise SdistError(f'{path} is not a readable sdist of timm ({type(e).__name__}: {e}).') from e
    return re.search(r'^Version: (.+)$', metadata, re.MULTILINE).group(1).strip()


def _check_version(path: Path) -> Path:
    version = _sdist_version(path)
    if version != timm.__version__:
        raise SdistError(f'{path} holds timm {version}, but timm {timm.__version__} is installed.')
    return path


def _cache_dir() -> Path:
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root) / 'elsa_models' / 'timm_sdist'


def timm_sdist() -> Path:
    """Path of the sdist of the installed timm.

    Taken from `ELSA_TIMM_SDIST` where that is set, else from a cache of the user, else downloaded with pip. pip has to
    prepare the metadata of any sdist it downloads, hence fetches timm's small build backend as well.

    Raises:
        SdistError: If there is none, or one of another version.
    """
    given = os.environ.get('ELSA_TIMM_SDIST')
    if given:
        return _check_version(Path(given))

    name = f'timm-{timm.__version__}.tar.gz'
    cached = _cache_dir() / name
    if cached.is_file():
        try:
            return _check_version(cached)
        except SdistError:
            cached.unlink(missing_ok=True)

    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
        command = [
            sys.executable, '-m', 'pip', 'download', f'timm=={timm.__version__}',
            '--no-deps', '--no-binary', 'timm', '--dest', tmp,
        ]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        downloaded = Path(tmp) / name
        if pip.returncode or not downloaded.is_file():
            raise SdistError(
                f'Cannot get the sdist of timm {timm.__version__}, which holds the tests to run. pip ended with '
                f'{pip.returncode}:\n{pip.stdout[-2000:]}\n'
                f'Run this again with a package index in reach, or download {name} elsewhere and set ELSA_TIMM_SDIST '
                f'to its path.')
        # a rename within one folder, so that a concurrent run sees a whole file or none
        os.replace(_check_version(downloaded), cached)
    return cached


def unpack_tests(dest: Path) -> Path:
    """Unpack timm's tests and their pytest configuration.

    The `timm` package of the sdist is left out: the installed one is the one under test.

    Returns:
        The folder that holds `tests` and `pyproject.toml`.
    """
    root = f'timm-{timm.__version__}'
    with tarfile.open(timm_sdist()) as archive:
        members = [
            m for m in archive.getmembers()
            if m.name == f'{root}/pyproject.toml' or m.name.startswith(f'{root}/tests/')
        ]
        archive.extractall(dest, members=members, filter='data')
    assert (dest / root / TEST_FILE).is_file(), f'The sdist of timm {timm.__version__} has no {TEST_FILE}'
    return dest / root


@dataclass
class SuiteResult:
    """Outcome of one run, every test as (function, model name)."""
    returncode: int
    output: str
    passed: Set[Tuple[str, str]] = field(default_factory=set)
    failed: Set[Tuple[str, str]] = field(default_factory=set)
    skipped: Dict[Tuple[str, str], str] = field(default_factory=dict)


def run_suite(
        dest: Path,
        models: Sequence[str],
        faults: Sequence[str] = (),
        timeout: float = 3600.,
) -> SuiteResult:
    """Run timm's model tests in a process of their own.

    Args:
        dest: Empty folder for the unpacked tests.
        models: Wildcards for model names, without tags.
        faults: Names of faults of `fault_plugin` to plant.
        timeout: Seconds after which the run is given up.

    Raises:
        SdistError: If timm's tests cannot be had.
        subprocess.TimeoutExpired: If the run takes too long.
    """
    root = unpack_tests(dest)
    report = dest / 'report.xml'
    # timm leaves some tests out on GitHub's runners and here none may be, weights are never looked for
    env = {k: v for k, v in os.environ.items() if k not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS', 'PYTEST_PLUGINS')}
    paths = [str(SUITE_DIR), str(Path(elsa_models.__file__).resolve().parents[1]), env.get('PYTHONPATH', '')]
    env['PYTHONPATH'] = os.pathsep.join(p for p in paths if p)
    env['ELSA_PEER_MODELS'] = ' '.join(models)
    env['HF_HUB_OFFLINE'] = '1'
    command = [sys.executable, '-m', 'pytest', '-p', 'peer_plugin']
    if faults:
        command += ['-p', 'fault_plugin']
        env['ELSA_PEER_FAULTS'] = ' '.join(faults)
    command += ['-p', 'no:cacheprovider', '-q', '--tb=short', '-rs', '--disable-warnings']
    command += [f'--junitxml={report}', TEST_FILE]
    run = subprocess.run(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)

    result = SuiteResult(run.returncode, run.stdout)
    for case in ET.parse(report).iter('testcase') if report.is_file() else ():
        # ids are `[name]` or `[batch_size-name]`
        match = re.fullmatch(r'(test_\w+)\[(?:\d+-)?([\w.]+)\]', case.get('name'))
        key = match.groups() if match else (case.get('name'), '')
        skip = case.find('skipped')
        if skip is not None:
            result.skipped[key] = skip.get('message')
        elif case.find('failure') is not None or case.find('error') is not None:
            result.failed.add(key)
        else:
            result.passed.add(key)
    result.passed -= result.failed  # a test can pass and fail in its teardown
    return result


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        result = run_suite(Path(tmp), sys.argv[1:] or ['*'])
    print(result.output)
    sys.exit(result.returncode)
