"""Whether the quickstart can use a GPU: a Python with torch that sees one, and a library with the
kernels."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROBE = ("import torch, transformers, tokenizers, gguf, sys;"
         "sys.exit(0 if torch.cuda.is_available() else 'torch sees no GPU')")
PROBE_S = 120.0  # the first import of torch on a cold disk


@dataclasses.dataclass(frozen=True)
class GpuEngine:
    """What a worker on the GPU runs with."""

    python: str
    bin_dir: pathlib.Path
    library: pathlib.Path
    model: pathlib.Path

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT / "tools"), str(ROOT / "client" / "python")]
        paths += filter(None, [os.environ.get("PYTHONPATH")])  # torch may lie there
        return {"PYTHONPATH": os.pathsep.join(paths), "THINKV_LIBRARY": str(self.library),
                "THINKV_MODEL": str(self.model)}


class NoGpu(RuntimeError):
    """Why not, for a person."""


def find_gpu() -> GpuEngine:
    """THINKV_TORCH_PYTHON, else this Python, else python3; the build of THINKV_BIN_DIR and
    THINKV_LIB_DIR, else build/cuda. Raises NoGpu."""
    bin_dir = pathlib.Path(os.environ.get("THINKV_BIN_DIR", ROOT / "build" / "cuda" / "bin"))
    library = pathlib.Path(os.environ.get("THINKV_LIB_DIR", ROOT / "build" / "cuda" / "lib"))
    library /= "libthinkv.so"
    for path in (bin_dir / "thinkvd", library):
        if not path.is_file():
            raise NoGpu(f"{path} is not there: build the preset cuda (tools/dev build cuda)")
    from .gguf_weights import WeightsError, find_model  # needs gguf, which --help does not have

    try:
        model = find_model()
    except WeightsError as error:
        raise NoGpu(str(error)) from error
    return GpuEngine(_python(), bin_dir, library, model)


def _python() -> str:
    named = os.environ.get("THINKV_TORCH_PYTHON")
    reason = ""
    for python in [named] if named else [sys.executable, "python3"]:
        try:
            done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True,
                                  timeout=PROBE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if done.returncode == 0:
            return python
        reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    raise NoGpu("no Python with torch, transformers, tokenizers and gguf that sees a GPU "
                f"({reason}); THINKV_TORCH_PYTHON names one")
