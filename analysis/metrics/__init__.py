"""Metrics: one analyzer a file, from what was read to a tidy frame."""
