"""Language codes: BCP-47 tags, validated and named with the ``langcodes`` library."""

from __future__ import annotations

from collections.abc import Iterable

import langcodes

from ..errors import LanguageError, shortened


def language_tag(tag: str) -> str:
    """Return `tag` in its canonical BCP-47 form.

    Raises
    ------
    LanguageError
        If it is not a valid language tag.

    Examples
    --------
    >>> language_tag("EN"), language_tag("zh-hans")
    ('en', 'zh-Hans')
    """
    if not langcodes.tag_is_valid(tag):
        raise LanguageError(f'unknown language tag "{shortened(tag)}"{_suggestion(tag)}')
    return langcodes.standardize_tag(tag)


def language_name(tag: str) -> str:
    """Return the English name of a language.

    >>> language_name("sw")
    'Swahili'
    """
    return langcodes.Language.get(tag).display_name("en")


def named(tag: str) -> str:
    """Return a language's name and tag, for messages.

    >>> named("sw")
    'Swahili ("sw")'
    """
    return f'{language_name(tag)} ("{tag}")'


def alpha3_script(tag: str) -> str:
    """Return the ``eng_Latn`` form that FLORES+ and Belebele use.

    Macrolanguages (Arabic, Swahili, ...) are returned as such; presets map them to the member language they contain.

    >>> alpha3_script("en"), alpha3_script("ru")
    ('eng_Latn', 'rus_Cyrl')
    """
    language = langcodes.Language.get(tag)
    return f"{language.to_alpha3()}_{language.maximize().script}"


def language_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return canonical tags.

    Raises
    ------
    LanguageError
        If a tag is invalid or listed twice.
    """
    canonical = tuple(language_tag(tag) for tag in tags)
    for tag in canonical:
        if canonical.count(tag) > 1:
            raise LanguageError(f'language "{shortened(tag)}" is listed twice')
    return canonical


def _suggestion(tag: str) -> str:
    try:
        found = str(langcodes.find(tag))
    except LookupError:
        return '; use a BCP-47 tag such as "en", "sw" or "zh"'
    return f'; did you mean "{found}"? Use BCP-47 tags such as "en", "sw" or "zh"'
