"""Statistics on arrays: intervals, contrasts over draws, and permutation tests."""

from __future__ import annotations

from .bootstrap import mean_interval, segment_interval
from .intervals import share_difference_interval, share_interval, unit_interval

__all__ = ["mean_interval", "segment_interval", "share_difference_interval", "share_interval", "unit_interval"]
