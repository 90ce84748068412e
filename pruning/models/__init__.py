"""Models: where each architecture keeps its parts, loading, and weights that stay on disk."""
