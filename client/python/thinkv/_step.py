"""Step: the whole decode step of a transformers model, captured once and replayed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .transformers import ThinkvCache


class Step:
    """One token for every row of a cache, for engines that own their loop.

        cache = ThinkvCache(model, policy="thinkv", rows=32, tokens_max=4096)
        step = thinkv.Step(model, cache)
        step.join(0, prompt_ids)    # runs the prompt; step.tokens[0] is its first answer token
        tokens = step()             # [rows]: the next token of every row
        step.leave(0)

    The model's forward pass, the pool's kernels and the choice of the tokens are one CUDA graph; a
    call reserves pages on the host and replays it, and nothing waits for the GPU. Rows join and
    leave between calls; the values of empty rows mean nothing.

    choose: from logits [rows, vocabulary] the tokens [rows], without waiting for the GPU and
    without changing its shapes; default: the likeliest. graph=False: every call launches what the
    graph would hold, for models whose forward pass waits for the GPU (most mixtures of experts).

    tokens and logits are overwritten by the next call. Calls must not overlap."""

    def __init__(
        self,
        model: Any,
        cache: ThinkvCache,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
        graph: bool = True,
    ) -> None:
        torch = sys.modules["torch"]
        rows = cache._rows
        if rows.capacity is None:
            raise ValueError("the cache must be made for rows: ThinkvCache(model, ..., rows=32)")
        if any(sequence is not None for group in rows.sequences for sequence in group):
            raise ValueError("make the Step before sequences join the cache's rows")
        self.model, self.cache = model, cache
        self._rows = rows
        self._choose = choose or (lambda logits: logits.argmax(-1))
        device = next(model.parameters()).device
        self.tokens = torch.zeros(rows.capacity, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)  # of the tokens to come
        self.logits: torch.Tensor | None = None  # [rows, vocabulary] that the tokens came from
        self._graph: Any = None
        with torch.no_grad():
            if graph:
                self._capture(torch)
            else:
                rows.open_batches()

    def _capture(self, torch: Any) -> None:
        rows = self._rows
        rows.reserves = False  # the graph holds kernels only
        rows.open_batches()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries make their workspaces on the first runs
            for _ in range(2):
                rows.reserve()
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
        self._graph = graph
        self.positions.zero_()
        self.tokens.zero_()
        rows.restart()

    def _forward(self) -> None:
        out = self.model(
            input_ids=self.tokens[:, None],
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = out.logits[:, -1]
        self.tokens.copy_(self._choose(self.logits))
        self.positions.add_(1)

    def __call__(self) -> torch.Tensor:
        """Result: `tokens`. Raises ExhaustedError, QuotaExceededError, UnavailableError, and then
        nothing has changed: let a row leave, or try again later."""
        torch = sys.modules["torch"]
        if self._graph is None:
            with torch.no_grad():
                self._forward()
            return self.tokens
        self._rows.reserve()
        self._graph.replay()
        self._rows.count_step()
        return self.tokens

    def join(self, row: int, prompt: torch.Tensor | Sequence[int]) -> None:
        """Runs the model over the prompt's token ids [tokens] and lets the sequence into a free
        row; tokens[row] is its first token then. Raises as a call does, and nothing has changed
        then."""
        torch = sys.modules["torch"]
        ids = torch.as_tensor(prompt, device=self.tokens.device).reshape(1, -1)
        cache = self.cache.prompt()
        with torch.no_grad():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._last())
            self.cache.join(row, cache)
            self.tokens[row : row + 1] = self._choose(out.logits[:, -1])
            self.positions[row] = ids.shape[1]

    def _last(self) -> dict[str, int]:
        """Only the last token's logits, where the model can: a prompt's are large."""
        asked = getattr(self.model, "_supports_logits_to_keep", None)
        return {"logits_to_keep": 1} if asked is not None and asked() else {}

    def leave(self, row: int) -> None:
        """Closes the sequence of a row."""
        self.cache.leave(row)
        self.tokens[row] = 0
        self.positions[row] = 0
