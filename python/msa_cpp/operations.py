# SPDX-License-Identifier: Apache-2.0
"""One argument class per operation, with the fields of the C++ structs in include/msa/ops.hpp, whose
comments are the contract. Shapes are logical: arrays may be strided. float: any of float32, float16,
bfloat16 and (reference backend) float64; float8_e4m3fn where it says so."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ._arrays import Array


@dataclass(frozen=True)
class Problem:
    """What is fixed for a model; the defaults are MiniMax-M3's."""

    num_q_heads: int = 64
    num_kv_heads: int = 4  #: Also the number of index query heads; divides num_q_heads.
    head_dim: int = 128  #: Of q, k and v.
    index_dim: int = 128  #: Of index_q and index_k.
    block_size: int = 128  #: Tokens per KV block, a power of two >= 16; also the page size.
    top_k: int = 16  #: Blocks attended per query, forced ones included.
    num_init_blocks: int = 0  #: First blocks of a sequence that are always selected.
    num_local_blocks: int = 1  #: Last visible blocks that are always selected, >= 1.

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Batch:
    """How packed tensors divide into sequences; Batch() is a single sequence.

    Ragged keys are [total_k, heads, dim] with cu_seqlens_k. Paged keys are [num_pages, heads,
    block_size, dim] with page_table and seq_lens_k. Without cu_seqlens_q every sequence has
    total_q / batch_size queries.
    """

    cu_seqlens_q: Array | None = None  #: int32 [batch_size + 1], from 0, ends with total_q.
    cu_seqlens_k: Array | None = None  #: int32 [batch_size + 1], from 0, ends with total_k.
    page_table: Array | None = None  #: int32 [batch_size, max_pages], page ids.
    seq_lens_k: Array | None = None  #: int32 [batch_size], the queries' own tokens included.
    max_seq_len_q: int = 0  #: Upper bound in tokens; 0: what the shapes allow.
    max_seq_len_k: int = 0  #: Upper bound in tokens; 0: what the shapes allow.


