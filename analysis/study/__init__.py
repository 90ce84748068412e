"""Studies: the study file, its stages, and the run."""
