"""Checkpoints from the Hub: configuration and tokenizer are downloaded first, then the shards of the index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, first_line, shortened
from .checkpoint import CONFIG, INDEX, SINGLE, weight_map
from .naming import instead_of

#: Everything but weights; no code.
_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]


def settings_downloaded(repository: str, revision: str | None = None) -> Path:
    """Return the local folder of a Hub model's configuration and tokenizer, without its weights unless they are there.

    Raises
    ------
    ModelError
        As for :func:`downloaded`.
    """
    return _snapshot(repository, revision, _SETTINGS)


def downloaded(repository: str, revision: str | None = None) -> Path:
    """Return the local folder of a Hub model, downloading the required files if necessary.

    The Hub client shows a progress bar, reads the token from ``HF_TOKEN``, and stays offline if ``HF_HUB_OFFLINE`` is
    set.

    Raises
    ------
    ModelError
        If the model or revision does not exist, needs a token, or the Hub cannot be reached.
    """
    folder = _snapshot(repository, revision, _SETTINGS)
    index = folder / INDEX
    weights = sorted(set(weight_map(index).values())) if index.is_file() else [SINGLE]
    return _snapshot(repository, folder.name, weights)  # from the same commit


@dataclass(frozen=True)
class HubFiles:
    """What a Hub model has: the commit of a revision, and the names of its files."""

    commit: str
    names: frozenset[str]


def hub_files(repository: str, revision: str | None = None) -> HubFiles | None:
    """Return the files that a Hub model has, without downloading any; ``None`` if there is no such model or revision.

    With ``HF_HUB_OFFLINE``, or where the Hub cannot be reached, it is the cache that counts.

    Raises
    ------
    ModelError
        If the Hub cannot be reached and the model is not in the cache, or `repository` is not a valid id.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = model_info(repository, revision=revision)
        return HubFiles(str(found.sha), frozenset(file.rfilename for file in found.siblings or ()))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except OfflineModeIsEnabled:
        return _cached(repository, revision)
    except Exception as error:
        cached = _cached(repository, revision)
        if cached is None:
            raise ModelError(
                f'cannot tell whether there is a model "{shortened(repository, 100)}": {first_line(error)}; check the '
                "network, or set HF_HUB_OFFLINE=1 to import only what is in the cache"
            ) from error
        return cached


def _cached(repository: str, revision: str | None) -> HubFiles | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[CONFIG], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return HubFiles(folder.name, frozenset(path.name for path in folder.iterdir()))


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f'model "{shortened(repository)}"'
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated; accept its terms on its Hub page, and set HF_TOKEN to your token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder and no public {name}; check the name, or set HF_TOKEN to your token if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f'{name} has no revision "{shortened(revision)}"') from error
    except LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, OfflineModeIsEnabled)
        asked = "was not asked (HF_HUB_OFFLINE is set)" if offline else "cannot be reached to ask for one"
        tried = f"the Hub's cache has no whole copy of such a model, and the Hub {asked}"
        raise _nowhere(repository, revision, tried) from error
    except HFValidationError as error:
        raise _nowhere(repository, revision, "it cannot be a Hub id, which is OWNER/NAME") from error
    except Exception as error:
        raise ModelError(f"cannot load {name}: {first_line(error)}; {instead_of(repository)}") from error


def _nowhere(repository: str, revision: str | None, tried: str) -> ModelError:
    """Return the error for a name under which there is nothing, with what was tried besides a folder."""
    of = f' (revision "{shortened(revision)}")' if revision else ""
    return ModelError(
        f'cannot load model "{shortened(repository)}"{of}: there is no folder of this name here, and {tried}; '
        f"{instead_of(repository)}"
    )
