"""The tensors that the peers of one case read, made when first asked for."""

from __future__ import annotations

import torch

from .cases import HELD_BYTES_MAX, Case
from .timing import rotation

PAGE = 16  # tokens of a page of the paged peers


class Store:
    """copies: how many of each cache rotate, by the size of the bf16 one."""

    def __init__(self, case: Case, notes: dict[str, str]) -> None:
        self.case = case
        self.notes = notes
        self.copies = rotation(case.bf16_bytes())
        self.q = torch.randn(case.batch, case.q_heads, case.head_dim, device="cuda",
                             dtype=torch.bfloat16)
        self.lengths = case.lengths()
        self._contiguous: tuple[torch.Tensor, torch.Tensor] | None = None
        self._paged: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fp8: tuple[torch.Tensor, torch.Tensor] | None = None
        self._table: torch.Tensor | None = None
        self.keep: list[object] = []  # what the graphs of this case use
        self.held = 0

    def _random(self, *shape: int) -> torch.Tensor:
        self.held += 2 * torch.Size(shape).numel()
        if self.held > HELD_BYTES_MAX:
            raise MemoryError(f"would hold more than {HELD_BYTES_MAX / 1e9:.0f} GB")
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def contiguous(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V: [copies, batch, kv heads, tokens, head_dim]."""
        if self._contiguous is None:
            case = self.case
            shape = (self.copies, case.batch, case.kv_heads, case.tokens, case.head_dim)
            self._contiguous = (self._random(*shape), self._random(*shape))
        return self._contiguous

    def pages_of(self, length: int) -> int:
        return -(-length // PAGE)

    @property
    def page_count(self) -> int:
        return sum(self.pages_of(n) for n in self.lengths)

    def paged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K, V: [copies, pages, PAGE, kv heads, head_dim]."""
        if self._paged is None:
            case = self.case
            shape = (self.copies, self.page_count, PAGE, case.kv_heads, case.head_dim)
            self._paged = (self._random(*shape), self._random(*shape))
        return self._paged

    def paged_fp8(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As paged() in e4m3; more copies where half the bytes ask for them."""
        if self._fp8 is None:
            k, v = self.paged()
            times = -(-rotation(self.case.bf16_bytes() // 2) // self.copies)
            kind = torch.float8_e4m3fn
            fp8 = [torch.cat([x.to(kind).view(torch.uint8)] * times).view(kind) for x in (k, v)]
            self._fp8 = (fp8[0], fp8[1])
        return self._fp8

    def order(self) -> torch.Tensor:
        """Page numbers in random order, sequence after sequence."""
        if self._table is None:
            generator = torch.Generator().manual_seed(7)
            self._table = torch.randperm(self.page_count, generator=generator).int()
        return self._table

    def table(self) -> torch.Tensor:
        """[batch, most pages of a sequence] on the device, 0 where a sequence has no page."""
        counts = [self.pages_of(n) for n in self.lengths]
        table = torch.zeros(self.case.batch, max(counts), dtype=torch.int32)
        for row, part in enumerate(self.order().split(counts)):
            table[row, :len(part)] = part
        return table.cuda()

    def live_bits(self) -> torch.Tensor:
        """[batch, tokens], the same share of each sequence dead, at random places."""
        case = self.case
        live = max(1, round(case.tokens * case.live))
        bits = torch.zeros(case.batch, case.tokens, dtype=torch.bool, device="cuda")
        ranks = torch.rand(case.batch, case.tokens, device="cuda").argsort(1)
        return bits.scatter_(1, ranks[:, :live], True)

    def live_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Paged K, V as [copies, rows, kv heads, head_dim] and the rows of live tokens."""
        case = self.case
        k, v = self.paged()
        flat = [x.view(self.copies, -1, case.kv_heads, case.head_dim) for x in (k, v)]
        token = torch.arange(case.tokens, device="cuda")
        rows = self.table().long()[:, token // PAGE] * PAGE + token % PAGE
        return flat[0], flat[1], rows[self.live_bits()]

    def free(self) -> None:
        self._contiguous = self._paged = self._fp8 = None
        self.keep.clear()
