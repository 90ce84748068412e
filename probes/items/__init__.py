"""Items: questions with choices, and where they come from."""

from __future__ import annotations

from .sources import BUNDLED_ITEMS, CATEGORIES, Item, ItemSource, first_twins, items_fingerprint

__all__ = ["BUNDLED_ITEMS", "CATEGORIES", "Item", "ItemSource", "first_twins", "items_fingerprint"]
