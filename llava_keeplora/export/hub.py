"""The Hub: what would be pushed, pushing it, and fetching what others pushed; all through huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from llava_keeplora.errors import ConfigError, RunError

#: Whatever else a repository holds is not fetched: no code, no pickles.
FETCHED = ["*.safetensors", "*.json", "*.jsonl", "*.yaml", "*.md", "*.png"]


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository's name on the Hub, before work is done for it.

    Raises:
        ConfigError: naming the mistake.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"'{repo_id}' is no name on the Hub ({str(error).split('.')[0]})", "write user/name"
        ) from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"'{repo_id}' is no name on the Hub (it has no user)", "write user/name")


def contents(folder: Path) -> dict[str, int]:
    """What a push of a folder uploads: relative path → bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder as a model's repository, made if it isn't there.

    Args:
        folder: what to upload, all of it.
        repo_id: `user/name`.

    Returns:
        the repository's address.

    Raises:
        RunError: if the Hub cannot be reached or refuses; the folder stays as it is.
    """
    with _translate_hub_errors(
        f"pushing to '{repo_id}'",
        f"the export in {folder} is complete; push it later with `hf upload {repo_id} {folder}`",
    ):
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of llava-keeplora")
    return str(url)


def download(repo_id: str, revision: str | None, folder: Path) -> Path:
    """Fetch a repository's tensors, JSON, recipes and card as plain files.

    Args:
        repo_id: `user/name`.
        revision: a branch, tag or commit; the newest when None.
        folder: where to.

    Raises:
        ConfigError: if the name is no repository's and no folder's.
        RunError: if the Hub cannot be reached.
    """
    try:
        check_repo_id(repo_id)
    except ConfigError as error:
        raise ConfigError(
            f"there is no folder '{repo_id}', and it is no name on the Hub", "give a folder, or user/name"
        ) from error
    with _translate_hub_errors(
        f"fetching '{repo_id}'", "give a folder of this machine, or come back where there is a network"
    ):
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, local_dir=folder, allow_patterns=FETCHED
            )
        )


@contextmanager
def _translate_hub_errors(what: str, cure: str) -> Iterator[None]:
    """Say in a sentence what kept the Hub from answering."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise RunError(
            f"{what} needs a network, and HF_HUB_OFFLINE is set", f"unset it, or {cure}"
        ) from error
    except RepositoryNotFoundError as error:
        raise RunError(
            f"{what} found no such repository",
            f"check its name, and log in with `hf auth login` if it is private; {cure}",
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise RunError(
                f"{what} is not allowed (the Hub answered {status})",
                f"log in with `hf auth login` as a user who may; {cure}",
            ) from error
        raise RunError(f"{what} failed (the Hub answered {status})", cure) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise RunError(
            f"{what} failed, because {huggingface_hub.constants.ENDPOINT} cannot be reached "
            f"({type(error).__name__})",
            cure,
        ) from error
