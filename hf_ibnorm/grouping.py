"""Areas: which elements of an input share their statistics, as a rearrangement into rows and back."""

from torch import Tensor

LAYER, CHANNELS = "layer", "channels"
AREAS = (LAYER, CHANNELS)
"""The last dimension; or dimension 1 of a channels-first image, at each position of each sample."""


def to_rows(x: Tensor, area: str) -> Tensor:
    """`x` with the elements of a group in the last dimension.

    Args:
        x: shape (..., N) for "layer", (B, N, *spatial) for "channels".
        area: "layer", or an area of channels-first images, whose channels go last.
    """
    return x if area == LAYER else x.movedim(1, -1)


def from_rows(rows: Tensor, area: str) -> Tensor:
    """Undo `to_rows`."""
    return rows if area == LAYER else rows.movedim(-1, 1)