@dataclass
class Operation:
    """What every argument class has. The tensors of a call are all on one device."""

    #: Fields that run() writes to.
    outputs: ClassVar[tuple[str, ...]] = ()

    problem: Problem = field(default_factory=Problem)
    batch: Batch = field(default_factory=Batch)

    @classmethod
    @functools.cache
    def scalar_names(cls) -> tuple[str, ...]:
        """Names of the fields that are numbers."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.type == "float")

    @classmethod
    @functools.cache
    def tensor_names(cls) -> tuple[str, ...]:
        """Names of the fields that are arrays, those of `batch` excepted."""
        skipped = ("problem", "batch", *cls.scalar_names())
        return tuple(f.name for f in dataclasses.fields(cls) if f.name not in skipped)

    def tensors(self) -> dict[str, Any]:
        """The given arrays of this request and its batch, by name."""
        given = {name: getattr(self, name) for name in self.tensor_names()}
        for name in ("cu_seqlens_q", "cu_seqlens_k", "page_table", "seq_lens_k"):
            given[name] = getattr(self.batch, name)
        return {name: array for name, array in given.items() if array is not None}


@dataclass
class IndexerScores(Operation):
    """Index Branch scores, max-pooled over the visible tokens of each block (paper eqs 5-6)."""

    outputs: ClassVar[tuple[str, ...]] = ("block_scores",)

    index_q: Array | None = None  #: float or e4m3 [total_q, num_kv_heads, index_dim]
    index_k: Array | None = None  #: [total_k, 1, index_dim] or [num_pages, 1, block_size, index_dim]
    index_scale: float = 0.0  #: 0 means 1 / sqrt(index_dim).
    block_scores: Array | None = None  #: float32 [num_kv_heads, total_q, num_blocks]; -inf: unseen.


@dataclass
class SelectTopK(Operation):
    """The top_k blocks of each row (paper eq 7): forced blocks first, the rest by score."""

    outputs: ClassVar[tuple[str, ...]] = ("block_ids",)

    block_scores: Array | None = None  #: float32 [num_kv_heads, total_q, num_blocks]
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k], ascending, then -1.


@dataclass
class Indexer(Operation):
    """IndexerScores and SelectTopK in one; block scores are never stored for a whole prompt."""

    outputs: ClassVar[tuple[str, ...]] = ("block_ids",)

    index_q: Array | None = None  #: float or e4m3 [total_q, num_kv_heads, index_dim]
    index_k: Array | None = None  #: [total_k, 1, index_dim] or [num_pages, 1, block_size, index_dim]
    index_k_codes: Array | None = None  #: int8 [num_pages, 1, block_size, index_dim]; optional.
    index_k_scales: Array | None = None  #: bfloat16 [num_pages, 1, block_size, 2], with the codes.
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k], ascending, then -1.


@dataclass
class SparseAttentionForward(Operation):
    """Exact softmax attention over the selected blocks (paper eq 8)."""

    outputs: ClassVar[tuple[str, ...]] = ("out", "lse")

    q: Array | None = None  #: [total_q, num_q_heads, head_dim]
    k: Array | None = None  #: [total_k, num_kv_heads, head_dim] or paged; e4m3 too.
    v: Array | None = None  #: Shaped like k.
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k], unique in a row.
    softmax_scale: float = 0.0  #: 0 means 1 / sqrt(head_dim).
    out: Array | None = None  #: [total_q, num_q_heads, head_dim]
    lse: Array | None = None  #: float32 [total_q, num_q_heads], natural log; optional.
    k_scale: Array | None = None  #: float32 [num_kv_heads], what e4m3 keys are multiplied by.
    v_scale: Array | None = None  #: The same for v.


@dataclass
class IndexedAttentionForward(Operation):
    """Indexer, and then SparseAttentionForward on the blocks that it selects."""

    outputs: ClassVar[tuple[str, ...]] = ("block_ids", "out", "lse")

    index_q: Array | None = None  #: As in Indexer, and the next three.
    index_k: Array | None = None
    index_k_codes: Array | None = None
    index_k_scales: Array | None = None
    q: Array | None = None  #: As in SparseAttentionForward, and the next two.
    k: Array | None = None
    v: Array | None = None
    softmax_scale: float = 0.0  #: 0 means 1 / sqrt(head_dim).
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k], ascending, then -1.
    out: Array | None = None  #: [total_q, num_q_heads, head_dim]
    lse: Array | None = None  #: float32 [total_q, num_q_heads]; optional.
    k_scale: Array | None = None  #: As in SparseAttentionForward.
    v_scale: Array | None = None  #: As in SparseAttentionForward.


@dataclass
class DenseAttentionForward(Operation):
    """Causal attention over every visible token."""

    outputs: ClassVar[tuple[str, ...]] = ("out", "lse")

    q: Array | None = None  #: [total_q, num_q_heads, head_dim]
    k: Array | None = None  #: [total_k, num_kv_heads, head_dim] or paged; e4m3 too.
    v: Array | None = None  #: Shaped like k.
    softmax_scale: float = 0.0  #: 0 means 1 / sqrt(head_dim).
    out: Array | None = None  #: [total_q, num_q_heads, head_dim]
    lse: Array | None = None  #: float32 [total_q, num_q_heads], natural log; optional.
    k_scale: Array | None = None  #: As in SparseAttentionForward.
    v_scale: Array | None = None  #: As in SparseAttentionForward.


@dataclass
class SparseAttentionBackward(Operation):
    """Gradients of SparseAttentionForward, or of dense attention without block_ids. Ragged keys only."""

    outputs: ClassVar[tuple[str, ...]] = ("dq", "dk", "dv")

    q: Array | None = None  #: [total_q, num_q_heads, head_dim]
    k: Array | None = None  #: [total_k, num_kv_heads, head_dim]
    v: Array | None = None  #: [total_k, num_kv_heads, head_dim]
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k]; optional.
    out: Array | None = None  #: Of the forward pass.
    lse: Array | None = None  #: Of the forward pass, float32 or float64 [total_q, num_q_heads].
    dout: Array | None = None  #: [total_q, num_q_heads, head_dim]
    softmax_scale: float = 0.0  #: 0 means 1 / sqrt(head_dim).
    dq: Array | None = None  #: Shaped like q.
    dk: Array | None = None  #: Shaped like k.
    dv: Array | None = None  #: Shaped like v.


@dataclass
class IndexerKlBackward(Operation):
    """The KL alignment loss of one layer and its gradients (paper eqs 9-11), both scaled by
    loss_coefficient / (total_q * num_kv_heads). Ragged keys only."""

    outputs: ClassVar[tuple[str, ...]] = ("loss", "dindex_q", "dindex_k")

    q: Array | None = None  #: Teacher, [total_q, num_q_heads, head_dim]
    k: Array | None = None  #: Teacher, [total_k, num_kv_heads, head_dim]
    index_q: Array | None = None  #: Student, [total_q, num_kv_heads, index_dim]
    index_k: Array | None = None  #: Student, [total_k, 1, index_dim]
    block_ids: Array | None = None  #: int32 [num_kv_heads, total_q, top_k]; optional: all visible.
    softmax_scale: float = 0.0  #: 0 means 1 / sqrt(head_dim).
    index_scale: float = 0.0  #: 0 means 1 / sqrt(index_dim).
    loss_coefficient: float = 1.0  #: The paper's lambda.
    loss: Array | None = None  #: float32 or float64 [1]; optional.
    dindex_q: Array | None = None  #: Shaped like index_q; optional together with dindex_k.
    dindex_k: Array | None = None  #: Shaped like index_k.
    #: Of the teacher's forward pass over the same support, float32 or float64 [total_q, num_q_heads];
    #: optional: may spare a pass over the teacher's scores.
    lse: Array | None = None


@dataclass
class AppendKv(Operation):
    """Writes the newest tokens of each sequence into its pages. Each (new, pages) pair is optional."""

    outputs: ClassVar[tuple[str, ...]] = (
        "k_pages",
        "v_pages",
        "index_k_pages",
        "index_k_codes_pages",
        "index_k_scales_pages",
    )

    k: Array | None = None  #: [total_q, num_kv_heads, head_dim]
    v: Array | None = None  #: [total_q, num_kv_heads, head_dim]
    index_k: Array | None = None  #: [total_q, 1, index_dim]
    k_pages: Array | None = None  #: [num_pages, num_kv_heads, block_size, head_dim]
    v_pages: Array | None = None  #: [num_pages, num_kv_heads, block_size, head_dim]
    index_k_pages: Array | None = None  #: [num_pages, 1, block_size, index_dim]
    index_k_codes_pages: Array | None = None  #: int8 [num_pages, 1, block_size, index_dim]; optional.
    index_k_scales_pages: Array | None = None  #: bfloat16 [num_pages, 1, block_size, 2]; with codes.


@dataclass
class NormRopeAppendKv(Operation):
    """RMSNorm of each head, rotary position embedding, quantisation and AppendKv in one pass."""

    outputs: ClassVar[tuple[str, ...]] = (
        "q_out",
        "index_q_out",
        "k_pages",
        "v_pages",
        "index_k_pages",
        "index_k_codes_pages",
        "index_k_scales_pages",
    )

    q: Array | None = None  #: [total_q, num_q_heads, head_dim]; inputs are float32, float16 or bfloat16.
    k: Array | None = None  #: [total_q, num_kv_heads, head_dim]
    v: Array | None = None  #: [total_q, num_kv_heads, head_dim]
    index_q: Array | None = None  #: [total_q, num_kv_heads, index_dim]
    index_k: Array | None = None  #: [total_q, 1, index_dim]
    q_weight: Array | None = None  #: [head_dim]; optional: q is not normed.
    k_weight: Array | None = None  #: [head_dim]; optional.
    index_q_weight: Array | None = None  #: [index_dim]; optional.
    index_k_weight: Array | None = None  #: [index_dim]; optional.
    norm_eps: float = 1e-6  #: Added to the mean of squares.
    norm_weight_offset: float = 0.0  #: 1 for weights trained as 1 + weight (Gemma, MiniMax-M3).
    cos_sin: Array | None = None  #: [max_positions, rotary_dim]: cosines, then sines; optional.
    positions: Array | None = None  #: int32 [total_q], rows of cos_sin; optional: where appended.
    q_out: Array | None = None  #: Shaped like q, and may be q itself.
    index_q_out: Array | None = None  #: Shaped like index_q, and may be index_q itself.
    k_pages: Array | None = None  #: [num_pages, num_kv_heads, block_size, head_dim]; e4m3 too.
    v_pages: Array | None = None  #: [num_pages, num_kv_heads, block_size, head_dim]; e4m3 too.
    index_k_pages: Array | None = None  #: [num_pages, 1, block_size, index_dim]; e4m3 too.
    index_k_codes_pages: Array | None = None  #: As in AppendKv.
    index_k_scales_pages: Array | None = None  #: As in AppendKv.
    k_scale: Array | None = None  #: float32 [num_kv_heads]: e4m3 k_pages hold key / scale.
    v_scale: Array | None = None  #: The same for v_pages.
