"""Whether the Hub can be asked for a model at all."""

from __future__ import annotations

from pathlib import Path

from llava_keeplora_eval.errors import EvalError


def check_reachable(name: str, revision: str | None = None) -> None:
    """Refuse a model that is neither a folder nor in the Hub's cache while the Hub does not answer.

    transformers would ask for most of a minute, with pauses that grow, before it says so. A mistyped folder
    often looks like a Hub id.

    Args:
        name: a folder or a Hub id.
        revision: on the Hub.

    Raises:
        EvalError: the Hub does not answer one request.
    """
    if Path(name).is_dir():
        return
    from huggingface_hub import constants, get_session, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        return  # transformers says at once what is not in the cache
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HTTPError as error:
        raise EvalError(
            f"there is no folder '{name}' for the model to be loaded from, and {constants.ENDPOINT} cannot "
            f"be reached ({type(error).__name__})",
            "give a folder with a checkpoint, or come back where there is a network",
        ) from error
