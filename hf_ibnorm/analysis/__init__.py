"""Diagnostics of norms: streaming statistics of what goes through them, how normal it is, what it says of tokens, and
how far noise travels.

The streaming part and the noise need torch alone; the functions of `normality`, and `ksg_information`, need the extra
`analysis` when they are called.
"""

from .information import Estimate, ksg_information, renyi_information
from .model import Measuring, analyze_model
from .moments import Covariance, Histogram, Moments, QuantileSketch, RowSample, RowStatistics
from .noise import NoiseRobustness, noise_robustness, relative_change
from .normality import lambda_against_likelihood, measure_normality, qq
from .places import known_norms
from .plane import PlanePoint, information_plane, run_information_plane
from .report import analyze
from .sites import ModelStatistics, SiteStatistics, ValueStatistics, watch

__all__ = [
    "Covariance",
    "Estimate",
    "Histogram",
    "Measuring",
    "ModelStatistics",
    "Moments",
    "NoiseRobustness",
    "PlanePoint",
    "QuantileSketch",
    "RowSample",
    "RowStatistics",
    "SiteStatistics",
    "ValueStatistics",
    "analyze",
    "analyze_model",
    "information_plane",
    "known_norms",
    "ksg_information",
    "lambda_against_likelihood",
    "measure_normality",
    "noise_robustness",
    "qq",
    "relative_change",
    "renyi_information",
    "run_information_plane",
    "watch",
]
