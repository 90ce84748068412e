from __future__ import annotations

import json
import re
from itertools import islice

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from pruning import Corpus, text_source
from pruning.errors import TextError
from pruning.text.sources import BUNDLED_LANGUAGES, HUB_PRESETS, BundledText, FileText, HubDataset, fingerprint

PARTS = ("calibration", "parallel", "heldout")


def write_jsonl(path, texts, start=0):
    lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts, start)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def one_source(tmp_path):
    for lang in ("en", "sw"):
        write_jsonl(tmp_path / f"{lang}.jsonl", [f"{lang} sentence number {i}" for i in range(200)])
    source = text_source(f"file:{tmp_path}/{{lang}}.jsonl")
    return Corpus(source, source, source)


def test_bundled_corpus_is_aligned_in_eight_languages():
    by_language = {lang: list(BundledText().segments(lang)) for lang in BUNDLED_LANGUAGES}
    ids = [[s.id for s in segments] for segments in by_language.values()]
    assert len(ids) == 8
    assert all(one == ids[0] for one in ids)
    assert len(ids[0]) == 640
    for lang, segments in by_language.items():
        assert len({s.text for s in segments}) == 640, lang
        assert not [s.id for s in segments if s.text != s.text.strip() or "  " in s.text], lang


@pytest.mark.parametrize(("lang", "script"), [("ar", "[؀-ۿ]"), ("ru", "[Ѐ-ӿ]"), ("zh", "[一-鿿]")])
def test_bundled_corpus_is_written_in_its_script(lang, script):
    for segment in BundledText().segments(lang):
        assert re.search(script, segment.text)
        assert len(re.findall("[A-Za-z]", segment.text)) <= 6, segment


def test_bundled_parts_never_overlap():
    source = BundledText()
    corpus = Corpus(source, source, source)
    for lang in BUNDLED_LANGUAGES:
        texts = [{s.text for s in corpus.segments(part, lang)} for part in PARTS]
        assert [len(t) for t in texts] == [320, 160, 160]
        assert len(set.union(*texts)) == 640


def test_one_source_for_all_parts_is_dealt_out_by_id(one_source):
    for part in PARTS:
        assert {s.id for s in one_source.segments(part, "en")} == {s.id for s in one_source.segments(part, "sw")}
    ids = [{s.id for s in one_source.segments(part, "en")} for part in PARTS]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 200


def test_text_that_two_sources_share_is_taken_out_of_calibration(tmp_path):
    write_jsonl(tmp_path / "a.en.jsonl", ["Only here.", "In  BOTH places."])
    write_jsonl(tmp_path / "b.en.jsonl", ["in both places.", "Elsewhere."])
    a, b = FileText(path=f"{tmp_path}/a.{{lang}}.jsonl"), FileText(path=f"{tmp_path}/b.{{lang}}.jsonl")
    corpus = Corpus(a, BundledText(), b)
    assert [s.text for s in corpus.segments("calibration", "en")] == ["Only here."]
    assert len(corpus.segments("heldout", "en")) == 2


def test_held_out_text_inside_of_longer_text_is_found_but_not_what_may_be_chance(tmp_path):
    held = ["The ferry left before the storm.", "Nobody knew.", "Read nowhere else at all."]
    drawn = ["First.", "We were late:  the ferry LEFT before the storm. So we stayed.", "Well, nobody knew."]
    write_jsonl(tmp_path / "held.en.jsonl", held, start=100)
    write_jsonl(tmp_path / "drawn.en.jsonl", drawn)
    both = [FileText(path=f"{tmp_path}/{name}.{{lang}}.jsonl") for name in ("drawn", "held")]
    corpus = Corpus(both[0], BundledText(), both[1])
    with pytest.raises(
        TextError, match=r'in English.*: calibration segment "1" holds held-out segment "100"; leave such'
    ):
        corpus.check_apart("en", 3)
    places = [s.id for s in corpus.segments("calibration", "en")]
    corpus.check_apart("en", places.index("1"))  # so far nothing is trained on that holds it


