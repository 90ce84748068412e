"""The language-specific subspaces of a study's dense model as a file, for recipes of other studies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probes import DENSE
from pruning import Subspaces
from pruning.errors import StudyError, first_line
from pruning.files import is_file
from pruning.subspaces import SUBSPACES_FILE

from .read import fitted_subspaces, fitting_file
from .records import PROVENANCE
from .study_file import load_study


def write_subspaces(
    folder: Path, out: Path | None = None, rank: int | None = None, random: int | None = None
) -> Subspaces:
    """Write the subspaces of a study that has read its fitting text, as it lies in its folder.

    Parameters
    ----------
    folder
        Folder of the study.
    out
        The file; ``subspaces.safetensors`` in the folder by default.
    rank
        Of the subspaces; as in the study by default.
    random
        Seed of random subspaces of the same rank, which are written instead.

    Raises
    ------
    StudyError
        If the study has not read its fitting text yet, or the rank is not less than the number of its languages.
    DiskError
        If the file cannot be written.
    """
    study = load_study(folder / "study.toml")
    rank = study.evaluation.rank if rank is None else rank
    if rank is not None and rank > len(study.languages) - 1:
        raise StudyError(
            f"--rank {rank} must be less than the number of languages, {len(study.languages)} ("
            f"{', '.join(study.languages)})"
        )
    lacking = [language for language in study.languages if not is_file(fitting_file(folder, language))]
    if lacking or not is_file(folder / PROVENANCE):
        raise StudyError(
            f"{folder} has not read its fitting text{f' in {lacking[0]}' if lacking else ''} yet; finish the study: "
            f"prunescope run {folder / 'study.toml'} --out {folder}"
        )
    try:
        fingerprint = str(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["model"]["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{folder / PROVENANCE} is damaged ({first_line(error)}); run the study again") from error
    bases = [torch.from_numpy(one.basis_) for one in fitted_subspaces(folder, study.languages, rank)]
    number = study.evaluation.fit_segments
    said = f"means of {number} parallel segments per language ({DENSE} model of {study.model_name})"
    if random is not None:
        bases = _random(bases, random)
        said = f"nothing: random subspaces (seed {random}), of the rank of those of {said}"
    return Subspaces.save(
        out or folder / SUBSPACES_FILE,
        bases,
        model_fingerprint=fingerprint,
        languages=study.languages,
        fitted_on=said,
    )


def _random(bases: list[Tensor], seed: int) -> list[Tensor]:
    """Return random orthonormal bases of the same shapes."""
    draws = np.random.default_rng(seed)
    return [torch.from_numpy(np.linalg.qr(draws.standard_normal(basis.shape))[0]) for basis in bases]
