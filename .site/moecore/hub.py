"""Where a model lies: in the package, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_WEIGHTS = ["*.safetensors"]
_WANTED = ["*.json", "*.jinja", "tokenizer.model"]
# Subfolders and consolidated files repeat the weights in other layouts.
_UNWANTED = ["*/*", "consolidated*"]


def resolve_model(
    model: str | Path | None = None, revision: str | None = None, *, weights: bool = True
) -> Path:
    """Find the folder of a model, downloading it if it is named by a hub id.

    An existing folder wins over a hub id of the same name. A download goes to the hub's cache and
    takes weights, configuration and tokenizer only; without network, what the cache holds is used.

    Args:
        model: None for the model that comes with moecore; a folder; or a hub id such as
            "Qwen/Qwen3-30B-A3B". A Path, and a name that can be no hub id, are folders only.
        revision: branch, tag or commit, for a hub id only.
        weights: False leaves the weights out of a download.

    Returns:
        The folder. Which files lie in it is for its readers to check.

    Raises:
        FileNotFoundError: there is no such folder, or the hub or its cache do not have the model;
            the message says where it was looked for and what to do.
        PermissionError: the model is gated or private, and no token allows it.
    """
    if model is None:
        return _bundled_model()
    folder = Path(model).expanduser()
    if model != "" and folder.is_dir():  # Path("") is the current folder
        return folder
    if folder.is_file():
        raise NotADirectoryError(f"resolve_model: model must be a folder, got the file {folder}")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise FileNotFoundError(
            f"resolve_model: model must be an existing folder or a hub id (owner/name), got "
            f"{str(model)!r}; there is no folder {folder.absolute()}"
        )
    return _download(model, revision, weights, folder.absolute())


def _bundled_model() -> Path:
    folder = Path(str(importlib.resources.files("moecore") / "bundled"))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"resolve_model: this installation has no bundled model (no {folder / 'config.json'}); "
            "name a model folder or a hub id"
        )
    return folder


def _download(model: str, revision: str | None, weights: bool, folder: Path) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    at = model if revision is None else f"{model} at revision {revision}"
    looked = f"resolve_model: {at} not found: no folder {folder}"
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=_WANTED + _WEIGHTS if weights else _WANTED,
            ignore_patterns=_UNWANTED,
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"resolve_model: {at} is gated: accept its terms at "
            f"{constants.ENDPOINT}/{model} and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{looked}, and {constants.ENDPOINT}/{model} has no revision {revision}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{looked}, and {constants.ENDPOINT} has no model of that name that this machine may "
            "read; check the spelling, or log in if it is private (`hf auth login`, or HF_TOKEN)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise FileNotFoundError(
            f"{looked}, nothing in the cache {constants.HF_HUB_CACHE} (HF_HUB_CACHE), and {why}; "
            f"go online, or run `hf download {model}` on a machine that is and copy the folder"
        ) from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{looked}, and it is no hub id: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"resolve_model: downloading {at} failed: {error}; run again to resume"
        ) from error
    return Path(path)
