"""Diagnostics of norms: streaming statistics of their inputs and outputs, how normal these are, how much they say of
tokens, and how far noise travels.

The streaming part and the noise need torch alone; the functions of `normality`, and `ksg_information`, need the extra
`analysis` when they are called.
"""

from typing import TYPE_CHECKING

from ..base.lazy import on_demand

if TYPE_CHECKING:
    from .information import Estimate as Estimate
    from .information import ksg_information as ksg_information
    from .information import renyi_information as renyi_information
    from .model import Measuring as Measuring
    from .model import analyze_model as analyze_model
    from .moments import Covariance as Covariance
    from .moments import Histogram as Histogram
    from .moments import Moments as Moments
    from .moments import QuantileSketch as QuantileSketch
    from .moments import RowSample as RowSample
    from .moments import RowStatistics as RowStatistics
    from .noise import NoiseRobustness as NoiseRobustness
    from .noise import noise_robustness as noise_robustness
    from .noise import relative_change as relative_change
    from .normality import lambda_against_likelihood as lambda_against_likelihood
    from .normality import measure_normality as measure_normality
    from .normality import qq as qq
    from .places import known_norms as known_norms
    from .plane import PlanePoint as PlanePoint
    from .plane import information_plane as information_plane
    from .plane import run_information_plane as run_information_plane
    from .sites import ModelStatistics as ModelStatistics
    from .sites import SiteStatistics as SiteStatistics
    from .sites import ValueStatistics as ValueStatistics
    from .sites import watch as watch
    from .survey import analyze as analyze

_HOMES = {
    "information": ("Estimate", "ksg_information", "renyi_information"),
    "model": ("Measuring", "analyze_model"),
    "moments": ("Covariance", "Histogram", "Moments", "QuantileSketch", "RowSample", "RowStatistics"),
    "noise": ("NoiseRobustness", "noise_robustness", "relative_change"),
    "normality": ("lambda_against_likelihood", "measure_normality", "qq"),
    "places": ("known_norms",),
    "plane": ("PlanePoint", "information_plane", "run_information_plane"),
    "sites": ("ModelStatistics", "SiteStatistics", "ValueStatistics", "watch"),
    "survey": ("analyze",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)
if not TYPE_CHECKING:
    __getattr__, __dir__ = on_demand(__name__, _HOMES)
