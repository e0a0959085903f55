"""Turning a checkpoint on disk into one with other norms, without loading the model."""

from .checkpoint import convert_checkpoint

__all__ = ["convert_checkpoint"]
