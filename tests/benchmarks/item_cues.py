"""How often cues in the wording answer the bundled items: a table, and what is not at chance.

    python tests/benchmarks/item_cues.py [LANGUAGE ...]

Chance is 0.50. ``!`` marks a rate that differs from it at the 5 % level, corrected for all rates of its language.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cues import all_cues, corpus_of, failing, groups_of, pairs_of, rates

from probes.items.bundled import bundled_items
from pruning.text.sources import BUNDLED_LANGUAGES


def main(languages: Sequence[str]) -> None:
    for language in languages:
        pairs = pairs_of(bundled_items(language))
        outcomes = all_cues(pairs, corpus_of(language))
        found = list(rates(pairs, outcomes))
        bad = failing(found)
        print(f"\n{language:40s} pairs " + " ".join(f"{cue:>13s}" for cue in outcomes))
        for group in dict.fromkeys(rate.group for rate in found):
            own = [rate for rate in found if rate.group == group]
            cells = [f"{rate.share:.2f}{'!' if rate in bad else ' '}" for rate in own]
            print(f"{group:40s} {own[0].pairs:5d} " + " ".join(f"{cell:>13s}" for cell in cells))
        for rate in bad:
            by_cue = zip(pairs, outcomes[rate.cue], strict=True)
            right = [pair.first.twin for pair, found in by_cue if found > 0 and rate.group in groups_of(pair)]
            print(f"  {rate.group}, {rate.cue}: right {rate.right}, wrong {rate.wrong}; right: {', '.join(right)}")


if __name__ == "__main__":
    main(sys.argv[1:] or BUNDLED_LANGUAGES)
