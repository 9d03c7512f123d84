"""FlashInfer's BatchDecodeWithPagedKVCacheWrapper, bf16 and fp8, with and without tensor cores.

It compiles each (type, head_dim, path) with nvcc when first used; build_all() does that in
processes of their own, side by side, before anything is timed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial
from typing import Any

import torch

from .cases import Case
from .library import TREE
from .store import PAGE, Store
from .timing import Launch

BUILD_SECONDS_MAX = 420
WORKSPACE_BYTES = 256 << 20
_workspace: list[torch.Tensor] = []


def missing() -> str | None:
    """Why FlashInfer cannot run, or None."""
    # Else apache-tvm-ffi compiles a torch extension on import, for minutes. It only makes calls
    # from Python cheaper, which graphs do not see.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # noqa: BLE001 - a broken install raises anything
        return (f"flashinfer is not importable ({type(error).__name__}: {error}); install "
                "flashinfer-python==0.5.3 apache-tvm-ffi==0.1.3 nvidia-cudnn-frontend==1.13.0")
    return None


def plan(case: Case, lengths: list[int], order: torch.Tensor, fp8: bool,
         tensor_cores: bool) -> Any:
    """A wrapper that is planned for these lengths; order: pages, sequence after sequence."""
    import flashinfer

    if not _workspace:
        _workspace.append(torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"))
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace[0], "NHD", use_tensor_cores=tensor_cores)
    counts = torch.tensor([0] + [-(-n // PAGE) for n in lengths], dtype=torch.int32)
    last = torch.tensor([(n - 1) % PAGE + 1 for n in lengths], dtype=torch.int32)
    wrapper.plan(counts.cumsum(0).int().cuda(), order.cuda(), last.cuda(), case.q_heads,
                 case.kv_heads, case.head_dim, PAGE, q_data_type=torch.bfloat16,
                 kv_data_type=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    return wrapper


def flashinfer_decode(name: str, case: Case, store: Store) -> list[Launch]:
    """name: flashinfer-bf16, -fp8, each with or without -tc."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    fp8 = "fp8" in name
    wrapper = plan(case, store.lengths, store.order(), fp8, name.endswith("-tc"))
    k, v = store.paged_fp8() if fp8 else store.paged()
    out = torch.empty_like(store.q)
    return [partial(wrapper.run, store.q, (k[i], v[i]), out=out) for i in range(len(k))]


def variants(cases: list[Case]) -> list[tuple[str, int]]:
    dims = sorted({case.head_dim for case in cases})
    return [(name, dim) for dim in dims for name in
            ("flashinfer-bf16", "flashinfer-bf16-tc", "flashinfer-fp8", "flashinfer-fp8-tc")]


def build_all(wanted: list[tuple[str, int]]) -> dict[str, str]:
    """Compiles the variants in parallel. Result: what failed, by variant."""
    running = {(name, dim): subprocess.Popen(
        [sys.executable, "-m", __spec__.name, name, str(dim)], cwd=TREE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for name, dim in wanted}
    failed = {}
    for (name, dim), process in running.items():
        try:
            _, text = process.communicate(timeout=BUILD_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            text = f"not built within {BUILD_SECONDS_MAX} s"
        if process.returncode != 0:
            failed[f"{name} head_dim {dim}"] = text[-500:]
    return failed


def _build_one(name: str, head_dim: int) -> None:
    case = Case(8, 2, head_dim, 2, 64)
    store = Store(case, {})
    store.copies = 1
    for launch in flashinfer_decode(name, case, store)[:1]:
        launch()
    torch.cuda.synchronize()


if __name__ == "__main__":
    _build_one(sys.argv[1], int(sys.argv[2]))
