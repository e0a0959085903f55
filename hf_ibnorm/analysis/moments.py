"""Statistics of rows that stream by, in fixed memory, on the device of the data.

All of them take in rows by `update`, and by `merge` all that others of the same options and device have seen. Neither
waits for the device or looks at a value, so both can run inside a training step; results are tensors, too. Rows with
NaN or infinity are left out and counted: one of them does not spoil the rest. `width` is N, the number of channels.
"""

import math
from copy import copy
from typing import Self

import torch
from torch import Tensor

Device = torch.device | str


def accumulator_dtype(device: Device) -> torch.dtype:
    """The dtype of sums: float64, but float32 on the one device (Apple's GPU) that has no float64.

    Against float64 NumPy on a million rows whose mean is 5 standard deviations, the relative error of moments is below
    1e-11 in float64 and below 1e-4 in float32.
    """
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def finite_rows(x: Tensor, width: int | None = None) -> Tensor:
    """`x` of shape (..., N) as rows of shape (R, N); a row that holds a NaN or an infinity becomes all NaN.

    Raises ValueError where N is not `width`.
    """
    if width is not None and x.shape[-1:] != (width,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, the last dimension must be {width}")
    x = torch.atleast_2d(x).flatten(0, -2)
    return torch.where(torch.isfinite(x).all(-1, keepdim=True), x, torch.nan)


class Moments:
    """Mean and central moments up to the fourth of each channel, over all rows seen.

    Chunks are merged by the formulas of Chan et al. (1979) and Pébay (SAND2008-6212), which lose no digits to a large
    mean as sums of powers would. Sums are kept in `dtype`, by default `accumulator_dtype(device)`.
    """

    def __init__(self, width: int, device: Device = "cpu", dtype: torch.dtype | None = None) -> None:
        dtype = dtype or accumulator_dtype(device)
        self.width = width
        self.seen, self.count = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.mean, self.m2, self.m3, self.m4 = (torch.zeros(width, dtype=dtype, device=device) for _ in range(4))

    @property
    def skipped(self) -> Tensor:
        """Rows left out because they held a NaN or an infinity, int64 of shape ()."""
        return self.seen - self.count

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in rows of shape (..., N), of any floating dtype; raises ValueError for another N."""
        rows = finite_rows(x, self.width).to(self.mean.dtype)
        kept = ~rows[:, :1].isnan()
        chunk = copy(self)
        chunk.seen, chunk.count = torch.full_like(self.seen, len(rows)), kept.sum()
        chunk.mean = torch.where(kept, rows, 0.0).sum(0) / chunk.count.clamp_min(1)
        chunk._set_sums(torch.where(kept, rows - chunk.mean, 0.0))
        self.merge(chunk)

    def _set_sums(self, c: Tensor) -> None:
        """Set the sums over deviations from the mean, shape (R, N), 0 in rows left out."""
        c2 = c * c
        self.m2, self.m3, self.m4 = c2.sum(0), (c2 * c).sum(0), (c2 * c2).sum(0)

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        dtype = self.mean.dtype
        total = (self.count + other.count).clamp_min(1).to(dtype)  # before dividing: integers would give float32
        a, b = self.count / total, other.count / total  # shares of the two parts
        ab = self.count.to(dtype) * b  # n_a·n_b / n
        d = other.mean - self.mean
        d2 = d * d
        self.m4 += other.m4 + d2 * d2 * ab * (a * a - a * b + b * b)
        self.m4 += 6 * d2 * (a * a * other.m2 + b * b * self.m2) + 4 * d * (a * other.m3 - b * self.m3)
        self.m3 += other.m3 + d2 * d * ab * (a - b) + 3 * d * (a * other.m2 - b * self.m2)
        self.m2 += other.m2 + d2 * ab
        self.mean += d * b
        self.count += other.count
        self.seen += other.seen

    def pooled(self) -> "Moments":
        """The moments of all elements together, whatever their channel: of width 1; `count` is a number of elements."""
        n = self.count.to(self.mean.dtype)
        pooled = Moments(1, self.mean.device, self.mean.dtype)
        pooled.seen, pooled.count = self.seen * self.width, self.count * self.width
        pooled.mean = self.mean.mean(-1, keepdim=True)
        d = self.mean - pooled.mean
        pooled.m2 = (self.m2 + n * d**2).sum(-1, keepdim=True)
        pooled.m3 = (self.m3 + 3 * d * self.m2 + n * d**3).sum(-1, keepdim=True)
        pooled.m4 = (self.m4 + 4 * d * self.m3 + 6 * d**2 * self.m2 + n * d**4).sum(-1, keepdim=True)
        return pooled

    @property
    def variance(self) -> Tensor:
        """Biased variance, shape (N,); NaN where no row was seen."""
        return self.m2 / self.count

    @property
    def skewness(self) -> Tensor:
        """Skewness, shape (N,), biased as in scipy.stats.skew; NaN for a constant channel."""
        return self.m3 / self.count / self.variance**1.5

    @property
    def excess_kurtosis(self) -> Tensor:
        """Kurtosis - 3, shape (N,), biased as in scipy.stats.kurtosis; NaN for a constant channel."""
        return self.m4 / self.count / self.variance**2 - 3


class Covariance(Moments):
    """The moments with the covariance of the channels, and from it the effective rank.

    The covariance takes 4·N² bytes. Its sums are float32, in which a matrix product is fast (TF32 where the user allows
    it); eigenvalues below 1e-7 of the largest are noise, and change the effective rank by less than 1 %.
    """

    def __init__(self, width: int, device: Device = "cpu") -> None:
        super().__init__(width, device)
        self.scatter = torch.zeros(width, width, dtype=torch.float32, device=device)

    def _set_sums(self, c: Tensor) -> None:
        super()._set_sums(c)
        c = c.float()
        self.scatter = c.T @ c

    def merge(self, other: Self) -> None:
        share = other.count / (self.count + other.count).clamp_min(1).to(self.mean.dtype)
        d = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(d * self.count * share, d).float()
        super().merge(other)

    def effective_rank(self) -> Tensor:
        """exp of the entropy of the eigenvalues as shares of their sum (Roy & Vetterli 2007): from 1 to N, shape ().

        NaN where all rows are alike. An estimate from R rows is too low, for uncorrelated channels by about N/(2R).
        """
        values = torch.linalg.eigvalsh(self.scatter.to(self.mean.dtype)).clamp_min(0)
        return torch.special.entr(values / values.sum()).sum().exp()


class _Counts:
    """Counts of values in bins; `_bin` gives the bin of each value."""

    def __init__(self, bins: int, device: Device) -> None:
        self.counts = torch.zeros(bins, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def _bin(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count the elements of `x`, of any shape and floating dtype; NaN and infinity are counted in `skipped`."""
        x = x.flatten() if x.dtype == torch.float64 else x.flatten().float()
        finite = torch.isfinite(x)
        # Not bincount, which looks at the values to find out how many bins there are.
        self.counts.scatter_add_(0, self._bin(torch.where(finite, x, 0.0)), finite.long())
        self.skipped += (~finite).sum()

    def merge(self, other: Self) -> None:
        """Take in all that `other` has seen."""
        self.counts += other.counts
        self.skipped += other.skipped


class QuantileSketch(_Counts):
    """Quantiles of all values seen, to a stated relative error.

    Bins are even in log|x|, for either sign, as in DDSketch (Masson et al. 2019), but fixed: from 1e-12 to 1e12. A
    smaller |x| counts as 0, a larger one as 1e12.

    Args:
        error: largest relative error α of a quantile (and 1e-5 for the rounding of float32); 1e-12 absolute near 0.
            Memory is 8 bytes for each of 2·ln(1e24) / ln((1+α)/(1-α)) bins: 44 kB for 1 %.
    """

    LEAST, LARGEST = 1e-12, 1e12

    def __init__(self, error: float = 0.01, device: Device = "cpu") -> None:
        self.error, self.log_base = error, math.log((1 + error) / (1 - error))
        self.side = math.ceil(math.log(self.LARGEST / self.LEAST) / self.log_base)  # bins of one sign
        super().__init__(2 * self.side + 1, device)

    def _bin(self, x: Tensor) -> Tensor:
        size = x.abs().clamp(self.LEAST, self.LARGEST)
        steps = (((size.log() - math.log(self.LEAST)) / self.log_base).floor().long() + 1).clamp(1, self.side)
        return self.side + torch.where(x.abs() < self.LEAST, 0, torch.where(x < 0, -steps, steps))

    def quantile(self, q: float | list[float]) -> Tensor:
        """The smallest value with at least the share `q` of all values at or below it, within the error.

        Args:
            q: in [0, 1], one or several.

        Returns:
            Shape () or (len(q),), in the device's `accumulator_dtype`; NaN where nothing was seen.
        """
        dtype, device = accumulator_dtype(self.counts.device), self.counts.device
        total = self.counts.sum()
        rank = (torch.as_tensor(q, dtype=dtype, device=device) * total).ceil().clamp_min(1)
        steps = torch.searchsorted(self.counts.cumsum(0).to(dtype), rank) - self.side
        # The point of a bin that is the same relative distance away from both ends.
        middle = self.LEAST * (1 - self.error) * torch.exp(self.log_base * steps.abs().to(dtype))
        return torch.where(total > 0, torch.where(steps == 0, 0.0, steps.sign() * middle), torch.nan)


class Histogram(_Counts):
    """Counts in even bins over [low, high]; `below` and `above` count the values outside.

    A value on an inner edge belongs to the bin above it, one at `high` to the last bin.
    """

    def __init__(self, low: float, high: float, bins: int, device: Device = "cpu") -> None:
        super().__init__(bins + 2, device)
        self.low, self.high, self.bins = low, high, bins

    def _bin(self, x: Tensor) -> Tensor:
        inside = ((x - self.low) * (self.bins / (self.high - self.low))).clamp(0, self.bins - 1).long() + 1
        return torch.where(x < self.low, 0, torch.where(x > self.high, self.bins + 1, inside))

    @property
    def edges(self) -> list[float]:
        return [self.low + (self.high - self.low) * i / self.bins for i in range(self.bins + 1)]

    @property
    def inside(self) -> Tensor:
        """Counts of the bins, int64 of shape (bins,)."""
        return self.counts[1:-1]

    @property
    def below(self) -> Tensor:
        return self.counts[0]

    @property
    def above(self) -> Tensor:
        return self.counts[-1]


class RowStatistics:
    """Mean, least and largest of several named numbers per row; NaN stands for a number that a row does not have."""

    def __init__(self, names: tuple[str, ...], device: Device = "cpu") -> None:
        dtype = accumulator_dtype(device)
        self.names = names
        self.count = torch.zeros(len(names), dtype=torch.int64, device=device)
        self.sum = torch.zeros(len(names), dtype=dtype, device=device)
        self.least = torch.full((len(names),), torch.inf, dtype=dtype, device=device)
        self.most = torch.full((len(names),), -torch.inf, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, **numbers: Tensor) -> None:
        """Take in rows: for each name a tensor of shape (R,)."""
        if not self.names or not numbers[self.names[0]].numel():  # amin has no value for no rows
            return
        rows = torch.stack([numbers[name].to(self.sum.dtype) for name in self.names])
        kept = torch.isfinite(rows)
        self.count += kept.sum(1)
        self.sum += torch.where(kept, rows, 0.0).sum(1)
        self.least = torch.minimum(self.least, torch.where(kept, rows, torch.inf).amin(1))
        self.most = torch.maximum(self.most, torch.where(kept, rows, -torch.inf).amax(1))

    def merge(self, other: "RowStatistics") -> None:
        """Take in all that `other` has seen."""
        self.count += other.count
        self.sum += other.sum
        self.least = torch.minimum(self.least, other.least)
        self.most = torch.maximum(self.most, other.most)

    def read(self) -> dict[str, dict[str, float]]:
        """Name → {"rows", "mean", "least", "most"}; NaN where no row has the number. Waits for the device."""
        table = torch.stack([self.sum / self.count, self.least, self.most])
        table = torch.cat([self.count[None], torch.where(self.count > 0, table, torch.nan)])
        keys = ("rows", "mean", "least", "most")
        return {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.names, table.T.tolist(), strict=True)}


