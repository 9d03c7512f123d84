"""Pareto plots: bytes against KL, one line a policy, one panel a split and prompt mode."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from .table import summary

Row = dict[str, Any]


def points(rows: list[Row], split: str, mode: str) -> dict[str, list[tuple[float, float]]]:
    """For each policy its (share of bytes, KL), by rising bytes."""
    found: dict[str, list[tuple[float, float]]] = {}
    for fraction in {row["memory_fraction"] for row in rows}:
        for line in summary(rows, split, mode, fraction):
            if line["reached"]:
                found.setdefault(line["policy"], []).append((line["share"], line["kl"]))
    return {policy: sorted(each) for policy, each in sorted(found.items())}


def write(rows: list[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """pareto-SPLIT-PROMPT.svg and .png. Without matplotlib nothing, and a note."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: pip install matplotlib into the virtual environment", file=sys.stderr)
        return []
    # The same rows make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "thinkv"
    written = []
    for split in dict.fromkeys(row["split"] for row in rows):
        for mode in dict.fromkeys(row["prompt"] for row in rows):
            found = points(rows, split, mode)
            if not found:
                continue
            figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
            _draw(axes, found)
            axes.set_title(f"{split} texts, {mode} prompt")
            for ending, extra in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 110})):
                written.append(folder / f"pareto-{split}-{mode}{ending}")
                figure.savefig(written[-1], **extra)
            pyplot.close(figure)
    return written


def _draw(axes: Any, found: dict[str, list[tuple[float, float]]]) -> None:
    markers = "osDv^<>pPX*h"
    for index, (policy, line) in enumerate(found.items()):
        shares = [100 * share for share, _ in line]
        divergences = [max(kl, 1e-6) for _, kl in line]
        ours = policy == "thinkv"
        axes.plot(shares, divergences, marker=markers[index % len(markers)], label=policy,
                  linewidth=2.5 if ours else 1.0, markersize=8 if ours else 5,
                  color="black" if ours else None)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes held, % of a 16-bit cache")
    axes.set_ylabel("KL(full || policy), nats")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
