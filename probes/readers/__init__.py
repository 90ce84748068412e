"""Readers: what is taken from a model on the way, one file each."""
