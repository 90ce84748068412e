"""Items: questions with choices, and where they come from."""

from __future__ import annotations

from .item import CATEGORIES, Item, items_fingerprint, some_twins, without_premises
from .sources import BUNDLED_ITEMS, ItemSource

__all__ = ["BUNDLED_ITEMS", "CATEGORIES", "Item", "ItemSource", "items_fingerprint", "some_twins", "without_premises"]
