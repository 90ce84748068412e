"""Text from Hub datasets: streamed once, then cached."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pydantic import BaseModel, ConfigDict

from ..errors import DiskError, TextError, first_line, shortened
from ..files import cache_folder, content_sha256, is_folder, only_one_makes
from .languages import alpha3_script, named
from .segments import Segment, read_jsonl, whole_characters, write_jsonl

#: Documents read from a streamed dataset, per language and part.
STREAM_LIMIT = 20_000


class HubDataset(BaseModel):
    """A dataset loaded with the ``datasets`` library.

    In `config`, `split` and `data_files`, ``{lang}`` stands for the BCP-47 tag and ``{code}`` for the dataset's own
    language code: the entry in `codes`, or else the three-letter code with the script (``eng_Latn``). `revision` is a
    branch, tag or commit of the dataset.
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
            If the ``datasets`` library, the dataset, its language or a column is missing.
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
        except Exception as error:  # network, format or library: datasets has no common base class
            if "trust_remote_code" in str(error) or "scripts are no longer supported" in str(error):
                raise TextError(
                    f"{where} needs its own loading script, which prunescope never runs; "
                    "choose a dataset of plain files, or save its text and use text = 'file:FOLDER/{lang}.jsonl'"
                ) from error
            raise TextError(
                f"no text for {named(language)}: {where} cannot be read ({first_line(error)}); "
                "check the name, the network, or use text = 'file:FOLDER/{lang}.jsonl'"
            ) from error

    def drawn(self, language: str, count: int) -> list[Segment]:
        """Return the first `count` segments of one language, streamed once and cached.

        The cache never expires; to get text that has changed on the Hub, set `revision`. Datasets in a local folder
        are not cached.

        Raises
        ------
        TextError
            As for :meth:`segments`.
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
        except DiskError:  # without a cache the study only takes longer
            return list(islice(self.segments(language), count))


# Member languages in the parallel datasets for macrolanguage tags, and scripts that they call otherwise.
_MEMBERS = {
    "ar": "arb_Arab",
    "az": "azj_Latn",
    "fa": "pes_Arab",
    "ko": "kor_Hang",
    "lv": "lvs_Latn",
    "mg": "plt_Latn",
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
