"""Sequences with KV in pages, attended to by the Triton kernels and by the reference."""

import torch

from benchmarks.gpu_check.report import Report
from common.engine.batch import Batch
from common.engine.cache import KVCache
from common.engine.config import RopeConfig
from common.engine.kernels.reference import ReferenceOps, read_kv
from common.engine.kernels.triton.ops import TritonOps
from common.engine.kernels.triton.prefill_attention import prefill_attention
from common.engine.layers import rope_table
from common.kv.layout import KVLayout

BLOCK = 16


class Paged:
    """One layer's cache for each window; every byte that no token has is NaN.

    outliers  two channels of every head of Q and K are so many times as large as the others
    """

    def __init__(
        self,
        report: Report,
        heads: int,
        kv_heads: int,
        d: int,
        kv_dtype: str,
        windows: list[int | None],
        *,
        batch_invariant: bool = False,
        rotate_qk: bool = False,
        outliers: float = 1.0,
    ) -> None:
        self.report = report
        self.rotate_qk, self.outliers = rotate_qk, outliers
        self.heads, self.windows = heads, windows
        # The interpreter cannot do bfloat16, the pages nothing between it and float32.
        self.dtype = torch.bfloat16 if report.gpu else torch.float32
        self.layout = KVLayout(len(windows), kv_heads, d, BLOCK, kv_dtype)
        self.ops = TritonOps(
            report.device,
            batch_invariant=batch_invariant,
            rotate_qk=rotate_qk,
            multiprocessors=None if report.gpu else 1,
        )
        tables = rope_table(RopeConfig(), d, 8192)
        self.rope = tables[0].to(report.device), tables[1].to(report.device)

    def batch(self, sizes: list[tuple[int, int]]) -> tuple[Batch, int]:
        """Sequences of (context, queries of this step), blocks in any order; blocks needed."""
        blocks = 1 + sum(-(-context // BLOCK) for context, _ in sizes)
        free = (1 + torch.randperm(blocks - 1)).tolist()
        tables, positions, slots, starts = [], [], [], [0]
        for context, queries in sizes:
            table = [free.pop() for _ in range(-(-context // BLOCK))]
            tables.append(table)
            chosen = range(context - min(queries, context), context)
            positions += chosen
            slots += [table[p // BLOCK] * BLOCK + p % BLOCK for p in chosen]
            starts.append(len(positions))
        width = max(map(len, tables))
        padded = [table + [-1] * (width - len(table)) for table in tables]
        device = self.report.device
        return Batch(
            token_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            query_start=tuple(starts),
            context_len=tuple(context for context, _ in sizes),
            block_table=torch.tensor(padded, dtype=torch.int32, device=device),
            logit_rows=torch.arange(len(positions), device=device),
        ), blocks

    def cache(self, blocks: int) -> KVCache:
        cache = KVCache(self.layout, blocks, self.report.device)
        cache.data.fill_(0xFF)
        return cache

    def step(self, ops: TritonOps | ReferenceOps, batch: Batch, cache: KVCache) -> object:
        return ops.prepare(batch, cache, self.heads, tuple(self.windows), self.rope)

    def qkv(self, n: int) -> torch.Tensor:
        kv_heads = self.layout.num_kv_heads
        qkv = self.report.random(
            n, self.heads + 2 * kv_heads, self.layout.head_dim, dtype=self.dtype
        )
        qkv[:, :-kv_heads, :2] *= self.outliers
        return qkv

    def attend(
        self, sizes: list[tuple[int, int]], fp8_products: bool = False
    ) -> list[tuple[int | None, torch.Tensor, torch.Tensor]]:
        """Window, result and the reference's result, for each window. The tokens before the
        step's are written first, by a step of their own.

        fp8_products  the option of `prefill_attention`
        """
        sizes = [(context, min(queries, context)) for context, queries in sizes]
        batch, blocks = self.batch(sizes)
        before, _ = self.batch([(context, context) for context, _ in sizes])
        table = batch.block_table.tolist()
        slots = [
            table[i][p // BLOCK] * BLOCK + p % BLOCK
            for i, (context, _) in enumerate(sizes)
            for p in range(context)
        ]
        slot_mapping = torch.tensor(slots, device=self.report.device)
        before.slot_mapping.copy_(slot_mapping)
        cache, results = self.cache(blocks), []
        reference = ReferenceOps(self.rotate_qk)
        for layer, window in enumerate(self.windows):
            self.ops.write_kv(
                self.qkv(len(slots)), cache, layer, self.step(self.ops, before, cache)
            )
            qkv = self.qkv(len(batch.positions))
            wide = self.cache(blocks)
            wide.data.copy_(cache.data)
            step = self.step(self.ops, batch, cache)
            q = self.ops.write_kv(qkv.clone(), cache, layer, step)
            if fp8_products:
                actual = self.multiply_e4m3(q, cache, layer, batch)
            else:
                actual = self.ops.attention(q, cache, layer, step)
            step = self.step(reference, batch, wide)
            # Pages as the reference writes them from the same rows, read in float32.
            q = reference.write_kv(qkv.clone(), wide, layer, step)
            results.append((window, actual, reference.attention(q.float(), wide, layer, step)))
        return results

    def multiply_e4m3(
        self, q: torch.Tensor, cache: KVCache, layer: int, batch: Batch
    ) -> torch.Tensor:
        lengths = (batch.query_start, batch.context_len)
        start, context = (
            torch.tensor(x, dtype=torch.int32, device=self.report.device) for x in lengths
        )
        return prefill_attention(
            q, cache.payload[layer], cache.scales[layer], batch.block_table, start, context,
            scale=q.shape[-1] ** -0.5, window=self.windows[layer], fp8_products=True,
        )  # fmt: skip

    def written(
        self, tokens: int, qk_norm: tuple[torch.Tensor, float] | None
    ) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Q, K and V as the Triton kernel writes them, and as the reference does."""
        batch, blocks = self.batch([(tokens, tokens)])
        qkv, told = self.qkv(tokens), []
        for ops in (self.ops, ReferenceOps(self.rotate_qk)):
            cache = self.cache(blocks)
            q = ops.write_kv(qkv.clone(), cache, 0, self.step(ops, batch, cache), qk_norm)
            kv = read_kv(cache, 0, batch.block_table[0].long(), torch.float32)
            told.append((q, *(x[:, :tokens] for x in kv)))
        return [(name, *pair) for name, *pair in zip("QKV", *told, strict=True)]

    def cut_and_whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last query of a prompt, computed by itself and with all the others."""
        context = 40 if self.report.tiny else 1000
        batch, blocks = self.batch([(context, context)])
        cache = self.cache(blocks)
        step = self.step(self.ops, batch, cache)
        q = self.ops.write_kv(self.qkv(context), cache, 0, step)
        whole = self.ops.attention(q, cache, 0, step)[-1:]
        last = Batch(
            token_ids=batch.token_ids[-1:],
            positions=batch.positions[-1:],
            slot_mapping=batch.slot_mapping[-1:],
            query_start=(0, 1),
            context_len=batch.context_len,
            block_table=batch.block_table,
            logit_rows=batch.logit_rows[:1],
        )
        return self.ops.attention(q[-1:], cache, 0, self.step(self.ops, last, cache)), whole
