"""Text from datasets on a hub: streamed once, then kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pydantic import BaseModel, ConfigDict

from ..errors import DiskError, TextError, first_line, shortened
from ..files import cache_folder, content_sha256, is_folder, only_one_makes
from .languages import alpha3_script, named
from .segments import Segment, read_jsonl, whole_characters, write_jsonl

#: Documents read from a streamed dataset, a language and part.
STREAM_LIMIT = 20_000


class HubDataset(BaseModel):
    """A dataset of the ``datasets`` library and where in it a language's text is.

    ``{lang}`` in `config`, `split` and `data_files` stands for the BCP-47 tag, ``{code}`` for the dataset's own
    code: an entry of `codes`, else the three-letter code with the script (``eng_Latn``). `revision` is a branch, a tag
    or a commit of the dataset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    config: str | None = None
    split: str = "train"
    text: str = "text"
    id: str | None = None
    data_files: str | None = None
    revision: str | None = None
    codes: dict[str, str] = {}

    def segments(self, language: str) -> Iterator[Segment]:
        """Stream the segments of one language.

        Raises
        ------
        TextError
            If the ``datasets`` library is missing, or the dataset, its language or its columns are.
        """
        try:
            import datasets
        except ImportError as error:
            raise TextError("hub text needs the datasets library: pip install 'prunescope[hub]'") from error
        code = self.codes.get(language, alpha3_script(language))

        def filled(pattern: str | None) -> str | None:
            return pattern and pattern.replace("{lang}", language).replace("{code}", code)

        where = f'dataset "{shortened(self.dataset)}"'
        where += f', config "{shortened(filled(self.config))}"' if self.config else ""
        try:
            rows = datasets.load_dataset(
                self.dataset,
                filled(self.config),
                data_files=filled(self.data_files),
                split=filled(self.split),
                revision=self.revision,
                streaming=True,
                trust_remote_code=False,
            )
            seen: set[str] = set()
            for number, row in enumerate(rows):
                missing = {self.text, self.id or self.text} - row.keys()
                if missing:
                    raise TextError(f"{where} has no column {sorted(missing)}; its columns: {sorted(row)}")
                id = str(row[self.id]) if self.id else str(number)
                text = row[self.text] or ""
                if not isinstance(text, str):
                    raise TextError(f'{where}: column "{shortened(self.text)}" is not text but {type(text).__name__}')
                text = whole_characters(text.strip(), f"{where}, row {number + 1}")
                if text and id not in seen:  # Belebele repeats a passage for each of its questions
                    seen.add(id)
                    yield Segment(id, text)
        except TextError:
            raise
        except Exception as error:  # of the network, of the format, or of the library: it has no one kind of its own
            if "trust_remote_code" in str(error) or "scripts are no longer supported" in str(error):
                raise TextError(
                    f"{where} needs code of its own to be read, which prunescope never runs; "
                    "choose a dataset of plain files, or save its text and use text = 'file:FOLDER/{lang}.jsonl'"
                ) from error
            raise TextError(
                f"no text for {named(language)}: {where} cannot be read ({first_line(error)}); "
                "check the name, the network, or use text = 'file:FOLDER/{lang}.jsonl'"
            ) from error

    def drawn(self, language: str, count: int) -> list[Segment]:
        """Return the first `count` segments of one language, streamed once and kept in the user's cache folder.

        What is kept is never asked for again; to have text that was changed on the hub, give its `revision`. Text of a
        dataset in a folder is not kept, since it is there already.

        Raises
        ------
        TextError
            As :meth:`segments`.
        """
        if is_folder(self.dataset):
            return list(islice(self.segments(language), count))
        key = content_sha256([self.model_dump(), language, count])
        path = cache_folder() / "text" / f"{key[:32]}.jsonl"
        try:
            with only_one_makes(path):
                if not path.is_file():
                    segments = list(islice(self.segments(language), count))
                    write_jsonl(path, segments)
                return list(read_jsonl(path))
        except DiskError:  # a cache that cannot be written costs time, and no study
            return list(islice(self.segments(language), count))


# Member languages that the parallel datasets hold where BCP-47 users write the macrolanguage.
_MEMBERS = {
    "ar": "arb_Arab",
    "fa": "pes_Arab",
    "lv": "lvs_Latn",
    "ms": "zsm_Latn",
    "ne": "npi_Deva",
    "sw": "swh_Latn",
}
HUB_PRESETS: dict[str, HubDataset] = {
    "mc4": HubDataset(dataset="allenai/c4", data_files="multilingual/c4-{lang}.*.json.gz", id="url"),
    "flores": HubDataset(
        dataset="openlanguagedata/flores_plus",
        config="{code}",
        split="dev",
        id="id",
        codes={**_MEMBERS, "zh": "cmn_Hans"},
    ),
    "belebele": HubDataset(
        dataset="facebook/belebele",
        config="{code}",
        split="test",
        text="flores_passage",
        id="link",
        codes={**_MEMBERS, "zh": "zho_Hans"},
    ),
}
