"""bench kernels --resources: what the compiler made of each of our kernels, for one architecture.

What spills is in local memory: a stack, LDL and STL among the opcodes. Shared bytes are the static
ones; what a launch asks for besides is not in the binary. Instruction counts are of the code as it
stands, so unrolled tiles count as often as they are written.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from . import library

OPCODES = ("HMMA", "LDS", "LDSM", "LOP3", "SHF", "PRMT", "IMAD", "IADD3", "HFMA2", "HMUL2", "FMUL",
           "FFMA", "FADD", "MUFU", "F2F", "SHFL", "MOVM", "LDG", "STG", "LDL", "STL", "SYNCS",
           "UBLKCP", "LDGSTS", "BAR")
FUNCTION = re.compile(r"^\s*Function\s*:?\s*([\w$.]+)\s*:?\s*$")
USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def _tool(name: str) -> str:
    """On the PATH, of the toolkit, or of triton, which brings its own."""
    triton = importlib.util.find_spec("triton")
    folders = [Path("/usr/local/cuda/bin")]
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for found in (shutil.which(name), *(folder / name for folder in folders)):
        if found and Path(found).exists():
            return str(found)
    raise library.Unavailable(f"{name} is not installed: it comes with the CUDA toolkit and with "
                              "triton")


def _lines(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise library.Unavailable(f"{command[0]}: {done.stderr.strip()[-300:]}")
    return done.stdout.splitlines()


def parse_usage(lines: list[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in lines:
        function, usage = FUNCTION.match(line), USAGE.search(line)
        if function:
            name = function.group(1)
        elif usage and name:
            registers, stack, shared, local = map(int, usage.groups())
            found[name] = {"registers": registers, "stack": stack, "shared": shared,
                           "local": local}
    return found


def parse_sass(lines: list[str]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    name = ""
    for line in lines:
        function, instruction = FUNCTION.match(line), INSTRUCTION.match(line)
        if function:
            name = function.group(1)
            found[name] = Counter()
        elif instruction and name:
            found[name][instruction.group(1)] += 1
    return found


def _readable(names: list[str]) -> dict[str, str]:
    filt = shutil.which("cu++filt") or shutil.which("c++filt") or "/usr/local/cuda/bin/cu++filt"
    if not Path(filt).exists():
        return {name: name for name in names}
    plain = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True,
                           timeout=60).stdout.splitlines()
    short = [re.sub(r"^void |thinkv::(cuda|bench)::|\(anonymous namespace\)::|<unnamed>::", "",
                    re.sub(r"\(thinkv::[^()]*\)$|\([^()]*\)$", "", text)) for text in plain]
    return dict(zip(names, short)) if len(short) == len(names) else {n: n for n in names}


def collect(paths: list[Path]) -> list[dict[str, object]]:
    dump = _tool("cuobjdump")
    usage: dict[str, dict[str, int]] = {}
    sass: dict[str, Counter[str]] = {}
    for path in paths:
        usage |= parse_usage(_lines(dump, "--dump-resource-usage", str(path)))
        sass |= parse_sass(_lines(dump, "--dump-sass", str(path)))
    readable = _readable(list(usage))
    rows = []
    for name, numbers in usage.items():
        counts = sass.get(name, Counter())
        rows.append({"kernel": readable[name], **numbers, "instructions": sum(counts.values()),
                     "opcodes": {code: counts[code] for code in OPCODES if counts[code]}})
    return sorted(rows, key=lambda row: str(row["kernel"]))


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| kernel | registers | stack | local | static shared | instructions | opcodes |",
             "| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    for row in rows:
        opcodes = row["opcodes"]
        assert isinstance(opcodes, dict)
        text = " ".join(f"{code} {count}" for code, count in opcodes.items())
        lines.append(f"| `{row['kernel']}` | {row['registers']} | {row['stack']} | {row['local']} "
                     f"| {row['shared']} | {row['instructions']} | {text} |")
    return "\n".join(lines)


def _architecture() -> str:
    try:
        return library.architecture()
    except (ImportError, RuntimeError, AssertionError):
        return "90"


def main(json_path: str | None, arch: str | None) -> int:
    try:
        rows = collect(library.compile_sources("kernels", arch or _architecture()))
    except library.Unavailable as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 77
    print(table(rows))
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0
