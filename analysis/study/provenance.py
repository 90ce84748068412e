"""How the results of a study came about, in one file."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pruning.models.arithmetic import multiplies_with_onednn

from .context import Context
from .figures import versions


def provenance(
    context: Context, seconds: float, machines: Sequence[Mapping[str, Any]], *, only_variants: bool = False
) -> dict[str, Any]:
    """Return the content of ``provenance.json``: versions, machines, fingerprints, seeds, and every result on record.

    Parameters
    ----------
    context
        Of the study.
    seconds
        That this run took.
    machines
        The machines that units ran on, as :func:`machine` describes them; a cluster's have a node each.
    only_variants
        Whether nothing was read.
    """
    facts, texts = context.model.facts, context.texts
    text = {"calibration": texts.calibration_fingerprints}
    if not only_variants:
        text |= {"heldout": texts.heldout_fingerprints, "parallel": texts.fitting_fingerprints}
    if texts.calibration_item_fingerprints:
        text |= {"calibration_items": texts.calibration_item_fingerprints}
    sets = [job.calibration for job in context.variants.jobs.values() if job.calibration]
    results = {
        name: {
            "key": record.key,
            "seconds": record.seconds,
            "files": {path: file.sha256 for path, file in record.files.items()},
        }
        for name, record in context.records.everything().items()
    }
    return {
        "last_run_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(context),
        **({"workers": list(machines)} if len(machines) > 1 or any("node" in one for one in machines) else {}),
        "model": {"name": context.study.model, "fingerprint": facts.fingerprint},
        "text": text,
        "skip_first": context.study.evaluation.skip_first,
        "seeds": sorted({calibration.seed for calibration in sets}),
        "set_aside": context.variants.set_aside,
        "results": results,
    }


def machine(context: Context) -> dict[str, Any]:
    """Return what is known of the machine that a process runs on, as far as results depend on it."""
    facts = context.model.facts
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": facts.device,
        "dtype": facts.dtype,
        "reading_uses_onednn": multiplies_with_onednn(torch.device(facts.device)),
    }
