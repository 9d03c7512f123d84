"""What bounds a decode step: weights, KV bytes or the matrix products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    bytes_per_s: float  # streaming read, measured in the same run
    flops_per_s: float  # bf16 matrix product of 8192 x 8192 x 8192, measured in the same run


@dataclass(frozen=True)
class Step:
    weight_bytes: float  # read by every step
    kv_bytes: float      # live bytes read by a step
    flops: float         # of the matrix products, attention apart


def floors_ms(step: Step, machine: Machine) -> dict[str, float]:
    """The least milliseconds of each term. Weights and gemm overlap: both belong to the matrix
    products, which take the larger of the two."""
    return {"weights": step.weight_bytes / machine.bytes_per_s * 1e3,
            "kv bytes": step.kv_bytes / machine.bytes_per_s * 1e3,
            "gemm": step.flops / machine.flops_per_s * 1e3}


def bound_by(step: Step, machine: Machine) -> str:
    floors = floors_ms(step, machine)
    return max(floors, key=lambda name: floors[name])
