"""The report: every figure with its caption, and the page."""
