"""Builds and loads the CUDA libraries of the benchmark."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[2]
FOLDER = Path(os.environ.get("THINKV_BENCH_LIB_DIR", TREE / "build" / "bench"))
# The attention kernel takes nvcc minutes on two cores.
BUILD_SECONDS_MAX = 900

KERNELS = TREE / "kernels" / "cuda"
SOURCES = {
    "stream": [HERE / "stream.cu"],
    # launch_attend and what it launches.
    "lanes": [HERE / "lanes.cu", *sorted(KERNELS.glob("attention*.cu")),
              *sorted(KERNELS.glob("emission*.cu")), KERNELS / "running_code.cu"],
    # All of ours, for a report of what the compiler made of them; never linked.
    "kernels": sorted(KERNELS.glob("*.cu")),
}


class Unavailable(Exception):
    """What is missing here; the text says what to do about it."""


def architecture() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


def nvcc() -> str:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise Unavailable("nvcc is not installed: install the CUDA toolkit (12.8 or newer), "
                          f"or carry prebuilt libraries in {FOLDER} (THINKV_BENCH_LIB_DIR)")
    return found


def path_of(name: str) -> Path:
    return FOLDER / f"libthinkv_bench_{name}.so"


def flags(arch: str) -> list[str]:
    return ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DTHINKV_HAVE_CUDA=1",
            "-Xcompiler", "-fPIC", f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{TREE}",
            f"-I{TREE / 'include'}"]


def newest_header() -> float:
    headers = [*HERE.glob("*.cuh"), *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"),
               *(TREE / "include" / "thinkv" / "internal").glob("*.h")]
    return max(header.stat().st_mtime for header in headers)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS_MAX)
    if done.returncode != 0:
        raise Unavailable(f"nvcc failed:\n{done.stderr[-2000:]}")


def compile_sources(name: str, arch: str) -> list[Path]:
    """Compiles what changed. Result: the objects."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    changed = newest_header()
    # Libraries share the objects of the sources that they have in common.
    objects = {source: FOLDER / f"{source.stem}_{arch}.o" for source in SOURCES[name]}
    stale = [source for source, made in objects.items() if not made.exists()
             or made.stat().st_mtime < max(changed, source.stat().st_mtime)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source: _run([nvcc(), "-c", *flags(arch), str(source), "-o",
                                           str(objects[source])]), stale))
    return list(objects.values())


def build(name: str, arch: str) -> Path:
    """Links what changed. A library in THINKV_BENCH_LIB_DIR is taken as it is."""
    target = path_of(name)
    if "THINKV_BENCH_LIB_DIR" in os.environ and target.exists():
        return target
    objects = compile_sources(name, arch)
    if not target.exists() or target.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        fresh = target.with_suffix(".new")
        _run([nvcc(), "-shared", *flags(arch), *map(str, objects), "-o", str(fresh)])
        fresh.replace(target)
    return target


@functools.cache
def load(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(name, architecture())))
