"""Statistics on arrays: bootstrap intervals, permutation tests, and the margin between draws."""

from __future__ import annotations

from .bootstrap import mean_interval, segment_interval

__all__ = ["mean_interval", "segment_interval"]