class RowSample:
    """At most `size` rows, a uniform sample without replacement of all finite ones seen; none for size 0.

    A hash of `seed` and a row's place in the stream decides whether it is kept. So the sample does not depend on how
    the stream was cut, it is the same every time, and no period of the text (the first token of every block) shows in
    it. Samples that will be merged need different seeds.
    """

    def __init__(self, size: int, width: int, device: Device = "cpu", seed: int = 0) -> None:
        self.width, self.seed, self.seen = width, seed, 0
        self.kept = torch.zeros(size, width, dtype=torch.float32, device=device)
        self.chance = torch.full((size,), -1, dtype=torch.int64, device=device)
        """Hash of each row kept, the largest of all; -1 where there is no row yet."""

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in rows of shape (..., N); raises ValueError for another N."""
        if len(self.kept):
            rows = finite_rows(x, self.width)
            place = torch.arange(self.seen, self.seen + len(rows), device=rows.device) + self.seed * 0x3779B97F
            self._add(rows, torch.where(rows.isfinite().all(-1), _hash(place), -1))
            self.seen += len(rows)

    def merge(self, other: "RowSample") -> None:
        """Take in all that `other`, of another seed, has seen."""
        self._add(other.kept, other.chance)
        self.seen += other.seen

    def _add(self, rows: Tensor, chance: Tensor) -> None:
        self.chance, best = torch.cat([self.chance, chance]).topk(len(self.chance))
        self.kept = torch.cat([self.kept, rows.float()])[best]

    def rows(self) -> Tensor:
        """The sample, shape (at most `size`, N), in an order unrelated to the text. Waits for the device."""
        return self.kept[self.chance >= 0]


def _hash(x: Tensor) -> Tensor:
    """A well-mixed number in [0, 2^31) of each int64: two rounds of multiply and shift, without overflow."""
    mask = 0x7FFFFFFF
    x = (x ^ (x >> 31)) & mask
    for factor in (0x45D9F3B, 0x2C1B3C6D):
        x = (x ^ (x >> 16)) * factor & mask
    return x ^ (x >> 15)
