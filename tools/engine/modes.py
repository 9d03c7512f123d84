"""Modes of one-dimensional samples by kernel density estimation (Gaussian, Scott's bandwidth)."""

from __future__ import annotations

import dataclasses

import numpy as np

GRID = 512
# A bump counts as a mode if it rises above the valleys beside it by this share of the highest
# density. Without it the ripples that a finite sample leaves on a flat density would be modes.
PROMINENCE = 0.10


@dataclasses.dataclass(frozen=True)
class Modes:
    peaks: list[float]  # rising
    valleys: list[float]  # the density's minimum between neighbouring peaks


def density(samples: np.ndarray, grid: np.ndarray) -> np.ndarray:
    spread = float(samples.std())
    bandwidth = spread * len(samples) ** -0.2
    distance = (grid[:, None] - samples[None, :]) / bandwidth
    return np.exp(-0.5 * np.square(distance)).mean(axis=1) / (bandwidth * np.sqrt(2 * np.pi))


def find_modes(samples: np.ndarray, prominence: float = PROMINENCE) -> Modes:
    """Peaks and valleys. Constant samples have one peak. Raises ValueError on fewer than 2 samples
    or samples that are not finite."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError("find_modes: at least 2 finite samples are needed")
    if values.std() < 1e-9:
        return Modes([float(values[0])], [])
    margin = 3 * values.std() * len(values) ** -0.2
    grid = np.linspace(values.min() - margin, values.max() + margin, GRID)
    return _peaks(grid, density(values, grid), prominence)


def _peaks(grid: np.ndarray, height: np.ndarray, prominence: float) -> Modes:
    inner = (height[1:-1] > height[:-2]) & (height[1:-1] >= height[2:])
    peaks = list(np.flatnonzero(inner) + 1)
    valleys = [_lowest(height, left, right) for left, right in zip(peaks, peaks[1:])]
    least = prominence * height.max()
    # The shallowest bump goes first, so that a ripple never hides a real mode beside it.
    while len(peaks) > 1:
        rises = [min(height[peaks[index]], height[peaks[index + 1]]) - height[valley]
                 for index, valley in enumerate(valleys)]
        index = int(np.argmin(rises))
        if rises[index] >= least:
            break
        del peaks[index if height[peaks[index]] < height[peaks[index + 1]] else index + 1]
        del valleys[index]
        valleys = [_lowest(height, left, right) for left, right in zip(peaks, peaks[1:])]
    return Modes([float(grid[peak]) for peak in peaks], [float(grid[valley]) for valley in valleys])


def _lowest(height: np.ndarray, left: int, right: int) -> int:
    return int(left + np.argmin(height[left : right + 1]))
