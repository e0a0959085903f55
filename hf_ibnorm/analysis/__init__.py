"""Diagnostics of norms: streaming statistics of what goes through them, and how normal it is.

The streaming part needs torch alone; `normality` needs the extra `analysis` when its functions are called.
"""

from .moments import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics
from .sites import ModelStatistics, SiteStatistics, ValueStatistics, watch

__all__ = [
    "Covariance",
    "Histogram",
    "ModelStatistics",
    "Moments",
    "QuantileSketch",
    "RowSample",
    "RowStatistics",
    "SiteStatistics",
    "ValueStatistics",
    "watch",
]
