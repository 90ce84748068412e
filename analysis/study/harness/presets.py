"""The benchmarks of Kurz et al. (TACL 2026), by the names of their tasks in the harness."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pruning.errors import StudyError
from pruning.text.languages import language_tag, named

#: The benchmarks of Kurz et al., and further multilingual ones: language to task. The harness has no MKQA, no ARC
#: and HellaSwag in Swahili, and no HellaSwag in Chinese.
STUDY_BENCHMARKS: dict[str, dict[str, str]] = {
    "belebele": {
        "ar": "belebele_arb_Arab",
        "de": "belebele_deu_Latn",
        "en": "belebele_eng_Latn",
        "es": "belebele_spa_Latn",
        "fr": "belebele_fra_Latn",
        "ru": "belebele_rus_Cyrl",
        "sw": "belebele_swh_Latn",
        "zh": "belebele_zho_Hans",
    },
    "arc": {"en": "arc_challenge"} | {tag: f"arc_{tag}" for tag in ("ar", "de", "es", "fr", "ru", "zh")},
    "hellaswag": {"en": "hellaswag"} | {tag: f"hellaswag_{tag}" for tag in ("ar", "de", "es", "fr", "ru")},
    "mmlu": {"sw": "global_mmlu_sw"} | {tag: f"m_mmlu_{tag}" for tag in ("ar", "de", "en", "es", "fr", "ru", "zh")},
    "xstorycloze": {tag: f"xstorycloze_{tag}" for tag in ("ar", "en", "es", "ru", "sw", "zh")},
    "xcopa": {tag: f"xcopa_{tag}" for tag in ("sw", "zh")},
    "xnli": {tag: f"xnli_{tag}" for tag in ("ar", "de", "en", "es", "fr", "ru", "sw", "zh")},
    "mgsm": {tag: f"mgsm_direct_{tag}" for tag in ("de", "en", "es", "fr", "ru", "sw", "zh")},
}
#: Name that stands for all of them.
PRESET = "preset"


def preset(language: str, known: Collection[str] | None = None) -> list[str]:
    """Return the tasks of :data:`STUDY_BENCHMARKS` in one language.

    Parameters
    ----------
    language
        BCP-47 tag.
    known
        Known tasks, such as :func:`known_tasks` of an older harness; others are left out.

    Raises
    ------
    StudyError
        If there are none.

    Examples
    --------
    >>> preset("sw", known=["belebele_swh_Latn", "xnli_sw"])
    ['belebele_swh_Latn', 'xnli_sw']
    """
    tag = language_tag(language)
    names = [tasks[tag] for tasks in STUDY_BENCHMARKS.values() if tag in tasks]
    names = [name for name in names if known is None or name in known]
    if not names:
        languages = sorted({language for tasks in STUDY_BENCHMARKS.values() for language in tasks})
        raise StudyError(
            f"there are no preset tasks for {named(tag)} (only for {', '.join(languages)}); name tasks of the harness"
        )
    return names


def named_tasks(names: Sequence[str], languages: Sequence[str]) -> list[str]:
    """Return tasks by name, ``preset`` replaced by the tasks of :func:`preset` in these languages."""
    tasks: dict[str, None] = {}
    for name in names:
        found = [task for language in languages for task in preset(language)] if name == PRESET else [name]
        tasks |= dict.fromkeys(found)
    return list(tasks)
