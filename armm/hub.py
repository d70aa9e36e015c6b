"""Fetching single files from the hub and keeping converted pipelines beside its cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Raised when the layout of converted directories changes: older ones are then written anew.
CONVERSION_VERSION = 1

_PIPELINE_FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.md"]
_LINK = re.compile(
    r"https?://[^/]+/(?P<repo>[^/]+/[^/]+)/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>[^?#]+)(?:[?#].*)?"
)
_SHORT = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^?#]+\.(?:pt|pth|bin|ckpt|safetensors))")


class DownloadError(OSError, ValueError):
    """A file that the hub does not have, does not give out, or that cannot be reached."""


@contextlib.contextmanager
def _clear_errors(what: str, repo_id: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{what} is not in the local hub cache and could not be downloaded: the hub cannot be reached ({error})."
        ) from error
    except GatedRepoError as error:
        raise DownloadError(f"{repo_id} is gated: accept its licence on its page and log in to the hub.") from error
    except RepositoryNotFoundError as error:
        raise DownloadError(f"the hub has no repository {repo_id}, or it is private and needs a token.") from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"the repository {repo_id} does not have the revision asked for ({error}).") from error
    except EntryNotFoundError as error:
        raise DownloadError(f"the repository {repo_id} does not have {what}.") from error
    except HFValidationError as error:
        raise DownloadError(f"{repo_id!r} is not a valid hub id ({error}).") from error
    except (
        *HfHubHTTPError.__bases__,
        OSError,
    ) as error:  # of the HTTP library that huggingface_hub uses, and of the disk
        raise DownloadError(f"downloading {what} failed ({type(error).__name__}: {error}).") from error


def fetch(repo_id: str, filename: str, **options: Any) -> Path:
    """The local path of `filename` of the hub repository `repo_id`: from the cache, or downloaded into it.

    Args:
        options: `revision`, `cache_dir`, `local_files_only`, `force_download`, `token` of `hf_hub_download`.
    """
    from huggingface_hub import hf_hub_download

    with _clear_errors(f"{filename} of {repo_id}", repo_id):
        return Path(hf_hub_download(repo_id, filename, **options))


def fetch_snapshot(repo_id: str, **options: Any) -> Path:
    """Folder of all pipeline files of a hub repository; the cached one where the hub cannot be reached.

    Args:
        options: as for `fetch`.
    """
    from huggingface_hub import snapshot_download

    if Path(repo_id).is_file():
        raise ValueError(f"{repo_id} is a file: load it with `from_single_file`.")
    if repo_id.count("/") != 1 or repo_id.startswith(("/", ".", "~")):
        raise ValueError(f"{repo_id!r} is neither a directory nor a hub id of the form 'organisation/repository'.")
    options = {key: value for key, value in options.items() if value is not None}
    with _clear_errors(f"the files of {repo_id}", repo_id):
        return Path(snapshot_download(repo_id, allow_patterns=_PIPELINE_FILES, **options))


def resolve_file(path_or_link: Any, **options: Any) -> Path:
    """A local path for a local file, a hub link, or `organisation/repository/file.ext`.

    Args:
        options: passed to `fetch` for files on the hub.
    """
    text = os.fspath(path_or_link)
    if Path(text).exists():
        return Path(text)
    link = _LINK.fullmatch(text)
    if link:
        options.setdefault("revision", link["revision"])
        return fetch(link["repo"], link["file"], **options)
    if "://" in text:
        raise DownloadError(
            f"{text!r} is not a link to a file on the hub: expected .../organisation/repository/resolve/main/file."
        )
    short = _SHORT.fullmatch(text)
    if short:
        return fetch(short["repo"], short["file"], **options)
    raise DownloadError(
        f"there is no file {text}, and it is not a hub link or 'organisation/repository/file.pt' either."
    )


def converted_folder(name: str, sources: Iterable[Path], config: dict[str, Any] | None = None) -> Path:
    """Where the conversion of `sources` with the options `config` under the name `name` is cached.

    The folder lies in `ARMM_CACHE`, by default `armm` in the hub's home, and changes with the names and sizes of the files (the hub's
    cache names files by their content).
    """
    from huggingface_hub import constants

    digest = hashlib.sha256(f"{CONVERSION_VERSION}:{json.dumps(config or {}, sort_keys=True)}".encode())
    for source in sources:
        real = source.resolve()
        digest.update(f"{real.name}:{real.stat().st_size}".encode())
    root = Path(os.environ.get("ARMM_CACHE") or Path(constants.HF_HOME) / "armm")
    return root / "converted" / f"{name}-{digest.hexdigest()[:16]}"
