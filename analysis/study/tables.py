"""The stage that writes the tables for papers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from pruning.code_version import code_version
from pruning.files import content_sha256, write_text

from ..report import ReportTable, document, latex, methods_latex, methods_paragraph, references, study_tables
from .analyses import NAMES
from .context import Context
from .diagnose import diagnoses
from .figures import captions_of, report_facts, versions
from .frames import StudyFrames, frame_key, frames_finished
from .units import Advance, Output, Unit

FOLDER = "tables"
#: A document of all tables.
PREVIEW = "preview"
#: A paragraph on what was done, and the works that it cites.
METHODS, REFERENCES = "methods", "references"


class WriteTables:
    """The only unit is all tables that are left."""

    name = "tables"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the remaining tables; none before the frames are finished."""
        if not frames_finished(context):
            return []
        outputs = [Output(f"{FOLDER}/{name}", key) for name, key in table_keys(context).items()]
        left = tuple(output for output in outputs if not context.records.finished(output.name, output.key))
        return [Unit(self.name, "writing the tables", left)] if left else []

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Write each table as CSV and as LaTeX, and record it."""
        folder = context.folder / FOLDER
        shown = {table.name: table for table in tables(context)}
        source = f"Written by prunescope {versions()['prunescope']}."
        for output in unit.outputs:
            began = time.monotonic()
            name = output.name.partition("/")[2]
            written = {f"{name}.tex": document(list(shown))}
            if name == METHODS:
                paragraph = methods_paragraph(report_facts(context), StudyFrames(context), any(diagnoses(context)))
                written = {
                    f"{METHODS}.tex": methods_latex(paragraph, source),
                    f"{REFERENCES}.bib": references(paragraph),
                }
            elif name != PREVIEW:
                made = shown[name].make()
                written = {
                    f"{name}.csv": made.numbers.to_csv(index=False),
                    f"{name}.tex": latex(made, name=name, caption=shown[name].caption, source=source),
                }
            for file, content in written.items():
                write_text(folder / file, content)
            files = [folder / file for file in written]
            context.records.finish(output.name, output.key, files, time.monotonic() - began)


def tables(context: Context) -> Iterator[ReportTable]:
    """Yield every table of a study, in the order of the report."""
    yield from study_tables(StudyFrames(context), report_facts(context))


def table_keys(context: Context) -> dict[str, str]:
    """Return a hash of everything that each table, the paragraph and the preview depend on, by name."""
    code = code_version("analysis.report", "analysis.frames")
    of_frames = content_sha256([code, [frame_key(context, name) for name in NAMES]])
    captions = captions_of(context, of_frames, study_tables)
    found = {name: content_sha256([of_frames, name, caption]) for name, caption in captions.items()}
    said = [of_frames, context.study.to_toml(), [one.key for one in diagnoses(context)]]
    return found | {METHODS: content_sha256(said), PREVIEW: content_sha256([code, list(found)])}
