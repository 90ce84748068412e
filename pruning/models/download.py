"""Checkpoints from a hub, as they are in its cache: configuration and tokenizer first, then the weights they name."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, first_line, shortened
from .checkpoint import INDEX, SINGLE, weight_map

#: Everything but weights; no code.
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]


def downloaded(repository: str, revision: str | None = None) -> Path:
    """Return the folder of a model of a hub, with those of its files that are read; they are downloaded if need be.

    The hub's client shows its progress, takes a token from the environment (``HF_TOKEN``), and asks no hub where
    ``HF_HUB_OFFLINE`` is set.

    Raises
    ------
    ModelError
        If there is no such model or revision, it cannot be had without a token, or the hub cannot be reached.
    """
    folder = _snapshot(repository, revision, _SETTINGS)
    index = folder / INDEX
    weights = sorted(set(weight_map(index).values())) if index.is_file() else [SINGLE]
    return _snapshot(repository, folder.name, weights)  # of the very same commit


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = f'model "{shortened(repository)}"'
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated; accept its terms on its page on the hub, and put your token into HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder and no public {name}; check the name, or put your token into HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f'{name} has no revision "{shortened(revision)}"') from error
    except Exception as error:
        raise ModelError(
            f'cannot load {name}: {first_line(error)} (give "demo", a hub id, or a folder with config.json, tokenizer '
            "and *.safetensors)"
        ) from error