def test_held_out_segments_in_another_source_are_found_but_not_in_the_same(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.en.jsonl", ["In  BOTH places.", f"Only in {name}.", "And this."])
    a, b = (FileText(path=f"{tmp_path}/{name}.{{lang}}.jsonl") for name in ("a", "b"))
    with pytest.raises(TextError, match=r'"0" holds held-out segment "0" \(1 more\)'):
        Corpus(a, BundledText(), b).check_apart("en", 0)
    write_jsonl(tmp_path / "a.en.jsonl", [f"Segment {number // 2}." for number in range(60)])  # each of them twice
    Corpus(a, a, a).check_apart("en", 60)


def test_plain_text_and_parquet_read_like_json_lines(tmp_path):
    (tmp_path / "en.txt").write_text("First.\n\n Second. \n", encoding="utf-8")
    pd.DataFrame({"id": [7, 8], "text": ["First.", "Second."]}).to_parquet(tmp_path / "en.parquet")
    lines = list(FileText(path=f"{tmp_path}/{{lang}}.txt").segments("en"))
    rows = list(FileText(path=f"{tmp_path}/{{lang}}.parquet").segments("en"))
    assert [s.text for s in lines] == [s.text for s in rows] == ["First.", "Second."]
    assert [s.id for s in rows] == ["7", "8"]


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "en.txt").write_bytes("good\nna\u00efve\n".encode("latin-1"))
    with pytest.raises(TextError, match=r"en\.txt, line 2: not UTF-8 \(byte 0xef\).*iconv"):
        list(FileText(path=f"{tmp_path}/{{lang}}.txt").segments("en"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("en.jsonl", '{"text": "a"}\n{oops\n', "line 2: not JSON"),
        ("en.jsonl", '{"txt": "a"}\n', 'line 1: no "text"'),
        (
            "en.jsonl",
            '{"text": "a"}\n\n{"text": "b \\ud83d c"}\n',
            "en.jsonl, line 3: \\ud83d is one half of a surrogate",
        ),
        ("en.jsonl", '{"id": "\\udc00", "text": "b"}\n', "en.jsonl, line 1: \\udc00 is one half"),
        ("en.jsonl", '{"text": ' + "[" * 99_999, "line 1: not JSON (maximum recursion"),
        ("en.jsonl", '{"text": "a", "id": ' + "9" * 5000 + "}", "line 1: not JSON (Exceeds"),
        ("en.jsonl", "", "is empty"),
        ("en.parquet", "no parquet", "not a Parquet file"),
        ("en.csv", "text\na\n", 'unknown file type ".csv"'),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=re.escape(message)):
        list(FileText(path=f"{tmp_path}/{{lang}}.{name.split('.')[1]}").segments("en"))


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    (tmp_path / "en.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert [s.text for s in FileText(path=f"{tmp_path}/{{lang}}.jsonl").segments("en")] == ["\U0001f600"]


def test_parquet_columns_that_are_no_text_are_refused(tmp_path):
    pd.DataFrame({"text": [3, 4]}).to_parquet(tmp_path / "en.parquet")
    with pytest.raises(TextError, match=r'en\.parquet, row 1: "text" is not text but int'):
        list(FileText(path=f"{tmp_path}/{{lang}}.parquet").segments("en"))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    parquet.write_table(pa.table({"text": broken}), tmp_path / "en.parquet")
    with pytest.raises(TextError, match=r"en\.parquet: not UTF-8 \(byte 0xff\)"):
        list(FileText(path=f"{tmp_path}/{{lang}}.parquet").segments("en"))


def test_names_of_any_length_are_repeated_in_short():
    long = "x" * 5000
    for ask in (
        lambda: text_source(f"hub:{long}"),
        lambda: text_source(long),
        lambda: text_source(f"file:{long}"),
        lambda: list(FileText(path=f"/tmp/{long}{{lang}}.jsonl").segments("en")),
        lambda: list(FileText(path=f"{{lang}}.{long}").segments("en")),
    ):
        with pytest.raises(TextError) as caught:
            ask()
        assert len(str(caught.value)) < 400


def test_language_without_text_is_named(tmp_path):
    with pytest.raises(TextError, match=r'no text for Swahili \("sw"\): there is no file'):
        list(FileText(path=f"{tmp_path}/{{lang}}.jsonl").segments("sw"))
    with pytest.raises(TextError, match=r'no text for Korean \("ko"\): the bundled corpus has ar, de'):
        list(BundledText().segments("ko"))


@pytest.mark.parametrize("spec", ["bundle", "file:", "file:en.jsonl", "hub:", "hub:mc5", "http://x"])
def test_unknown_sources_are_refused(spec):
    with pytest.raises(TextError):
        text_source(spec)


def test_asking_for_more_segments_than_there_are_says_how_many(one_source):
    have = len(one_source.segments("heldout", "en"))
    with pytest.raises(TextError, match=f"9999 heldout segments requested for English .*there are {have}"):
        one_source.take("heldout", "en", 9999)
    with pytest.raises(TextError, match=r"share only .* ids"):
        one_source.aligned("parallel", ["en", "sw"], 9999)


def test_hub_dataset_is_streamed_from_a_local_stand_in(tmp_path):
    pytest.importorskip("datasets")
    card = "---\nconfigs:\n- config_name: swh_Latn\n  data_files:\n  - split: dev\n    path: swh.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    write_jsonl(tmp_path / "swh.jsonl", ["Habari.", "Habari ya leo.", " "], start=10)
    flores = HUB_PRESETS["flores"].model_copy(update={"dataset": str(tmp_path)})
    assert [(s.id, s.text) for s in flores.segments("sw")] == [("10", "Habari."), ("11", "Habari ya leo.")]


def test_hub_passages_repeated_for_their_questions_are_read_once(tmp_path):
    pytest.importorskip("datasets")
    rows = [
        {"link": "a", "flores_passage": "One."},
        {"link": "a", "flores_passage": "One."},
        {"link": "b", "flores_passage": "Two."},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = "---\nconfigs:\n- config_name: eng_Latn\n  data_files:\n  - split: test\n    path: x.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    belebele = HUB_PRESETS["belebele"].model_copy(update={"dataset": str(tmp_path)})
    assert [s.text for s in belebele.segments("en")] == ["One.", "Two."]


def test_mc4_preset_names_the_files_of_one_language(tmp_path):
    pytest.importorskip("datasets")
    import gzip

    folder = tmp_path / "multilingual"
    folder.mkdir()
    for lang in ("sw", "en"):
        with gzip.open(folder / f"c4-{lang}.tfrecord-00000.json.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"url": f"https://x/{lang}", "text": f"text in {lang}", "timestamp": "2020"}) + "\n")
    mc4 = HUB_PRESETS["mc4"].model_copy(update={"dataset": str(tmp_path)})
    assert [s.text for s in mc4.segments("sw")] == ["text in sw"]


def test_hub_dataset_that_cannot_be_read_says_so(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "x.jsonl", ["text"])
    with pytest.raises(TextError, match="has no column"):
        list(HubDataset(dataset=str(tmp_path), text="body").segments("en"))
    with pytest.raises(TextError, match=r'no text for English \("en"\): dataset .* cannot be read'):
        list(HubDataset(dataset=str(tmp_path / "nowhere")).segments("en"))


@pytest.fixture
def streamed(monkeypatch, tmp_path):
    """Stand in for a hub: return every request for a dataset, and count the rows that were taken of it."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, **settings):
        asked.append((name, config, split, settings.get("revision")))
        return iter([{"text": f"{config} {number} \u2028", "url": f"u{number}"} for number in range(30)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path / "cache"))
    return asked


HUB_TEXT = HubDataset(dataset="somebody/text", config="{lang}", id="url")


def test_hub_text_is_streamed_once_for_all_runs(streamed):
    first = Corpus(HUB_TEXT, HUB_TEXT, HUB_TEXT)
    taken = {part: first.segments(part, "en") for part in PARTS}
    assert len(streamed) == 1
    again = Corpus(HUB_TEXT, HUB_TEXT, HUB_TEXT)
    assert {part: again.segments(part, "en") for part in PARTS} == taken
    assert sum(map(len, taken.values())) == 30
    assert len(streamed) == 1


@pytest.mark.parametrize(
    ("changes", "language", "count"),
    [({"split": "test"}, "en", 5), ({"revision": "v2"}, "en", 5), ({}, "sw", 5), ({}, "en", 6)],
)
def test_other_hub_text_is_streamed_anew(streamed, changes, language, count):
    HUB_TEXT.drawn("en", 5)
    source = HUB_TEXT.model_copy(update=changes)
    assert source.drawn(language, count)[0].text == f"{language} 0"
    assert len(source.drawn(language, count)) == count
    assert len(streamed) == 2
    assert streamed[1] == ("somebody/text", language, source.split, source.revision)


def test_hub_text_that_breaks_off_is_not_kept(streamed, monkeypatch):
    import datasets

    whole = datasets.load_dataset

    def broken(*args, **settings):
        yield from islice(whole(*args, **settings), 3)
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(TextError, match="gone"):
        HUB_TEXT.drawn("en", 5)
    monkeypatch.setattr(datasets, "load_dataset", whole)
    assert len(HUB_TEXT.drawn("en", 5)) == 5


def test_hub_text_is_read_also_where_nothing_can_be_kept(streamed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRUNESCOPE_CACHE", str(tmp_path / "file"))
    assert len(HUB_TEXT.drawn("en", 5)) == 5


def test_a_dataset_that_is_a_script_is_never_run(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirs.py").write_text("raise SystemExit('their code ran')")
    with pytest.raises(TextError, match="needs its own loading script, which prunescope never runs"):
        list(HubDataset(dataset=str(folder)).segments("en"))


def test_fingerprint_changes_with_text_and_id(one_source):
    segments = one_source.segments("heldout", "en")
    assert fingerprint(segments) == fingerprint(list(segments))
    assert fingerprint(segments) != fingerprint(segments[1:])
