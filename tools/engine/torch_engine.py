"""A small inference engine on thinkvd's pool: continuous batching over one CUDA graph.

Nothing but the public API of `thinkv`: a cache with rows, a Step, and the errors that say when the
pool has no room. Sequences join and leave between steps; who may join is the pool's answer, and
when it runs short in the middle the youngest one waits and goes on later.

    tools/engine/run engine.torch_engine MODEL [--rows N] [--policy NAME] < prompts.txt

MODEL: a folder or name that transformers knows. One prompt a line; answers are streamed as
"number<TAB>text". Needs torch with CUDA, transformers, and thinkvd with a pool on the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

import thinkv
from thinkv.transformers import ThinkvCache

NO_ROOM = (thinkv.ExhaustedError, thinkv.QuotaExceededError)


@dataclass
class Request:
    """One prompt and its answer so far. on_token sees each token once, in order."""

    prompt: list[int]
    tokens_max: int
    on_token: Callable[[Request, int], None] = lambda request, token: None
    answer: list[int] = field(default_factory=list)
    error: Exception | None = None
    row: int | None = None


class Engine:
    """Rows of one model. Requests are submitted at any time between steps; run() or step()."""

    def __init__(
        self,
        model: torch.nn.Module,
        rows: int,
        *,
        policy: str = "thinkv",
        budget: int | None = None,
        socket: str | None = None,
        end_tokens: Iterable[int] = (),
        tokens_max: int = 0,
        graph: bool = True,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        model.set_attn_implementation("thinkv")
        self.cache = ThinkvCache(model, policy, budget, socket, rows=rows, tokens_max=tokens_max)
        self.decode = thinkv.Step(model, self.cache, choose, graph=graph)
        self.end_tokens = frozenset(end_tokens)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by row, the youngest last
        self.preempted = 0
        self._full = False  # somebody had to wait, and nobody has ended since
        self._free = list(range(rows - 1, -1, -1))
        self._host = torch.empty(rows, dtype=torch.int64, pin_memory=torch.cuda.is_available())

    def submit(self, request: Request) -> Request:
        self.waiting.append(request)
        return request

    def run(self) -> None:
        """Until every request has its answer, or its error."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> None:
        """Lets in who fits, and makes one token for every row."""
        self._admit()
        if not self.running:
            return
        try:
            tokens = self.decode()
        except NO_ROOM as error:
            self._make_room(error)
            return
        self._give({row: request for row, request in self.running.items()}, tokens)

    def close(self) -> None:
        self.cache.close()

    def _admit(self) -> None:
        while self.waiting and self._free and not self._full:
            request, row = self.waiting[0], self._free[-1]
            try:
                # What was generated before a pause is part of the prompt.
                self.decode.join(row, request.prompt + request.answer)
            except NO_ROOM as error:
                if self.running:
                    return  # somebody will leave
                self.waiting.popleft()
                request.error = error
                continue
            self.waiting.popleft()
            self._free.pop()
            request.row = row
            self.running[row] = request
            self._give({row: request}, self.decode.tokens)

    def _give(self, requests: dict[int, Request], tokens: torch.Tensor) -> None:
        """Hands out what the GPU chose; the one place that waits for it."""
        self._host.copy_(tokens)
        for row, request in requests.items():
            token = int(self._host[row])
            request.answer.append(token)
            request.on_token(request, token)
            if token in self.end_tokens or len(request.answer) >= request.tokens_max:
                self._leave(row)
                self._full = False

    def _make_room(self, error: Exception) -> None:
        """The youngest gives its pages back and waits; the only one left gets the error."""
        row, request = next(reversed(self.running.items()))
        self._full = len(self.running) > 1  # else it would come back at once, and leave again
        if not self._full:
            request.error = error
        else:
            self.preempted += 1
            self.waiting.appendleft(request)
        self._leave(row)

    def _leave(self, row: int) -> None:
        self.running.pop(row).row = None
        self.decode.leave(row)
        self._free.append(row)


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.torch_engine", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--policy", default="thinkv")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--socket")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).cuda().eval()
    ends = {tokenizer.eos_token_id} - {None}
    engine = Engine(model, options.rows, policy=options.policy, budget=options.budget,
                    socket=options.socket, end_tokens=ends)
    requests: list[Request] = []

    def show(request: Request, token: int) -> None:
        print(f"{requests.index(request)}\t{tokenizer.decode([token])}", flush=True)

    for line in sys.stdin:
        requests.append(engine.submit(Request(tokenizer(line.strip())["input_ids"],
                                              options.tokens, show)))
    engine.run()
    for number, request in enumerate(requests):
        if request.error is not None:
            print(f"{number}\t{request.error}", file=sys.stderr)
    engine.close()
    return 0 if all(request.error is None for request in requests) else 1


if __name__ == "__main__":
    sys.exit(main())
