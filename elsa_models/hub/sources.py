"""Where weights are downloaded from: repositories of a hub, files on Google Drive, and files on the web."""
import errno
import hashlib
import http.client
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Optional, Union
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import are_progress_bars_disabled

from .._extras import how_to_install
from .._version import __version__
from ..models._checkpoint import WEIGHT_FILES, WeightsError
from .cache import sha256_of

_DRIVE = 'drive.google.com'
_TIMEOUT = 30.  # seconds without a byte, of downloads from Google Drive and the web
_RETRIES = 3
_PAUSE = 1.  # seconds between two looks for the hub
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

INSTALL_GDOWN = how_to_install('hub')
SET_TOKEN = 'hf auth login (or export HF_TOKEN=...), with a token that may read the repository'
SET_CACHE = 'export ELSA_CACHE=FOLDER HF_HOME=FOLDER, a folder that can be written and has room'
GO_ONLINE = 'unset HF_HUB_OFFLINE, once, to fill the cache'


_unreachable: Optional[Exception] = None  # why the hub does not answer, while `reaching_hub` works without it
_inside = 0  # calls that do
_lock = threading.Lock()


class SourceError(WeightsError):
    """A source that did not give a file, and the command that would help if one is known."""

    def __init__(self, reason: str, fix: str = '') -> None:
        super().__init__(f'{reason}. {fix}' if fix else reason)
        self.reason = reason
        self.fix = fix


def explain(error: BaseException) -> SourceError:
    """Say why a download failed, in one line."""
    if isinstance(error, SourceError):
        return error
    if isinstance(error, WeightsError):
        return SourceError(str(error).rstrip('.'))
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    root = chain[-1]
    for e in chain:
        if isinstance(e, HfHubHTTPError):
            root = e
    words = ' '.join(str(root).split())
    reason = f'{type(root).__name__}: {words[:300]}'.rstrip('.: ')
    fix = ''
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
    if status in (401, 403, 404) and not isinstance(root, EntryNotFoundError):
        fix = SET_TOKEN
    elif any(isinstance(e, OSError) and e.errno in _UNWRITABLE for e in chain):
        fix = SET_CACHE
    elif _is_kept_offline():
        fix = GO_ONLINE
    return SourceError(reason, fix)


def _is_kept_offline() -> bool:
    """Whether the user wants no network; while `reaching_hub` works without the hub, other places may be there."""
    return constants.HF_HUB_OFFLINE and _unreachable is None


def _look_up(host: str) -> None:
    """Fail at once where no network knows a host: gdown would try again, and tell of each time.

    Raises:
        SourceError: There is no such host.
    """
    try:
        if not urllib.request.getproxies():  # which look up by themselves
            socket.getaddrinfo(host, 443)
    except OSError as e:
        raise SourceError(f'{host} is not to be found, as without a network ({e})') from e


