"""The last stage: writes the report, a single page."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pruning.code_version import code_version
from pruning.files import content_sha256

from ..frames import read_frame
from ..frames.added import added_frames
from ..report import write_report
from .context import Context
from .diagnose import across_languages, diagnoses
from .figures import FOLDER as FIGURES_FOLDER
from .figures import figure_keys, figures, report_facts
from .frames import StudyFrames, frames_finished
from .tables import table_keys, tables
from .units import Advance, Output, Unit

REPORT_FILE = "report.html"


class WriteReport:
    """The only unit is the report."""

    name = "report"

    def units(self, context: Context) -> Sequence[Unit]:
        """Return the report, unless it is up to date; nothing before the frames are finished."""
        if not frames_finished(context):
            return []
        said = {diagnosis.request.name: diagnosis.key for diagnosis in diagnoses(context)}
        code = code_version("analysis.report", "analysis.frames")
        key = content_sha256(
            [
                code,
                figure_keys(context),
                table_keys(context),
                said,
                context.variants.set_aside,
                context.study.to_toml(),
                {name: added.code for name, added in added_frames().items()},  # whose definitions it gives
            ]
        )
        if context.records.finished(self.name, key):
            return []
        return [Unit(self.name, "writing the report", (Output(self.name, key),))]

    def run(self, context: Context, unit: Unit, advance: Advance) -> None:
        """Write the report, and record it."""
        began = time.monotonic()
        (output,) = unit.outputs
        path = context.folder / REPORT_FILE
        found = {d.request.title: (d.request.name, read_frame(d.frame)) for d in diagnoses(context)}
        write_report(
            path,
            StudyFrames(context),
            list(figures(context)),
            context.folder / FIGURES_FOLDER,
            report_facts(context),
            list(tables(context)),
            found,
            {
                request.title_of_all: {language: read_frame(one.frame) for language, one in group.items()}
                for request, group in across_languages(context)
            },
            {d.request.title: read_frame(d.crossing) for d in diagnoses(context) if d.request.sources},
        )
        context.records.finish(output.name, output.key, [path], time.monotonic() - began)
