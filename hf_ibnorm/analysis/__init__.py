"""Diagnostics of norms: streaming statistics of what goes through them, and how normal it is.

The streaming part needs torch alone; `normality` needs the extra `analysis` when its functions are called.
"""

from .moments import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics

__all__ = ["Covariance", "Histogram", "Moments", "QuantileSketch", "RowSample", "RowStatistics"]
