"""Text: sources, the bundled corpus, calibration sets and languages."""
