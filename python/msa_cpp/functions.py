# SPDX-License-Identifier: Apache-2.0
"""One function per operation: allocates the outputs that are not given, plans and runs.

Arguments are the fields of the class of the same name in msa_cpp.operations; shapes and dtypes are
documented there. Common to all:

  out arguments   given arrays are written to and returned; optional ones can be turned off with False
  backend         name of an implementation, or None for the first that takes the request
  deterministic   bitwise repeatable results only
  workspace       contiguous int8 or uint8 array; without one it is allocated for the call
  stream          a CUDA stream; None: PyTorch's current one, or else the default stream

Outputs are of the library of the first array: PyTorch tensors on its device, JAX arrays, else numpy.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from ._arrays import Array, Place, dtype_of
from .operations import (
    AppendKv,
    Batch,
    DenseAttentionForward,
    IndexedAttentionForward,
    Indexer,
    IndexerKlBackward,
    IndexerScores,
    NormRopeAppendKv,
    Operation,
    Problem,
    SelectTopK,
    SparseAttentionBackward,
    SparseAttentionForward,
)
from .plans import execute, place_of

_M3 = Problem()
_ONE_SEQUENCE = Batch()
#: An optional output: an array to write to, None to allocate it, False to leave it out.
Output = Array | Literal[False] | None


class AttentionForward(NamedTuple):
    out: Any  #: [total_q, num_q_heads, head_dim]
    lse: Any  #: [total_q, num_q_heads], natural log, -inf for rows that see nothing; None if turned off.


class AttentionBackward(NamedTuple):
    dq: Any  #: Shaped like q.
    dk: Any  #: Shaped like k.
    dv: Any  #: Shaped like v.


class IndexerKl(NamedTuple):
    loss: Any  #: [1]; None if turned off.
    dindex_q: Any  #: Shaped like index_q; None if turned off.
    dindex_k: Any  #: Shaped like index_k; None if turned off.


class NormRope(NamedTuple):
    q_out: Any  #: Shaped like q; None without q.
    index_q_out: Any  #: Shaped like index_q; None without index_q.


def _wide(array: Array) -> str:
    """The dtype of a sum or a score over `array`."""
    return "f64" if dtype_of("q", array) == "f64" else "f32"


def _shape(name: str, array: Any) -> tuple[int, ...]:
    dtype_of(name, array)
    return tuple(int(n) for n in array.shape)


class _Call:
    """Allocates what an operation writes to, runs it, and hands its outputs out."""

    def __init__(self, args: Operation, stream: Any, options: dict[str, Any]) -> None:
        self.args = args
        self.place: Place = place_of(args, stream)
        self.options = options
        self.allocated: list[tuple[str, Any, str]] = []

    def output(self, name: str, given: Output, shape: Any, dtype: str) -> None:
        """Sets field `name` to `given`, or plans to allocate it."""
        if given is None:
            self.allocated.append((name, shape, dtype))
        elif given is not False:
            setattr(self.args, name, given)

    def run(self) -> None:
        with self.place.current():
            for name, shape, dtype in self.allocated:
                setattr(self.args, name, self.place.empty(shape, dtype))
            execute(self.args, self.place, **self.options)

    def result(self, name: str) -> Any:
        array = getattr(self.args, name)
        return None if array is None else self.place.finish(array)


def indexer_scores(
    index_q: Array,
    index_k: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    index_scale: float = 0.0,
    block_scores: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> Any:
    """Block scores, float32 [num_kv_heads, total_q, num_blocks]: the best visible token of each block.

    num_blocks is what the longest possible sequence has: batch.max_seq_len_k, or else the page table's
    columns, or else total_k. See msa_cpp.IndexerScores for shapes.
    """
    args = IndexerScores(problem, batch, index_q, index_k, index_scale)
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    if block_scores is None:
        if batch.page_table is not None:
            tokens = _shape("page_table", batch.page_table)[-1] * problem.block_size
        else:
            tokens = _shape("index_k", index_k)[0]
        if batch.max_seq_len_k > 0:
            tokens = min(tokens, batch.max_seq_len_k)
        shape = (problem.num_kv_heads, _shape("index_q", index_q)[0], -(-tokens // problem.block_size))
        call.output("block_scores", None, shape, _wide(index_q))
    else:
        args.block_scores = block_scores
    call.run()
    return call.result("block_scores")


def select_top_k(
    block_scores: Array,
    *,
    problem: Problem = _M3,
    batch: Batch,
    block_ids: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> Any:
    """Block ids, int32 [num_kv_heads, total_q, top_k], ascending, then -1.

    batch needs seq_lens_k or cu_seqlens_k: the local block depends on the key count.
    """
    args = SelectTopK(problem, batch, block_scores)
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    shape = (*_shape("block_scores", block_scores)[:2], problem.top_k)
    call.output("block_ids", block_ids, shape, "i32")
    call.run()
    return call.result("block_ids")


def indexer(
    index_q: Array,
    index_k: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    index_k_codes: Array | None = None,
    index_k_scales: Array | None = None,
    block_ids: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> Any:
    """Block ids, int32 [num_kv_heads, total_q, top_k], ascending, then -1: scores and selection in one.

    index_q: [total_q, num_kv_heads, index_dim]; index_k: [total_k, 1, index_dim], or paged.
    """
    args = Indexer(problem, batch, index_q, index_k, index_k_codes, index_k_scales)
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    shape = (problem.num_kv_heads, _shape("index_q", index_q)[0], problem.top_k)
    call.output("block_ids", block_ids, shape, "i32")
    call.run()
    return call.result("block_ids")


def sparse_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    block_ids: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    softmax_scale: float = 0.0,
    out: Array | None = None,
    lse: Output = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> AttentionForward:
    """Attention over the selected blocks.

    q: [total_q, num_q_heads, head_dim]; k, v: [total_k, num_kv_heads, head_dim], or paged
    [num_pages, num_kv_heads, block_size, head_dim]; block_ids: int32 [num_kv_heads, total_q, top_k].
    out has q's shape and dtype; lse is float32 [total_q, num_q_heads] (float64 for float64 q).
    """
    args = SparseAttentionForward(problem, batch, q, k, v, block_ids, softmax_scale)
    args.k_scale, args.v_scale = k_scale, v_scale
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    call.output("out", out, _shape("q", q), dtype_of("q", q))
    call.output("lse", lse, _shape("q", q)[:-1], _wide(q))
    call.run()
    return AttentionForward(call.result("out"), call.result("lse"))


def indexed_attention_forward(
    index_q: Array,
    index_k: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    index_k_codes: Array | None = None,
    index_k_scales: Array | None = None,
    softmax_scale: float = 0.0,
    block_ids: Array | None = None,
    out: Array | None = None,
    lse: Output = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> tuple[Any, AttentionForward]:
    """indexer(), then sparse_attention_forward() on its selection: block ids, and attention."""
    args = IndexedAttentionForward(problem, batch, index_q, index_k, index_k_codes, index_k_scales, q, k, v)
    args.softmax_scale, args.k_scale, args.v_scale = softmax_scale, k_scale, v_scale
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    shape = (problem.num_kv_heads, _shape("index_q", index_q)[0], problem.top_k)
    call.output("block_ids", block_ids, shape, "i32")
    call.output("out", out, _shape("q", q), dtype_of("q", q))
    call.output("lse", lse, _shape("q", q)[:-1], _wide(q))
    call.run()
    return call.result("block_ids"), AttentionForward(call.result("out"), call.result("lse"))


def dense_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    softmax_scale: float = 0.0,
    out: Array | None = None,
    lse: Output = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> AttentionForward:
    """Causal attention over every visible token; shapes as in sparse_attention_forward()."""
    args = DenseAttentionForward(problem, batch, q, k, v, softmax_scale)
    args.k_scale, args.v_scale = k_scale, v_scale
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    call.output("out", out, _shape("q", q), dtype_of("q", q))
    call.output("lse", lse, _shape("q", q)[:-1], _wide(q))
    call.run()
    return AttentionForward(call.result("out"), call.result("lse"))


def sparse_attention_backward(
    q: Array,
    k: Array,
    v: Array,
    block_ids: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    softmax_scale: float = 0.0,
    dq: Array | None = None,
    dk: Array | None = None,
    dv: Array | None = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> AttentionBackward:
    """Gradients of the attention with respect to q, k and v, of their shapes and dtypes.

    block_ids None: of dense attention (the warm-up stage). Ragged keys only.
    """
    args = SparseAttentionBackward(problem, batch, q, k, v, block_ids, out, lse, dout, softmax_scale)
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    for name, given, like in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        call.output(name, given, _shape(name[1:], like), dtype_of(name[1:], like))
    call.run()
    return AttentionBackward(call.result("dq"), call.result("dk"), call.result("dv"))


def indexer_kl_backward(
    q: Array,
    k: Array,
    index_q: Array,
    index_k: Array,
    block_ids: Array | None = None,
    *,
    problem: Problem = _M3,
    batch: Batch = _ONE_SEQUENCE,
    softmax_scale: float = 0.0,
    index_scale: float = 0.0,
    loss_coefficient: float = 1.0,
    lse: Array | None = None,
    loss: Output = None,
    dindex_q: Output = None,
    dindex_k: Output = None,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> IndexerKl:
    """The KL loss that aligns the index branch with the attention, and its gradients.

    block_ids None: on every visible token (the warm-up stage). The teacher, q and k, gets no gradient.
    lse: of its forward pass over the same support, if there was one; may spare a pass over its scores.
    loss is float32 [1] (float64 for float64 index_q); the gradients have the shapes and dtypes of
    index_q and index_k. Ragged keys only.
    """
    args = IndexerKlBackward(problem, batch, q, k, index_q, index_k, block_ids)
    args.softmax_scale, args.index_scale = softmax_scale, index_scale
    args.loss_coefficient, args.lse = loss_coefficient, lse
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    call.output("loss", loss, (1,), _wide(index_q))
    call.output("dindex_q", dindex_q, _shape("index_q", index_q), dtype_of("index_q", index_q))
    call.output("dindex_k", dindex_k, _shape("index_k", index_k), dtype_of("index_k", index_k))
    call.run()
    return IndexerKl(call.result("loss"), call.result("dindex_q"), call.result("dindex_k"))


def append_kv(
    *,
    k: Array | None = None,
    v: Array | None = None,
    index_k: Array | None = None,
    k_pages: Array | None = None,
    v_pages: Array | None = None,
    index_k_pages: Array | None = None,
    index_k_codes_pages: Array | None = None,
    index_k_scales_pages: Array | None = None,
    problem: Problem = _M3,
    batch: Batch,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> None:
    """Writes new keys, values and index keys into their pages, in place.

    batch needs page_table and seq_lens_k (the new tokens included). See msa_cpp.AppendKv for shapes.
    """
    args = AppendKv(problem, batch, k, v, index_k, k_pages, v_pages, index_k_pages)
    args.index_k_codes_pages, args.index_k_scales_pages = index_k_codes_pages, index_k_scales_pages
    _Call(
        args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace)
    ).run()


def norm_rope_append_kv(
    *,
    q: Array | None = None,
    k: Array | None = None,
    v: Array | None = None,
    index_q: Array | None = None,
    index_k: Array | None = None,
    q_weight: Array | None = None,
    k_weight: Array | None = None,
    index_q_weight: Array | None = None,
    index_k_weight: Array | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
    cos_sin: Array | None = None,
    positions: Array | None = None,
    q_out: Array | None = None,
    index_q_out: Array | None = None,
    k_pages: Array | None = None,
    v_pages: Array | None = None,
    index_k_pages: Array | None = None,
    index_k_codes_pages: Array | None = None,
    index_k_scales_pages: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    problem: Problem = _M3,
    batch: Batch,
    backend: str | None = None,
    deterministic: bool = True,
    workspace: Array | None = None,
    stream: Any = None,
) -> NormRope:
    """Norms and rotates each head, and appends keys and values to their pages, in place.

    q_out and index_q_out, of the shapes and dtypes of q and index_q, are allocated where q and index_q
    are given. See msa_cpp.NormRopeAppendKv for shapes and the exact arithmetic.
    """
    args = NormRopeAppendKv(problem, batch, q, k, v, index_q, index_k)
    args.q_weight, args.k_weight = q_weight, k_weight
    args.index_q_weight, args.index_k_weight = index_q_weight, index_k_weight
    args.norm_eps, args.norm_weight_offset = norm_eps, norm_weight_offset
    args.cos_sin, args.positions = cos_sin, positions
    args.k_pages, args.v_pages, args.index_k_pages = k_pages, v_pages, index_k_pages
    args.index_k_codes_pages, args.index_k_scales_pages = index_k_codes_pages, index_k_scales_pages
    args.k_scale, args.v_scale = k_scale, v_scale
    call = _Call(args, stream, dict(backend=backend, deterministic=deterministic, workspace=workspace))
    if q is not None:
        call.output("q_out", q_out, _shape("q", q), dtype_of("q", q))
    if index_q is not None:
        shape, dtype = _shape("index_q", index_q), dtype_of("index_q", index_q)
        call.output("index_q_out", index_q_out, shape, dtype)
    call.run()
    return NormRope(call.result("q_out"), call.result("index_q_out"))
