"""Checkpoints that others published: the table ``[imported]``, in which a template stands for a whole collection."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, StrictFloat, StrictInt, StrictStr, Tag, model_validator

from probes import DENSE
from pruning import known_methods
from pruning.errors import LanguageError, ModelError, RecipeError, StudyError, did_you_mean, shortened
from pruning.files import is_folder
from pruning.methods import method_named
from pruning.models.loading import check_model_name
from pruning.patterns import n_of_m, pattern_named
from pruning.text.languages import language_tag
from pruning.variants.stated import Stated
from pruning.variants.store import UNKNOWN

from .sections import Section

_Scalar = StrictStr | StrictInt | StrictFloat
#: One value, several, or a table from what the name says to what it means.
_Values = _Scalar | tuple[_Scalar, ...] | dict[str, _Scalar]
_FIELD = re.compile(r"\{(\w+)\}")
_METHOD = re.compile(r"\w[\w.+=() -]*")
#: How names of checkpoints write a pattern n:m, and that single weights were removed.
_STRICT = re.compile(r"(\d+)(?:to|of|-|_|:)(\d+)")
_LOOSE = "unstructured"
_NOTHING = Stated()
#: Set of all languages of a study.
_ALL = "all"


class Published(Section):
    """A collection of checkpoints whose names say what they are.

    Further keys are the fields of the template, each with a value, a list of values, or a table from what names say to
    what it means. Five of them become columns: ``method``, ``sparsity``, ``pattern``, ``calibration`` and ``seed``; a
    column that is no field of the template has one value for all.

    Attributes
    ----------
    template
        Hub ids, such as ``"owner/pruned-{method}-{calibration}-{seed}"``, or folders, with fields in braces.
    revision
        Branch, tag or commit of all these Hub models; their main branches by default.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, _Values] = Field(init=False)

    template: str
    revision: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Published:
        fields, given = self.fields, self.values
        if not fields or set("{}") & set(_FIELD.sub("", self.template)):
            raise ValueError(
                f'template "{shortened(self.template, 100)}" needs fields in braces, such as '
                '"owner/pruned-{method}-{calibration}-{seed}"'
            )
        for name in fields:
            if name in type(self).model_fields:
                raise ValueError(f"the template cannot have a field {{{name}}}; call it otherwise")
            if name not in given:
                raise ValueError(f'the template has a field {{{shortened(name)}}} without values; write {name} = ["…"]')
        if "method" not in given:
            raise ValueError('say what made these checkpoints, as a field of the template or method = "wanda"')
        for name, values in given.items():
            if name not in fields and name not in Stated.model_fields:
                known = did_you_mean(name, [*fields, *Stated.model_fields, *type(self).model_fields])
                raise ValueError(f'"{shortened(name)}" is no field of the template; {known}')
            if not values:
                raise ValueError(f"{name} is empty; add a value")
            if name not in fields and len(values) > 1:
                raise ValueError(f"{name} has {len(values)} values, but the template has no field {{{name}}}")
        if self.revision is not None and self.is_local(Path()):
            raise ValueError("revision is for Hub models, and this template is of folders; leave it out")
        try:
            for _ in self.checkpoints("x"):  # every value means something
                pass
        except ModelError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the template, in order."""
        return tuple(dict.fromkeys(_FIELD.findall(self.template)))

    @property
    def values(self) -> dict[str, dict[str, str | int | float]]:
        """For each field and column, what names say to what it means."""
        found: dict[str, dict[str, str | int | float]] = {}
        for name, values in (self.__pydantic_extra__ or {}).items():
            if not isinstance(values, dict):
                several = values if isinstance(values, tuple) else (values,)
                values = {str(value): value for value in several}
            found[name] = values
        return found

    def is_local(self, folder: Path) -> bool:
        """Whether the template is of folders, seen from `folder`: the part before its first field is one, or no Hub id.

        Hub ids have one slash, after the owner.
        """
        parent = self.template.split("{")[0].rpartition("/")[0]
        no_id = self.template.startswith((".", "/", "~")) or self.template.count("/") != 1
        return no_id or (bool(parent) and is_folder(folder / parent))

    def anchored(self, folder: Path) -> Published:
        """Return it with a relative template of folders resolved against `folder`."""
        if not self.is_local(folder):
            return self
        template = os.path.normpath(folder / Path(self.template).expanduser())
        return self.model_copy(update={"template": template})

    def checkpoints(self, key: str) -> Iterator[tuple[str, Checkpoint]]:
        """Yield name and checkpoint of every combination of values, whether it exists or not.

        Parameters
        ----------
        key
            Name of the table, with which the checkpoints' names begin.
        """
        fields, given = self.fields, self.values
        constants = {name: value for name, of in given.items() if name not in fields for value in of.values()}
        local = self.is_local(Path())
        several = [name for name in fields if name not in Stated.model_fields and len(given[name]) > 1]
        for words in product(*(given[name] for name in fields)):
            said = dict(zip(fields, words, strict=True))
            meant = constants | {name: given[name][word] for name, word in said.items()}
            source = _FIELD.sub(lambda field, said=said: said[field[1]], self.template)  # type: ignore[misc]
            check_model_name(source)
            stated = _stated(meant, ",".join(f"{name}={meant[name]}" for name in several))
            yield (
                re.sub(r"[^\w.+=-]+", "_", "-".join([key, *words])),
                Checkpoint(source, None if local else self.revision, stated, key, local),
            )


@dataclass(frozen=True)
class Checkpoint:
    """A model made elsewhere.

    Attributes
    ----------
    source
        Hub id or folder.
    revision
        Branch, tag or commit; the main branch by default.
    stated
        What is known of it from its name.
    collection
        The table of ``[imported]`` that it is of; empty if it was named on its own, and must therefore be there.
    local
        Of a collection: whether it is a folder.
    """

    source: str
    revision: str | None = None
    stated: Stated = _NOTHING
    collection: str = ""
    local: bool = False


def _kind_of(value: object) -> str:
    return "table" if isinstance(value, Mapping | Published) else "line"


#: A value of the table ``[imported]``: a checkpoint, or a collection of them.
Imported = Annotated[
    Annotated[str, Tag("line")] | Annotated[Published, Tag("table")],
    Discriminator(_kind_of),
]


def all_checkpoints(imported: Mapping[str, str | Published]) -> dict[str, Checkpoint]:
    """Return every checkpoint of the table ``[imported]`` by its name, whether it exists or not.

    Raises
    ------
    StudyError, ModelError
        If two have the same name, or a source is no possible name of a model.
    """
    found: dict[str, Checkpoint] = {}
    for key, value in imported.items():
        if isinstance(value, Published):
            own = list(value.checkpoints(key))
        else:
            check_model_name(value)
            own = [(key, Checkpoint(value))]
        for name, checkpoint in own:
            if name in found:
                raise StudyError(f'two checkpoints would be called "{shortened(name)}"; rename "{key}"')
            found[name] = checkpoint
    return found


def _stated(meant: Mapping[str, Any], more: str) -> Stated:
    """Return the columns of a checkpoint; `more` tells apart those that no column tells apart.

    Raises
    ------
    ValueError
        If a value cannot be one of its column.
    """
    method = str(meant["method"])
    if not _METHOD.fullmatch(method) or method == DENSE:
        raise ValueError(
            f'method "{shortened(method)}" is not the name of a method; {_meaning("method", method, "wanda")}'
        )
    return Stated(
        method=f"{method}({more})" if more else method,
        sparsity=_sparsity(meant["sparsity"]) if "sparsity" in meant else None,
        pattern=_pattern(str(meant["pattern"]), method) if "pattern" in meant else None,
        calibration=_calibration(str(meant["calibration"])) if "calibration" in meant else None,
        seed=_seed(meant["seed"]) if "seed" in meant else None,
    )


def _meaning(column: str, word: object, value: str) -> str:
    shown = value if column in ("sparsity", "seed") else f'"{value}"'
    return f'write what it means, such as {column} = {{ "{shortened(word)}" = {shown} }}'


def _sparsity(value: str | int | float) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f'sparsity "{shortened(value)}" is not a share below 1; {_meaning("sparsity", value, "0.5")}')
    return share


def _seed(value: str | int | float) -> int:
    try:
        return int(str(value))
    except ValueError as error:
        raise ValueError(f'seed "{shortened(value)}" is not a number; {_meaning("seed", value, "0")}') from error


def _pattern(word: str, method: str) -> str | None:
    """Return a pattern as frames call it; ``None`` if that single weights were removed is all that is known."""
    strict = _STRICT.fullmatch(word)
    if word == _LOOSE:
        native = method_named(method).pattern if method in known_methods() else UNKNOWN
        return None if native == UNKNOWN else native
    try:
        if strict:
            word = f"{strict[1]}:{strict[2]}"
            n_of_m(word)
            return word
        return pattern_named(word).name
    except RecipeError as error:
        raise ValueError(f"{error}; {_meaning('pattern', word, '2:4')}") from error


def _calibration(word: str) -> str:
    """Return the name of a calibration set as frames write it: ``en``, ``en+sw`` or ``all``."""
    if word == _ALL:
        return word
    try:
        return "+".join(language_tag(tag) for tag in word.split("+"))
    except LanguageError as error:
        raise ValueError(f"calibration: {error}; or {_meaning('calibration', word, 'en+sw')}") from error
