"""Tables in LaTeX, which need the package booktabs and no other, and compile with pdflatex whatever the labels hold."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain

from .cells import Cell, Table

#: More columns than these go across both columns of a page.
_NARROW = 5
#: Signs that LaTeX takes as commands or ligatures, or prints as something else, and those of captions.
_SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "−": "$-$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "∞": r"$\infty$",
    "Δ": r"$\Delta$",
    "²": "$^{2}$",
    "½": r"$\frac{1}{2}$",
    "†": r"$^{\dagger}$",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "‘": r"\textquoteleft{}",
    "’": r"\textquoteright{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "…": r"\dots{}",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "œ": r"\oe{}",
    "Œ": r"\OE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
}
#: Combining accents that every font encoding has.
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}


def escaped(text: str) -> str:
    r"""Return text as LaTeX that prints it.

    Letters that pdflatex has no fonts for by default, such as Arabic or Chinese ones, are printed as their code points.

    >>> print(escaped("a_b & 50 % of {x}"))
    a\_b \& 50 \% of \{x\}
    >>> print(escaped("Müller 中"))
    M\"{u}ller \texttt{U+4E2D}
    """
    return "".join(map(_sign, unicodedata.normalize("NFC", text))).replace("--", "-{}-")


def _sign(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if character.isspace():
        return " "
    if character.isascii() and character.isprintable():
        return character
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return rf"\{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return rf"\texttt{{U+{ord(character):04X}}}"


def latex(table: Table, *, name: str, caption: str, source: str) -> str:
    r"""Return a table as a float, to be read with ``\input``.

    Parameters
    ----------
    table
        The table.
    name
        Of its file, and of its label.
    caption
        In plain words.
    source
        What made it: a comment.
    """
    columns = len(table.head)
    kind = "table*" if columns > _NARROW else "table"
    rows = list(chain.from_iterable(table.groups))
    subs = [max((row[column].sub for row in rows), key=len) for column in range(columns)]
    head = [escaped(word) for word in table.head]
    head[table.labels :] = [rf"\multicolumn{{1}}{{c}}{{{word}}}" for word in head[table.labels :]]
    lines = [
        rf"% {source}",
        r"% Needs \usepackage{booktabs} and no other package.",
        rf"\begin{{{kind}}}",
        r"\centering",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        rf"\begin{{tabular}}{{{'l' * table.labels}{'r' * (columns - table.labels)}}}",
        r"\toprule",
    ]
    if table.over:
        lines.append(rf" & \multicolumn{{{columns - 1}}}{{c}}{{{escaped(table.over)}}} \\")
        lines.append(rf"\cmidrule(lr){{2-{columns}}}")
    lines.append(_line(head))
    for group in table.groups:
        lines += [r"\midrule", *(_line(map(_cell, row, subs)) for row in group)]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{escaped(caption)}}}",
        rf"\label{{{label(name)}}}",
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def label(name: str) -> str:
    """Return what to cite a table by.

    >>> label("accuracy-bundled-知識_x")
    'tab:accuracy-bundled-77e58b58_x'
    """
    return "tab:" + re.sub(r"[^\w.=+-]", lambda sign: f"{ord(sign[0]):x}", name, flags=re.ASCII)


def document(names: Sequence[str]) -> str:
    """Return a whole document that shows the tables of some files, one a page."""
    shown = "\n\\clearpage\n".join(rf"\input{{{name}.tex}}" for name in names)
    return (
        "% Every table of the study, to look at: pdflatex preview.tex, in this folder.\n"
        "\\documentclass[a4paper,10pt]{article}\n"
        "\\usepackage[margin=2cm]{geometry}\n"
        "\\usepackage{booktabs}\n"
        f"\\begin{{document}}\n{shown}\n\\end{{document}}\n"
    )


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell, widest: str) -> str:
    """Return a cell; a subscript takes the room of the column's widest, so that its numbers are below each other."""
    text = escaped(cell.text)
    text = rf"\underline{{{text}}}" if cell.best else text
    text = rf"\textbf{{{text}}}" if cell.own else text
    room = rf"\phantom{{$_{{{widest}}}$}}" if widest else ""
    sub = f"$_{{{cell.sub}}}$" if cell.sub else ""
    mark = rf"\rlap{{{escaped(cell.mark)}}}" if cell.mark else ""
    if cell.power is not None:
        return text + sub + rf"${{\cdot}}10^{{{cell.power}}}$" + mark
    if not cell.sub:
        return text + mark + room
    return text + (sub if len(cell.sub) == len(widest) else rf"\rlap{{{sub}}}{room}") + mark
