"""Variants: masks, corrected weights, and how they are stored, applied, imported and exported."""