def _may_pass(error: Optional[BaseException]) -> bool:
    """Whether a connection broke half-way or a file was answered by a server's failure.

    huggingface_hub tries again by itself after failed HEAD requests, but not then.
    """
    while error is not None:
        if isinstance(error, ConnectionResetError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code >= 500:
            return error.response.request.method == 'GET'
        error = error.__cause__ or error.__context__  # httpcore, of old huggingface_hubs, hides the cause
    return False


def _matches_its_name(path: Path) -> bool:
    """Whether a file of huggingface_hub's cache is what its name in there says: a sha256, or git's sha1."""
    if not path.is_symlink():
        return True  # no names on systems without symbolic links
    name = Path(os.readlink(path)).name
    if re.fullmatch('[0-9a-f]{64}', name):
        return sha256_of(path) == name
    if re.fullmatch('[0-9a-f]{40}', name):
        data = path.read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest() == name
    return True


def _why_unreachable() -> Optional[Exception]:
    """Why the hub gives no answer of any kind, None if it does or is not to be asked; looks twice."""
    for is_last_try in (False, True):
        if constants.HF_HUB_OFFLINE:
            return None
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except Exception as e:  # of httpx2, of the operating system
            if is_last_try:
                return e
            time.sleep(_PAUSE)
    raise AssertionError('unreachable')


@contextmanager
def reaching_hub() -> Iterator[None]:
    """Let timm and huggingface_hub download, or find in the cache; without a network they do not try for a minute.

    huggingface_hub asks six times for each of the names that a file may have, and tells of each time. Where the hub
    does not answer at all, it works as with HF_HUB_OFFLINE here, which is as good for others meanwhile.

    Raises:
        Exception: Why the hub does not answer, where the cache is not enough.
    """
    global _unreachable, _inside
    with _lock:
        why = _unreachable or _why_unreachable()
        if why is not None:
            _inside += 1
            _unreachable, constants.HF_HUB_OFFLINE = why, True
    if why is None:
        yield
        return
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise why from None
    finally:
        with _lock:
            _inside -= 1
            if not _inside:  # the last of several threads
                _unreachable, constants.HF_HUB_OFFLINE = None, False


def download_from_hub(
        repo_id: str,
        revision: Optional[str] = None,
        filename: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> Path:
    """A file of weights of a hub repository, by huggingface_hub and verified by its digest.

    Args:
        repo_id: Owner and name.
        revision: Branch, tag or commit; the main branch if None.
        filename: Path in the repository; the usual names of weights if None.
        cache_dir: Folder for huggingface_hub's cache; its own if None.

    Returns:
        Path in huggingface_hub's cache.

    Raises:
        SourceError: It could not be had, or is not what its name says.
    """
    label = f'{repo_id}@{revision}' if revision else repo_id
    names = (filename,) if filename else WEIGHT_FILES
    for name in names:
        for is_last_try in (False, True):
            try:
                with reaching_hub():
                    path = Path(hf_hub_download(
                        repo_id,
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        library_name='elsa_models',
                        library_version=__version__,
                    ))
            except Exception as e:  # of httpx2, of huggingface_hub, of the operating system
                is_absent = isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError)
                if is_absent and name != names[-1]:
                    break
                if _may_pass(e) and not is_last_try:
                    continue
                raise explain(e) from e
            if _matches_its_name(path):
                return path
            # neither we nor anyone else may take it for good
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            if is_last_try:
                raise SourceError(f'{name} of {label} does not have the sha256 that the hub gives for it')
    raise AssertionError('unreachable')


def drive_id(url: Optional[str]) -> Optional[str]:
    """The id of a file on Google Drive, or None if the url is of something else."""
    if not isinstance(url, str) or urlsplit(url).hostname != _DRIVE:
        return None
    return parse_qs(urlsplit(url).query).get('id', [None])[0]


def download_from_drive(file_id: str, folder: Path) -> Path:
    """A file on Google Drive, by gdown. An unfinished download in `folder` is continued.

    Args:
        file_id: Google's id of the file.
        folder: Created if need be, and nobody else's.

    Returns:
        Path of the complete file, in `folder`.

    Raises:
        SourceError: It could not be had; what has come stays in `folder`.
    """
    if _is_kept_offline():
        raise SourceError('HF_HUB_OFFLINE is set', GO_ONLINE)
    try:
        import gdown
    except ImportError as e:
        raise SourceError('gdown is not installed', INSTALL_GDOWN) from e
    path = folder / 'checkpoint'
    if path.is_file():
        return path
    try:
        _look_up(_DRIVE)
        folder.mkdir(parents=True, exist_ok=True)
        before = _num_bytes(folder)
        try:
            _gdown(file_id, path)
        except gdown.DownloadError as e:
            # a server that cannot continue says so before it sends anything
            if isinstance(e, gdown.FileURLRetrievalError) or e.__cause__ or not before or _num_bytes(folder) != before:
                raise
            shutil.rmtree(folder)
            folder.mkdir()
            _gdown(file_id, path)
    except Exception as e:  # of requests, of gdown, of the operating system
        raise explain(e) from e
    return path


def _num_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def _gdown(file_id: str, path: Path) -> None:
    import gdown
    gdown.download(
        id=file_id,
        output=str(path),
        quiet=bool(are_progress_bars_disabled()),
        use_cookies=False,
        resume=True,
        timeout=_TIMEOUT,
        retries=_RETRIES,
    )


def download_from_web(url: str, folder: Path) -> Path:
    """A file at a plain address, by HTTP. An unfinished download in `folder` is continued.

    Args:
        url: Of http or https.
        folder: Created if need be, and nobody else's.

    Returns:
        Path of the complete file, in `folder`.

    Raises:
        SourceError: It could not be had; what has come stays in `folder`.
    """
    if _is_kept_offline():
        raise SourceError('HF_HUB_OFFLINE is set', GO_ONLINE)
    path = folder / 'checkpoint'
    if path.is_file():
        return path
    part = folder / 'checkpoint.part'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for tries_left in reversed(range(_RETRIES + 1)):
            try:
                _fetch(url, part)
                break
            except (OSError, http.client.HTTPException) as e:
                refused = isinstance(e, urllib.error.HTTPError) and e.code < 500
                if refused or getattr(e, 'errno', None) in _UNWRITABLE or not tries_left:
                    raise
        part.replace(path)
    except Exception as e:  # of urllib, of the operating system
        raise explain(e) from e
    return path


def _fetch(url: str, part: Path) -> None:
    """Append what is missing of the file at `url`, or all of it where the server cannot continue."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={'User-Agent': f'elsa_models/{__version__}'})
    if request.type not in ('http', 'https'):
        raise SourceError(f'{url!r} is no address of http or https')
    if start:
        request.add_header('Range', f'bytes={start}-')
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code != 416:  # what is there is as long as the file, or longer
            raise
        part.unlink()
        return _fetch(url, part)
    with response:
        if response.status != 206:
            start = 0
        length = response.headers.get('Content-Length')
        with open(part, 'ab' if start else 'wb') as f:
            shutil.copyfileobj(response, f)
            size = f.tell()
    if length is not None and size != start + int(length):
        raise ConnectionError(f'the connection ended after {size} of {start + int(length)} bytes')
