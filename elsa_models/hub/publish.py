"""From a converted folder to a repository of a hub."""
import hashlib
from pathlib import Path
from typing import List, NamedTuple, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi

from ..models._checkpoint import WeightsError
from .convert import FILES, check_folder
from .sources import explain


class Published(NamedTuple):
    """What `publish` did, or would do."""
    repo_id: str
    url: str
    revision: str  # commit, or the branch in a dry run
    files: List[str]  # name, size in bytes and sha256 of each


def publish(
        folder: Union[str, Path],
        repo_id: str,
        private: bool = False,
        revision: Optional[str] = None,
        message: Optional[str] = None,
        dry_run: bool = False,
        token: Optional[str] = None,
) -> Published:
    """Push a folder made by `convert.save` or by a training to a hub repository, which is created if need be.

    Nothing but its three files is sent, the card with the owner filled in, and afterwards the hub is asked for the
    digest of what it holds.

    Args:
        folder: The folder, or that of a run, whose `model` is taken, with `local-dir:` before it or not; checked to
            load by plain timm first.
        repo_id: Owner and name.
        private: Make a new repository private; one that exists stays as it is.
        revision: Branch to push to, created if need be; the main one if None.
        message: Of the commit.
        dry_run: Check the folder and say what would be sent, without a request.
        token: That of huggingface_hub's login or `HF_TOKEN` if None.

    Raises:
        ValueError: The repository's id is none.
        WeightsError: The folder is not fit to be published, or the hub refused it or holds something else.
    """
    folder = Path(str(folder).removeprefix('local-dir:'))
    if (folder / 'model' / 'config.json').is_file() and not (folder / 'config.json').exists():
        folder = folder / 'model'
    owner, _, name = repo_id.partition('/')
    if not owner or not name or '/' in name:
        raise ValueError(f'repo_id: got {repo_id!r}, must be OWNER/NAME.')
    config = check_folder(folder)
    card = (folder / 'README.md').read_text(encoding='utf-8').replace('hf-hub:OWNER/', f'hf-hub:{owner}/')
    contents = {name: (folder / name).read_bytes() for name in FILES}
    contents['README.md'] = card.encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    digest = digests['model.safetensors']
    if digest not in card:
        raise WeightsError(
            f'{folder / "README.md"}: does not give the sha256 of model.safetensors, {digest}. Write it again.')
    files = [f'{name} {len(data)} {digests[name]}' for name, data in contents.items()]
    api = HfApi(token=token, library_name='elsa_models')
    url = f'{api.endpoint}/{repo_id}'
    if dry_run:
        return Published(repo_id, url, revision or 'main', files)
    message = message or f'{config["architecture"]}, model.safetensors sha256 {digest[:16]}'
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision and revision != 'main':
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=message,
            revision=revision,
        )
        info = api.get_paths_info(repo_id, ['model.safetensors'], revision=commit.oid)
    except Exception as e:  # of httpx2 and huggingface_hub
        error = explain(e)
        raise WeightsError(f'{repo_id}: was not published ({error.reason}). {error.fix}'.rstrip()) from e
    if len(info) != 1 or info[0].lfs is None or info[0].lfs.sha256 != digest:
        raise WeightsError(
            f'{repo_id}: the hub does not hold the model.safetensors that was sent, at {commit.oid}. Publish it again.')
    return Published(repo_id, url, commit.oid, files)
