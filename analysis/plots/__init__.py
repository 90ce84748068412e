"""Plots: from a tidy frame to a figure."""
