"""Diagnostics of norms: streaming statistics of what goes through them, and how normal it is.

The streaming part needs torch alone; the functions of `normality` need the extra `analysis` when they are called.
"""

from .moments import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics
from .normality import lambda_against_likelihood, measure_normality, qq
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
    "lambda_against_likelihood",
    "measure_normality",
    "qq",
    "watch",
]
