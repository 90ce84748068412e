"""A look at whether Python finds prunescope's own packages, and not others that have the same names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_OWN = Path(__file__).parent.parent


def check_neighbours() -> None:
    """Check that ``analysis`` and ``probes`` are those beside this package.

    Raises
    ------
    ImportError
        If Python finds another package, module or folder of this name first. The message says which, and what to do.
    """
    for name in ("analysis", "probes"):
        spec = find_spec(name)
        if spec is None:
            raise ImportError(f'prunescope\'s package "{name}" is missing beside {_OWN}; install prunescope again')
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        if not any(folder.parent.samefile(_OWN) for folder in folders):
            found = folders[0] if folders else Path(str(spec.origin))
            raise ImportError(
                f'{found} hides prunescope\'s own package "{name}", since Python looks in {found.parent} first; '
                "rename it, or start Python in another folder (and take this one out of PYTHONPATH)"
            )
