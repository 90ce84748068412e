"""How the results of a study came about, in one file."""

from __future__ import annotations

import platform

import torch

from pruning.files import write_json
from pruning.models.arithmetic import multiplies_with_onednn

from .context import Context
from .figures import versions
from .records import PROVENANCE


def write_provenance(context: Context, seconds: float, *, only_variants: bool = False) -> None:
    """Write ``provenance.json``: versions, machine, fingerprints, seeds, and every result that is on record.

    Parameters
    ----------
    context
        Of the study.
    seconds
        That this run took.
    only_variants
        Whether nothing was read.
    """
    facts, texts = context.model.facts, context.texts
    text = {"calibration": texts.calibration_fingerprints}
    if not only_variants:
        text |= {"heldout": texts.heldout_fingerprints, "parallel": texts.fitting_fingerprints}
    sets = [job.calibration for job in context.variants.jobs.values() if job.calibration]
    results = {
        name: {
            "key": record.key,
            "seconds": record.seconds,
            "files": {path: file.sha256 for path, file in record.files.items()},
        }
        for name, record in context.records.everything().items()
    }
    content = {
        "last_run_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": facts.device,
            "dtype": facts.dtype,
            "reading_uses_onednn": multiplies_with_onednn(torch.device(facts.device)),
        },
        "model": {"name": context.study.model, "fingerprint": facts.fingerprint},
        "text": text,
        "skip_first": context.study.evaluation.skip_first,
        "seeds": sorted({calibration.seed for calibration in sets}),
        "set_aside": context.variants.set_aside,
        "results": results,
    }
    write_json(context.folder / PROVENANCE, content)
