"""How a projection of a model is named."""

from __future__ import annotations

#: Block and role.
Key = tuple[int, str]


def name_of(key: Key) -> str:
    """Return the name of a projection in files.

    >>> name_of((3, "down"))
    '3.down'
    """
    return f"{key[0]}.{key[1]}"


def key_of(name: str) -> Key:
    """Return the projection that a name in a file stands for.

    >>> key_of("3.up.17")
    (3, 'up.17')

    Raises
    ------
    ValueError
        If it is no such name.
    """
    layer, _, role = name.partition(".")
    return int(layer), role
