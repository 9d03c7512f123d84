"""The table at the end of the quickstart, and the same numbers as JSON."""

from __future__ import annotations

from typing import Any


def mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"


def _thoughts(counts: dict[str, int]) -> str:
    return "  ".join(f"{counts.get(name, 0)} {name}" for name in
                     ("reasoning", "execution", "transition"))


def process_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(row name, value) of one process; the order is the table's."""
    return [
        ("tokens generated", f"{result['tokens']:,}"),
        ("tokens/s", f"{result['tokens_per_s']:.1f}"),
        ("bytes of a 16-bit cache", mib(result["bytes_f16"])),
        ("bytes really held", mib(result["bytes_held"])),
        ("ratio", f"{result['ratio']:.1f} x"),
        ("live tokens a lane", f"{result['live_tokens']:.1f}"),
        ("evicted tokens a lane", f"{result['evicted_tokens']:,.1f}"),
        ("slots reused in place", f"{result['slots_reused']:,}"),
        ("thought segments", _thoughts(result["thoughts"])),
        ("KL to the exact cache", f"{result['kl']:.4f}"),
        ("top-1 agreement", f"{100 * result['top1']:.1f} %"),
    ]


def pool_rows(pool: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("backend", pool["backend"]),
        ("bytes in the pool", mib(pool["bytes_total"])),
        ("bytes held at the peak", mib(pool["bytes_peak"])),
        ("bytes held afterwards", f"{pool['bytes_held_after']:,} B"),
    ]


def render(results: list[dict[str, Any]], pool: dict[str, Any]) -> str:
    columns = [process_rows(result) for result in results]
    names = [name for name, _ in columns[0]]
    cells = [["", *(result["name"] for result in results)]]
    cells += [[name, *(column[row][1] for column in columns)] for row, name in enumerate(names)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip()
             for line in cells]
    rule = "-" * max(len(line) for line in lines)
    table = [rule, lines[0], rule, *lines[1:], rule, "pool"]
    table += [f"  {name.ljust(widths[0])}{value}" for name, value in pool_rows(pool)]
    return "\n".join([*table, rule])


RESULT_KEYS = ("name", "tokens", "tokens_per_s", "bytes_f16", "bytes_held", "ratio", "live_tokens",
               "evicted_tokens", "slots_reused", "thoughts", "kl", "top1", "text")
POOL_KEYS = ("backend", "bytes_total", "bytes_peak", "bytes_held_after")


def as_json(results: list[dict[str, Any]], pool: dict[str, Any]) -> dict[str, Any]:
    """The schema of --json: exactly these keys."""
    return {
        "processes": [{key: result[key] for key in RESULT_KEYS} for result in results],
        "pool": {key: pool[key] for key in POOL_KEYS},
    }
