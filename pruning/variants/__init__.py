"""Variants: masks and updated weights, and how they are stored, applied, imported and exported."""
