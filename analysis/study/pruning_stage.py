"""The first stage of a study: its pruned variants, and models that were pruned elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from pruning import Anatomy, Corpus, PruningRun, Variant, load_model
from pruning.engine.plan import Plan
from pruning.errors import RecipeError, VariantError
from pruning.files import content_sha256
from pruning.models.embedded import DEMO
from pruning.models.loading import checkpoint_bytes
from pruning.variants.store import RECIPE_FILE

from .configuration import Study
from .records import Ledger

#: A model is read from its shards if a memory cap is less than so many times its size on disk.
_ROOM = 6
#: Called with the work done: tokens through a block, times the weights of a block.
Advance = Callable[[float], None]


class Grid:
    """The variants of a study: those to be made, and models pruned elsewhere.

    Parameters
    ----------
    study, folder, ledger, corpus
        What to do, where, what is finished, and the text.
    anatomy, tokenizer
        Of the dense model.
    memory, device_memory
        Caps in bytes on resident memory and on that of the model's device while pruning.

    Raises
    ------
    RecipeError, TextError
        If a recipe does not fit the model, or there is too little text.
    """

    def __init__(
        self,
        study: Study,
        folder: Path,
        ledger: Ledger,
        corpus: Corpus,
        anatomy: Anatomy,
        tokenizer: Any,
        memory: int | None = None,
        device_memory: int | None = None,
    ) -> None:
        self.study = study
        self.folder = folder
        self.ledger = ledger
        self.corpus = corpus
        self.anatomy = anatomy
        self.jobs = {job.id: job for job in study.jobs()}
        self.fingerprint = anatomy.fingerprint()
        for path, remedy in study.remedies().items():
            if remedy.model_fingerprint != self.fingerprint:
                raise RecipeError(
                    f"{path} is a diagnosis of another model than {study.model_name}; diagnose a variant of this one"
                )
        self.run = PruningRun(
            anatomy,
            tokenizer,
            list(self.jobs.values()),
            corpus,
            folder,
            memory=memory,
            device_memory=device_memory,
            name=study.model_name,
        )
        self.keys = self.run.keys | {name: self._import_key(name) for name in study.imported}
        self._known = {name for name in self.names if self._finished(name)}  # an altered file shows at once

    @property
    def plan(self) -> Plan | None:
        """What it will take to make what is left."""
        return self.run.plan

    @property
    def names(self) -> list[str]:
        """Ids of all variants but those that cannot be made."""
        return [name for name in self.keys if name not in self.run.set_aside]

    def open(self, variant: str) -> Variant:
        """Open a finished variant."""
        return Variant.open(self.run.place(variant), self.fingerprint)

    @property
    def work(self) -> float:
        """Work that is left."""
        return self._block_weights * sum(wave.tokens for wave in self.run.waves)

    def make(self, stage: Callable[[str], None], advance: Advance) -> None:
        """Make all variants that are missing."""
        for name, source in self.study.imported.items():
            if name not in self._known:
                stage(f"taking over {name}")
                self._import(name, source)
        waves = self.run.waves
        for number, wave in enumerate(waves, start=1):
            stage(f"pruning {wave}" + (f" (wave {number} of {len(waves)})" if len(waves) > 1 else ""))
            began = time.monotonic()
            made = self.run.run(wave, lambda tokens: advance(tokens * self._block_weights))
            for name in made:
                self._note(name, (time.monotonic() - began) / len(made))
        self.run.close()
        for name in self.jobs:
            if name not in self._known | self.run.set_aside.keys():
                self._note(name, 0.0)  # made before, by a run that was killed before it could say so

    def _import(self, name: str, source: str) -> None:
        began = time.monotonic()
        stream = self.anatomy.streamed
        pruned, _ = load_model(source, dtype=self.study.dtype, device=self.study.device, stream=stream)
        try:
            variant = Variant.between(self.anatomy.model, pruned, name)
        except VariantError as error:
            raise VariantError(f"{source}: {error}") from error
        variant = replace(variant, record=variant.record.model_copy(update={"model": self.study.model_name}))
        self._check_unlike_others(variant)
        variant.save(self.run.place(name))
        self._note(name, time.monotonic() - began)

    def _check_unlike_others(self, variant: Variant) -> None:
        """Raise ``VariantError`` if frames could not tell a variant that is taken over from another one."""
        columns = variant.columns()
        for job in self.jobs.values():
            if self.run.record(job).columns(0.0) == columns:
                raise VariantError(
                    f'imported "{variant.id}" says that it is "{job.id}", which this study makes itself; '
                    f"leave one of them out, or remove the {RECIPE_FILE} beside that checkpoint"
                )
        for name in self.study.imported:
            if name != variant.id and name in self._known and self.open(name).columns() == columns:
                raise VariantError(
                    f'imported "{variant.id}" and "{name}" say that they are the same variant; '
                    f"leave one of them out, or remove the {RECIPE_FILE} beside its checkpoint"
                )

    def _note(self, name: str, seconds: float) -> None:
        self.ledger.finish(f"variant {name}", self.keys[name], sorted(self.run.place(name).iterdir()), seconds)
        self._known.add(name)

    def _finished(self, name: str) -> bool:
        return self.ledger.finished(f"variant {name}", self.keys[name])

    def _import_key(self, name: str) -> str:
        source = Path(self.study.imported[name])
        found = [*source.glob("*.safetensors"), *source.glob(RECIPE_FILE)]
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found)
        common = {
            "prunescope": version("prunescope"),
            "model": self.fingerprint,
            "dtype": str(self.anatomy.model.dtype),
        }
        return content_sha256({**common, "imported": str(source), "files": files})

    @property
    def _block_weights(self) -> float:
        return float(sum(outputs * inputs for outputs, inputs in map(self._shape_in_first, self.anatomy.roles(0))))

    def _shape_in_first(self, role: str) -> tuple[int, int]:
        return self.anatomy.shape(0, role)


def load_for_pruning(study: Study, memory: int | None, console: Console) -> tuple[Any, Any]:
    """Load a study's model, its weights left on disk if a memory cap may not leave room for them."""
    stream = False
    if memory is not None and not any(job.recipe.scoring.differentiates for job in study.jobs()):
        size = checkpoint_bytes(study.model)
        stream = size is None or _ROOM * size > memory
    tell_loading(study, console, ", its weights a block at a time" if stream else "")
    return load_model(study.model, dtype=study.dtype, device=study.device, stream=stream)


def tell_loading(study: Study, console: Console, note: str = "") -> None:
    """Say that the model is loaded."""
    note += " (converted on first use, about a minute)" if study.model == DEMO else ""
    console.print(f"loading the model {study.model_name}{note}", highlight=False, markup=False, soft_wrap=True)
