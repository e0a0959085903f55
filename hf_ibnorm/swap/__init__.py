"""Norms into models and out again: patching, the families and their registration, loading, checkpoints with code."""
