"""Turning a checkpoint on disk into one with other norms, without loading the model."""

from typing import TYPE_CHECKING

from ..base.lazy import on_demand

if TYPE_CHECKING:
    from .checkpoint import convert_checkpoint as convert_checkpoint

_HOMES = {"checkpoint": ("convert_checkpoint",)}
__all__ = ["convert_checkpoint"]
if not TYPE_CHECKING:
    __getattr__, __dir__ = on_demand(__name__, _HOMES)
