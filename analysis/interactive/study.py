"""A study in its folder, as Python has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from probes import DENSE, Readings, StoredReadings
from pruning import Remedy, Variant, load_model
from pruning.errors import StudyError, shortened
from pruning.files import is_file, is_folder
from pruning.remedy import REMEDY_FILE
from pruning.runner import VARIANTS
from pruning.variants.store import RECIPE_FILE

from ..frames import VARIANT_COLUMNS, Frames, dense_columns, read_frame
from ..metrics import lape
from ..report import ReportFacts
from ..study.analyses import frame_names
from ..study.configuration import StudyConfig
from ..study.diagnose import FOLDER as DIAGNOSES
from ..study.diagnose import REQUEST_FILE
from ..study.diagnosis_request import DiagnosisRequest
from ..study.figures import facts_of
from ..study.frames import FOLDER as FRAMES_FOLDER
from ..study.records import PROVENANCE
from ..study.report import REPORT_FILE
from ..study.results import open_readings
from ..study.run import STUDY_FILE
from ..study.study_file import load_study
from .diagnoses import Diagnosed, Diagnoses
from .results import Results, dense_first


class Study(Results):
    """A study in its folder: opened, not run, and never changed.

    It is shown as it lies there, finished or not: ``prunescope run DIR/study.toml --out DIR`` brings it up to date.

    Parameters
    ----------
    folder
        Folder of the study.
    config
        Its study file.

    Attributes
    ----------
    folder, config
        As given.

    Examples
    --------
    ::

        study = Study.open("runs/demo")
        study.models
        study.variants(method="wanda", calibration="sw")
        study.frame("perplexity", language="sw", metric="perplexity")
        study.figure("signal", method="wanda")
    """

    def __init__(self, folder: Path, config: StudyConfig) -> None:
        self.folder = folder
        self.config = config
        self.title = f"study of {config.model_name} in {folder}"

    @classmethod
    def open(cls, folder: Path | str) -> Study:
        """Open the study in a folder.

        Raises
        ------
        StudyError
            If there is none, or its file is not valid.
        """
        folder = Path(folder)
        if not is_file(folder / STUDY_FILE):
            where = shortened(folder, 200)
            if not is_folder(folder):
                raise StudyError(f"there is no folder {where}; run a study first: prunescope run STUDY --out {where}")
            raise StudyError(f"there is no study in {where}; give a folder that prunescope run, prune or look wrote")
        return cls(folder, load_study(folder / STUDY_FILE))

    @property
    def languages(self) -> tuple[str, ...]:
        """The evaluation languages."""
        return self.config.languages

    @cached_property
    def frames(self) -> Frames:
        """Every frame, by name; each is read when it is first asked for."""
        return _StoredFrames(self.folder)

    @cached_property
    def facts(self) -> ReportFacts:
        """What the report says beside the frames."""
        dense = {language: self.readings[DENSE, language] for language in self.languages}
        imported = {}
        for name, checkpoint in self.config.checkpoints().items():
            if name in self._variants:
                found = self._variants[name].record.found
                imported[name] = f"{checkpoint.source} ({found})" if found else checkpoint.source
        return facts_of(self.config, dense, imported, self.set_aside)

    @cached_property
    def columns(self) -> Mapping[str, Mapping[str, Any]]:
        """The columns that describe each model in frames, by id; the dense model comes first."""
        known = self._known_columns()
        variants = {
            name: found if (found := _as_known(variant, known)) else variant.columns()
            for name, variant in self._variants.items()
        }
        return dense_first(dense_columns(self.config.model_name), variants)

    @property
    def readings(self) -> Mapping[tuple[str, str], Readings]:
        """``(model, language)`` to what was read, opened on access; the dense model is ``"dense"``."""
        return self._readings

    @cached_property
    def set_aside(self) -> dict[str, str]:
        """Variants that could not be made, with the reason."""
        path = self.folder / PROVENANCE
        return dict(json.loads(path.read_text(encoding="utf-8"))["set_aside"]) if is_file(path) else {}

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.folder / REPORT_FILE

    @property
    def diagnoses(self) -> Diagnoses:
        """The finished diagnoses."""
        return Diagnoses(self._diagnosed())

    def neurons(
        self,
        *,
        layers: Sequence[int] | None = None,
        languages: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return a part of the frame ``neurons``: firing probability and LAPE of single neurons.

        It is not in the folder: an 8B model in seven languages has 3.7 million rows of it.

        Parameters
        ----------
        layers, languages, models
            Blocks, languages, and ids of models; all by default.
        """
        return lape.neurons(self.readings, self.columns, layers=layers, languages=languages, models=models)

    def load_model(self, *, stream: bool = False) -> tuple[Any, Any]:
        """Load the dense model and its tokenizer, as the study does.

        Parameters
        ----------
        stream
            Leave the weights on disk, for models larger than memory.

        Raises
        ------
        ModelError
            As for :func:`pruning.load_model`.
        """
        return load_model(self.config.model, dtype=self.config.dtype, device=self.config.device, stream=stream)

    @cached_property
    def _variants(self) -> dict[str, Variant]:
        names = [*(job.id for job in self.config.jobs()), *self.config.checkpoints()]
        places = {name: self.folder / VARIANTS / name for name in names}
        return {name: Variant.open(place) for name, place in places.items() if is_file(place / RECIPE_FILE)}

    @cached_property
    def _readings(self) -> StoredReadings:
        return open_readings(self.folder)[0]

    def _known_columns(self) -> list[dict[str, Any]]:
        """Return the columns of the models in a finished frame, so that no masks need be counted."""
        if not is_file(self.folder / FRAMES_FOLDER / "perplexity.parquet"):
            return []
        models = self.frames["perplexity"][list(VARIANT_COLUMNS)].drop_duplicates()
        return [{str(column): value for column, value in row.items()} for row in models.to_dict("records")]

    def _diagnosed(self) -> Iterator[Diagnosed]:
        for path in sorted((self.folder / DIAGNOSES).glob(f"*/{REQUEST_FILE}")):
            frame, remedy = path.with_name("recovery.parquet"), path.with_name(REMEDY_FILE)
            if not frame.is_file():
                continue  # not finished yet
            try:
                request = DiagnosisRequest.model_validate_json(path.read_bytes())
            except ValueError as error:
                raise StudyError(f"{path} is damaged; delete the folder and diagnose again") from error
            yield Diagnosed(request, partial(read_frame, frame), partial(_opened, remedy))


class _StoredFrames(Mapping[str, pd.DataFrame]):
    """The frames in a study's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, pd.DataFrame] = {}

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in frame_names():
            raise KeyError(name)
        if name not in self._read:
            path = self._folder / FRAMES_FOLDER / f"{name}.parquet"
            if not path.is_file():
                raise StudyError(
                    f'{self._folder} has no frame "{name}" yet; finish the study: '
                    f"prunescope run {self._folder / STUDY_FILE} --out {self._folder}"
                )
            self._read[name] = read_frame(path)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(frame_names())

    def __len__(self) -> int:
        return len(frame_names())


def _as_known(variant: Variant, known: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the columns of a variant with a recipe, if exactly one model in a frame has them."""
    if variant.record.recipe is None:
        return None
    own = variant.record.columns(0.0, 0.0)
    fitting = [one for one in known if all(own[c] == one[c] for c in VARIANT_COLUMNS if c != "bits")]
    return fitting[0] if len(fitting) == 1 else None


def _opened(path: Path) -> Remedy | None:
    return Remedy.open(path) if path.is_file() else None
