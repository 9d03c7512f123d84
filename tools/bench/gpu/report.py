"""What comes out of a run: JSON rows, a Markdown table, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROW_KEYS = ("kernel", "q_heads", "kv_heads", "head_dim", "batch", "live_tokens", "live_fraction",
            "us", "live_bytes", "touched_bytes", "stream_fraction", "p10", "p90")
SERVE_KEYS = ("system", "budget", "cap_bytes", "batch", "tokens_per_s", "step_ms", "bytes_held",
              "bound_by")
CASE_KEYS = ("q_heads", "kv_heads", "head_dim", "batch", "live_tokens", "live_fraction", "ragged")


def check_rows(rows: list[Row]) -> None:
    """Raises ValueError where a kernels result is not of the documented form."""
    kinds = [row.get("kernel") for row in rows]
    for once in ("run", "stream-read"):
        if kinds.count(once) != 1:
            raise ValueError(f"{kinds.count(once)} rows of kernel '{once}', expected one")
    for row in rows:
        if row["kernel"] == "stream-read":
            missing = [key for key in ("gb_s",) if key not in row]
        elif row["kernel"] == "run":
            missing = [key for key in ("gpu", "driver", "commit", "command") if key not in row]
        else:
            missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ValueError(f"row of {row['kernel']} has no {', '.join(missing)}")


def check_serve(rows: list[Row]) -> None:
    for row in rows:
        if row.get("system") == "run":
            continue
        missing = [key for key in SERVE_KEYS if key not in row]
        if missing:
            raise ValueError(f"row of {row.get('system')} has no {', '.join(missing)}")


def write_json(path: str, rows: list[Row]) -> None:
    """One row a line, so that two results can be compared line by line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    Path(path).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def by_case(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "us" in row:
            cases.setdefault(tuple(row.get(key, False) for key in CASE_KEYS), []).append(row)
    return cases


def case_title(key: tuple[Any, ...]) -> str:
    q_heads, kv_heads, head_dim, batch, tokens, live, ragged = key
    text = f"{q_heads}/{kv_heads}/{head_dim}, batch {batch} x {tokens}"
    text += f", {live:.0%} live" if live < 1.0 else ""
    return text + (", ragged" if ragged else "")


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest that is not ours and attends to the same tokens."""
    peers = [row for row in rows if not row["kernel"].startswith("thinkv-")]
    return min(peers, key=lambda row: row["us"], default=None)


def markdown(rows: list[Row]) -> str:
    header = next((row for row in rows if row.get("kernel") == "run"), {})
    stream = next((row["gb_s"] for row in rows if row.get("kernel") == "stream-read"), 0.0)
    lines = ["# Decode attention, one layer", "",
             f"{header.get('gpu', 'unknown GPU')}, driver {header.get('driver', '?')}, commit "
             f"{header.get('commit', '?')}; streaming read {stream:.0f} GB/s.",
             "Median of one launch in a graph over rotating buffers (p10 and p90 in brackets). "
             "Live: bytes of live codes and scales over the streaming read.", ""]
    for key, of_case in by_case(rows).items():
        peer = best_peer(of_case)
        lines += [f"## {case_title(key)}", "",
                  "| kernel | us | live | touched | against best peer |",
                  "| --- | ---: | ---: | ---: | ---: |"]
        for row in of_case:
            touched = row["touched_bytes"] / row["us"] * 1e-3 / stream if stream else 0.0
            ratio = f"{peer['us'] / row['us']:.2f}x" if peer else ""
            lines.append(f"| {row['kernel']} | {row['us']:.1f} ({row['p10']:.1f}, "
                         f"{row['p90']:.1f}) | {row['stream_fraction']:.1%} | {touched:.1%} | "
                         f"{ratio} |")
        lines.append("")
    for name, text in header.get("notes", {}).items():
        lines.append(f"- {name}: {text}")
    return "\n".join(lines).rstrip() + "\n"


def plot(rows: list[Row], path: str) -> str | None:
    """Bars of microseconds by kernel, one panel a case. Result: why there is no plot, or None."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    cases = list(by_case(rows).items())[:12]
    if not cases:
        return "no plot: no case was measured"
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6 * columns, 4 * lines),
                                   squeeze=False, layout="constrained")
    for axis, (key, of_case) in zip(axes.flat, cases):
        ordered = sorted(of_case, key=lambda row: -row["us"])
        names = [row["kernel"] for row in ordered]
        ours = ["#1f77b4" if name.startswith("thinkv-") else "#b0b0b0" for name in names]
        axis.barh(names, [row["us"] for row in ordered], color=ours)
        axis.set_title(case_title(key), fontsize=10)
        axis.set_xlabel("microseconds a launch")
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(cases):]:
        axis.remove()
    header = next((row for row in rows if row.get("kernel") == "run"), {})
    figure.suptitle(f"Decode attention of one layer, {header.get('gpu', '')}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def serve_markdown(rows: list[Row]) -> str:
    header = next((row for row in rows if row.get("system") == "run"), {})
    lines = ["# Steady-state decoding of an 8B-shaped decoder", "",
             f"{header.get('gpu', 'unknown GPU')}, driver {header.get('driver', '?')}, commit "
             f"{header.get('commit', '?')}; streaming read {header.get('stream_gb_s', 0):.0f} "
             f"GB/s, matrix product {header.get('gemm_tflops', 0):.0f} TFLOP/s.",
             "", f"{header.get('assumption', '')}.", "", f"{header.get('method', '')}.", "",
             "| system | budget | cap GB | batch | tokens/s | held GB | bound by | step ms | parts "
             "ms |", "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |"]
    for row in rows:
        if "tokens_per_s" not in row:
            continue
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["step_ms"].items()
                          if part != "step")
        lines.append(f"| {row['system']} | {row['budget'] or '-'} | {row['cap_bytes'] / 1e9:.0f} | "
                     f"{row['batch']} | {row['tokens_per_s']:.0f} | {row['bytes_held'] / 1e9:.1f} "
                     f"| {row['bound_by']} | {row['step_ms'].get('step', 0.0):.2f} | {parts} |")
    lines.append("")
    for name, text in header.get("notes", {}).items():
        lines.append(f"- {name}: {text}")
    return "\n".join(lines).rstrip() + "\n"
