"""The rows as a JSON list, as Markdown, and what must hold for any of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from .task import FULL

Row = dict[str, Any]
KEYS = ("policy", "text", "split", "prompt", "memory_fraction", "reached", "bytes", "kl", "top1",
        "ppl", "needle")
LAYERS = "attention_error_by_layer"
KL_MIN = -1e-4  # float32 sums: an exact cache may come out a little below 0


def _mean(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def summary(rows: list[Row], split: str, mode: str, point: float) -> list[Row]:
    """A line a policy, means over the texts, the lowest KL first; what misses the point on a text
    is last and has no means, because means over fewer texts would not compare."""
    lines = []
    here = [row for row in rows if row["split"] == split and row["prompt"] == mode
            and row["memory_fraction"] == point]
    for name in dict.fromkeys(row["policy"] for row in here):
        own = [row for row in here if row["policy"] == name]
        reached = all(row["reached"] for row in own)
        line: Row = {"policy": name, "reached": reached, "texts": len(own),
                     "share": sum(row["bytes"] for row in own)
                     / sum(row["bytes_f16"] for row in own)}
        for key in ("kl", "kl_late", "top1", "ppl", "needle", "attention_error", "evicted_tokens",
                    "us_per_token"):
            line[key] = _mean(own, key) if reached else None
        lines.append(line)
    return sorted(lines, key=lambda line: (not line["reached"], line["kl"] or 0.0, line["policy"]))


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _section(lines: list[Row]) -> list[str]:
    out = ["| policy | KL | KL, later half | top-1 | perplexity | needle | attention error |"
           " bytes held | evicted | us a token |", "|---|---|---|---|---|---|---|---|---|---|"]
    for line in lines:
        share = f"{100 * line['share']:.1f} %"
        if not line["reached"]:
            share += " (point not reached)"
        out.append(f"| {line['policy']} | {_cell(line['kl'], 4)} | {_cell(line['kl_late'], 4)} |"
                   f" {_cell(line['top1'], 3)} | {_cell(line['ppl'], 2)} |"
                   f" {_cell(line['needle'], 2)} | {_cell(line['attention_error'], 3)} | {share} |"
                   f" {_cell(line['evicted_tokens'], 0)} | {_cell(line['us_per_token'], 0)} |")
    return out


def markdown(rows: list[Row]) -> str:
    """One table for each split, prompt mode and memory point."""
    out: list[str] = []
    for split in dict.fromkeys(row["split"] for row in rows):
        for mode in dict.fromkeys(row["prompt"] for row in rows):
            for point in sorted({row["memory_fraction"] for row in rows}, reverse=True):
                lines = summary(rows, split, mode, point)
                if not lines:
                    continue
                limit = "no limit" if point == FULL else f"{100 * point:g} % of a 16-bit cache"
                names = dict.fromkeys(row["text"] for row in rows if row["split"] == split)
                out += [f"### {split}, {mode} prompt, {limit}", "", f"Texts: {', '.join(names)}.",
                        "", *_section(lines), ""]
    return "\n".join(out)


def failures(rows: list[Row]) -> list[str]:
    """What no correct measurement shows."""
    problems = []
    for row in rows:
        where = f"{row['policy']} on {row['split']}/{row['text']} at {row['memory_fraction']}"
        if not row["reached"]:
            continue
        if row["memory_fraction"] != FULL and row["bytes"] > row["bytes_target"]:
            problems.append(f"{where}: {row['bytes']} bytes are over {row['bytes_target']}")
        if not row["kl"] >= KL_MIN:
            problems.append(f"{where}: KL {row['kl']}")
        if row["policy"] == "full-f16" and row["kl"] > 1e-3:
            problems.append(f"{where}: KL {row['kl']} of the exact cache")
    return problems


def write(rows: list[Row], file: pathlib.Path) -> None:
    """FILE (one row a line), FILE with .md, and the errors by layer in layers.json beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    small = [{key: value for key, value in row.items() if key != LAYERS} for row in rows]
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in small) + "\n]\n", "utf-8")
    file.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    file.with_name("layers.json").write_text(json.dumps(_layers(rows)) + "\n", "utf-8")


def _layers(rows: list[Row]) -> list[Row]:
    """attention_error by layer, means over the texts of a split."""
    groups: dict[tuple[str, str, str, float], list[list[float]]] = {}
    for row in rows:
        if row.get(LAYERS):
            key = (row["policy"], row["split"], row["prompt"], row["memory_fraction"])
            groups.setdefault(key, []).append(row[LAYERS])
    return [{"policy": policy, "split": split, "prompt": mode, "memory_fraction": point,
             "attention_error": [float(f"{sum(layer) / len(layer):.4g}") for layer in zip(*found)]}
            for (policy, split, mode, point), found in groups.items()]
