"""The models of the pool that one transformers model is made of, and how a sequence is opened."""

from __future__ import annotations

import torch

from .. import _client as core
from .._batch import Batch
from .._errors import UnsupportedError
from ._plan import Group, Plan

# Sliding layers are exact: 16 bits, and what falls out of the window is trimmed.
_EXACT = "full-f16"


class PoolModels:
    """Shared by the caches of one transformers model; closes its client with the last of them."""

    def __init__(
        self,
        plan: Plan,
        policy: str,
        budget: int | None,
        client: core.Client | None,
        socket: str | None,
        name: str,
    ) -> None:
        self.plan = plan
        self.policy = policy
        self.budget = budget
        self._owns_client = client is None
        self.client = core.Client(socket, name=name) if client is None else client
        if self.client.backend != "cuda":
            self.close()
            raise UnsupportedError(
                f"thinkvd's pool is on the {self.client.backend} backend, and this cache needs one "
                "on the GPU: start thinkvd with pool: {backend: cuda}"
            )
        dtype = "bfloat16" if plan.dtype == torch.bfloat16 else "float16"
        self.models = [
            self.client.model(
                layers=len(group.layers),
                q_heads=group.shape.q_heads,
                kv_heads=group.shape.kv_heads,
                head_dim=group.shape.head_dim,
                dtype=dtype,
                softmax_scale=group.shape.scale,
                name=name + ("" if group.shape.window == 0 else f" window {group.shape.window}"),
            )
            for group in plan.groups
        ]
        # The policy's name is checked now rather than in the middle of a prompt.
        for i in range(len(plan.groups)):
            self.open(i).close()

    def group(self, i: int) -> Group:
        return self.plan.groups[i]

    def open(self, i: int) -> core.Sequence:
        """A sequence of group i."""
        if self.group(i).shape.window:
            return self.models[i].sequence(policy=_EXACT)
        return self.models[i].sequence(policy=self.policy, budget=self.budget)

    def batch(self, i: int, capacity: int, tokens_max: int, grows: bool) -> Batch:
        """A batch of group i that is ready for sequences of its policy, whenever they come."""
        batch = self.models[i].batch(capacity, tokens_max, grows=grows)
        # What a batch measures is settled by the sequences that join before its first step.
        with self.open(i) as first:
            batch.join(0, first)
            batch.leave(0)
        return batch

    def close(self) -> None:
        if self._owns_client:
            self.client.close()
