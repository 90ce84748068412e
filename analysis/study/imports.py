"""The models made elsewhere that a study can really import: which are there, and what each depends on."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from pruning.errors import StudyError, shortened
from pruning.files import content_sha256, is_file, is_folder
from pruning.models.checkpoint import CONFIG, weights_kind
from pruning.models.download import downloaded, hub_files
from pruning.models.loading import checkpoint_folder
from pruning.variants.store import RECIPE_FILE

from .configuration import StudyConfig
from .published import Checkpoint, Published

#: Why a checkpoint of a collection is left out: reason to what is said of all of them.
_MISSING, _PICKLED, _EMPTY = "there is none", "it has pickled weights only, which are never read", "it has no weights"
_SAID = {
    _MISSING: "not there",
    _PICKLED: "with pickled weights only, which are never read (convert them to safetensors)",
    _EMPTY: "without weights",
}


class StudyImports:
    """Models made elsewhere that are there, of those that a study names.

    Parameters
    ----------
    study
        The study.
    tell
        Called with what is left out, a line for each reason and collection.
    weights
        Whether weights are downloaded when it is asked what files there are; to plan for them, none are needed.
    """

    def __init__(self, study: StudyConfig, tell: Callable[[str], None], *, weights: bool = True) -> None:
        self._study = study
        self._tell = tell
        self._weights = weights

    @property
    def found(self) -> dict[str, tuple[Checkpoint, str]]:
        """The checkpoints that are there, by name, each with what identifies its files: a folder, or a commit.

        Raises
        ------
        StudyError
            If a collection has no checkpoint at all.
        """
        return self._sorted[0]

    @property
    def left_out(self) -> dict[str, str]:
        """The checkpoints of collections that are not there, or cannot be read, with the reason."""
        return self._sorted[1]

    @cached_property
    def _sorted(self) -> tuple[dict[str, tuple[Checkpoint, str]], dict[str, str]]:
        every = self._study.checkpoints()
        found = {name: (own, "") for name, own in every.items() if not own.collection}
        left_out: dict[str, str] = {}
        for key in dict.fromkeys(own.collection for own in every.values() if own.collection):
            of = {name: own for name, own in every.items() if own.collection == key}
            states = {name: _state(own) for name, own in of.items()}
            found |= {name: (of[name], place) for name, (place, reason) in states.items() if not reason}
            reasons = {name: reason for name, (_, reason) in states.items() if reason}
            if len(reasons) == len(of):
                raise StudyError(self._nothing(key, of, reasons))
            for kind, words in _SAID.items():
                names = [name for name, reason in reasons.items() if reason == kind]
                if names:
                    total = f"{len(names)} of {len(of)} checkpoint{'s' * (len(of) > 1)}"
                    self._tell(f"imported.{key}: left out {total} {words}: {', '.join(names)}")
            left_out |= {name: f"{reason} ({of[name].source})" for name, reason in reasons.items()}
        return {name: found[name] for name in every if name in found}, left_out

    def folder(self, name: str) -> Path:
        """Return the folder of a checkpoint, downloading it if necessary."""
        checkpoint, place = self.found[name]
        if self.made_here(name):
            return Path(checkpoint.source)
        if not checkpoint.collection:
            return checkpoint_folder(checkpoint.source, weights=self._weights)
        return Path(checkpoint.source) if checkpoint.local else downloaded(checkpoint.source, place)

    def made_here(self, name: str) -> bool:
        """Whether it is a variant as prunescope keeps it, not a checkpoint."""
        checkpoint, _ = self.found[name]
        folder = Path(checkpoint.source)
        return not checkpoint.collection and is_file(folder / RECIPE_FILE) and not is_file(folder / CONFIG)

    def files(self, name: str) -> str:
        """Return a hash of what identifies the files of a checkpoint."""
        checkpoint, place = self.found[name]
        if checkpoint.collection and not checkpoint.local:  # a commit, so nothing need be downloaded to know
            return content_sha256([checkpoint.source, place, checkpoint.stated.model_dump()])
        folder = self.folder(name)
        found = [*folder.glob("*.safetensors"), *folder.glob(RECIPE_FILE)]
        state = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)
        return content_sha256([checkpoint.source, state, checkpoint.stated.model_dump()])

    def _nothing(self, key: str, of: dict[str, Checkpoint], reasons: dict[str, str]) -> str:
        """Return the message for a collection of which nothing can be imported."""
        first = next(iter(of))
        table = self._study.imported[key]
        assert isinstance(table, Published)
        source = of[first].source
        if set(reasons.values()) != {_MISSING}:
            return f'imported.{key}: no checkpoint can be imported; "{source}": {reasons[first]}'
        if of[first].local:
            where, hint = "folder", _beside(Path(source))
        else:
            where = f'Hub model (revision "{table.revision or "main"}")'
            hint = "set HF_TOKEN if they are private; with HF_HUB_OFFLINE only what is in the cache counts"
        return (
            f"imported.{key}: the template fits nothing: none of its {len(of)} combinations is a {where}, the first "
            f'being "{source}"; write template and values as they are in the names, such as method = ["wanda"], '
            f'calibration = ["en", "sw"]; {hint}'
        )


def _beside(folder: Path) -> str:
    """Return what folders there are beside one that is not."""
    parent = folder.parent
    if not is_folder(parent):
        return f"there is no folder {shortened(parent, 200)}"
    close = get_close_matches(folder.name, sorted(path.name for path in parent.iterdir() if path.is_dir()), 3, 0.0)
    return f"{shortened(parent, 200)} has {', '.join(close) or 'no folders'}"


def _state(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return what identifies the files of a collection's checkpoint, and why it is left out; empty if it is not."""
    if checkpoint.local:
        place, folder = checkpoint.source, Path(checkpoint.source)
        names = frozenset(path.name for path in folder.iterdir()) if is_folder(folder) else None
    else:
        files = hub_files(checkpoint.source, checkpoint.revision)
        place, names = (files.commit, files.names) if files else ("", None)
    if names is None:
        return place, _MISSING
    kind = weights_kind(names)
    return place, "" if kind == "safetensors" else _PICKLED if kind == "pickled" else _EMPTY
