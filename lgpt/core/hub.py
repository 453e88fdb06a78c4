"""Files of the Hugging Face hub, without the waiting: asked once, with a deadline. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

from lgpt.core.logging import get_logger

_logger = get_logger(__name__)
ANSWER_SECONDS = 5.0


def hub_folder(
    name: str,
    *,
    repo_type: str,
    choose: Callable[[Sequence[str]], Sequence[str]],
    revision: Optional[str] = None,
    cache_folder: Optional[Path] = None,
) -> Path:
    """A folder with files of a hub repository; from the local hub cache when the hub is silent.

    `snapshot_download` alone waits without end for a hub that takes the connection and does not
    answer (seen with huggingface-hub 2.4; a firewall that drops packets looks the same), so the hub
    is asked first, with a deadline.

    Args:
        name: Such as nlphuji/flickr30k.
        repo_type: model or dataset.
        choose: From the names of all files to the ones that are wanted; what it raises comes
            through, before anything is fetched. Not called without a hub.
        revision: Branch or commit; default main.
        cache_folder: Where downloads are kept; default huggingface_hub's own place.

    Raises:
        ConnectionError: Neither the hub nor the cache has it; one line that says why.
    """
    from huggingface_hub import snapshot_download

    asked: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    asked["cache_dir"] = None if cache_folder is None else str(cache_folder)
    files, silence = _files_of(name, repo_type, revision)
    if silence is None:
        asked["allow_patterns"] = list(choose(files))
    try:
        folder = snapshot_download(name, local_files_only=silence is not None, **asked)
    # By release its own errors, requests' or httpx's.
    except Exception as error:
        raise ConnectionError(_first_line(silence or error)) from error
    if silence is not None:
        _logger.info("%s is read from the hub cache, %s: %s", name, folder, _first_line(silence))
    return Path(folder)


def _files_of(
    name: str, repo_type: str, revision: Optional[str]
) -> tuple[list[str], Optional[Exception]]:
    """Names of a repository's files, or why they cannot be had."""
    from huggingface_hub import HfApi

    try:
        info: Any = HfApi().repo_info(
            name, repo_type=repo_type, revision=revision, timeout=ANSWER_SECONDS
        )
    except Exception as error:  # as above; `hub_folder` raises it when the cache has nothing
        return [], error
    return [file.rfilename for file in info.siblings or []], None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
