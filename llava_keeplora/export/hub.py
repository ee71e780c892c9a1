"""Upload to and download from the Hugging Face Hub, through `huggingface_hub` alone."""

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

#: Files that are fetched of a repository: no code and no pickles.
FETCHED = ["*.safetensors", "*.json", "*.jsonl", "*.yaml", "*.md", "*.png"]


def check_repo_id(repo_id: str) -> None:
    """Validate a repository's name (`user/name`).

    Raises:
        ConfigError: the Hub allows no such name, or it has no user.
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
    """Return the files that a push of a folder uploads: relative path → bytes."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, which is created if it doesn't exist.

    Args:
        folder: the folder to upload, with all its files.
        repo_id: `user/name`.

    Returns:
        the repository's URL.

    Raises:
        RunError: the Hub cannot be reached or refuses; the folder stays as it is.
    """
    with _translate_hub_errors(
        f"pushing to '{repo_id}'",
        f"the export in {folder} is complete; push it later with `hf upload {repo_id} {folder}`",
    ):
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of llava-keeplora")
    return str(url)


def download(repo_id: str, revision: str | None, folder: Path | None) -> Path:
    """Download a repository's tensors, JSON files, recipes and card (see `FETCHED`).

    Args:
        repo_id: `user/name`.
        revision: a branch, tag or commit; the newest when None.
        folder: the folder to download to; the Hub's cache when None.

    Raises:
        ConfigError: the name is neither a folder nor a valid repository name.
        RunError: the Hub cannot be reached or refuses.
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
    """Turn errors of the Hub and the network into a one-sentence RunError."""
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
