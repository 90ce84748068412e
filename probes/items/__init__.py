"""Items: questions with choices, and where they come from."""

from __future__ import annotations

from .sources import BUNDLED_ITEMS, CATEGORIES, Item, ItemSource, items_fingerprint, some_twins

__all__ = ["BUNDLED_ITEMS", "CATEGORIES", "Item", "ItemSource", "items_fingerprint", "some_twins"]
