# SPDX-License-Identifier: Apache-2.0
"""torch.library operators over the library's operations, with fake kernels and autograd."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from .. import functions
from ..operations import Batch, Problem

# The schemas of custom operators are read from annotations, hence Optional[...] and flat arguments.
# ruff: noqa: UP045


def _batch(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    seq_lens_k: Tensor | None,
    max_seq_len_q: int,
    max_seq_len_k: int,
) -> Batch:
    return Batch(
        cu_seqlens_q, cu_seqlens_k, page_table, seq_lens_k, max_seq_len_q, max_seq_len_k
    )


def _attention_problem(q: Tensor, k: Tensor, block_ids: Tensor | None, block_size: int) -> Problem:
    top_k = 1 if block_ids is None else block_ids.shape[-1]
    return Problem(q.shape[1], k.shape[1], q.shape[2], q.shape[2], block_size, top_k)


def _rows(tensor: Tensor) -> Tensor:
    """With the elements of a row beside each other, as every backend but the reference wants them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@torch.library.custom_op("msa_cpp::indexer", mutates_args=())
def _indexer(
    index_q: Tensor,
    index_k: Tensor,
    block_size: int,
    top_k: int,
    num_init_blocks: int,
    num_local_blocks: int,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    page_table: Optional[Tensor],
    seq_lens_k: Optional[Tensor],
    max_seq_len_q: int,
    max_seq_len_k: int,
    backend: Optional[str],
) -> Tensor:
    heads, dim = index_q.shape[1], index_q.shape[2]
    problem = Problem(
        heads, heads, dim, dim, block_size, top_k, num_init_blocks, num_local_blocks
    )
    batch = _batch(
        cu_seqlens_q, cu_seqlens_k, page_table, seq_lens_k, max_seq_len_q, max_seq_len_k
    )
    block_ids: Tensor = functions.indexer(
        _rows(index_q), _rows(index_k), problem=problem, batch=batch, backend=backend
    )
    return block_ids


@_indexer.register_fake
def _(index_q: Tensor, index_k: Tensor, block_size: int, top_k: int, *_: Any) -> Tensor:
    return index_q.new_empty((index_q.shape[1], index_q.shape[0], top_k), dtype=torch.int32)


@torch.library.custom_op("msa_cpp::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Optional[Tensor],
    softmax_scale: float,
    block_size: int,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    page_table: Optional[Tensor],
    seq_lens_k: Optional[Tensor],
    max_seq_len_q: int,
    max_seq_len_k: int,
    backend: Optional[str],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    shared: dict[str, Any] = dict(
        problem=_attention_problem(q, k, block_ids, block_size),
        batch=_batch(
            cu_seqlens_q, cu_seqlens_k, page_table, seq_lens_k, max_seq_len_q, max_seq_len_k
        ),
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
    )
    q, k, v = _rows(q), _rows(k), _rows(v)
    if block_ids is None:
        out, lse = functions.dense_attention_forward(q, k, v, **shared)
    else:
        out, lse = functions.sparse_attention_forward(q, k, v, block_ids, **shared)
    return out, lse


@_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_wide(q))


@torch.library.custom_op("msa_cpp::attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Optional[Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    softmax_scale: float,
    block_size: int,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seq_len_q: int,
    max_seq_len_k: int,
    backend: Optional[str],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = functions.sparse_attention_backward(
        _rows(q),
        _rows(k),
        _rows(v),
        block_ids,
        out,
        lse,
        dout,
        problem=_attention_problem(q, k, block_ids, block_size),
        batch=Batch(cu_seqlens_q, cu_seqlens_k, None, None, max_seq_len_q, max_seq_len_k),
        softmax_scale=softmax_scale,
        backend=backend,
        deterministic=deterministic,
    )
    return dq, dk, dv


@_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_ids, softmax_scale, block_size, cu_q, cu_k, page_table, _, *rest = inputs
    if page_table is not None:
        raise NotImplementedError("attention on paged keys has no gradient; detach its inputs")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, block_ids, out, lse, cu_q, cu_k)
    ctx.options = (softmax_scale, block_size)
    ctx.bounds_and_choice = rest


def _attention_grad(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, block_ids, out, lse, cu_q, cu_k = ctx.saved_tensors
    # An expanded gradient (of a sum, say) has strides of 0, which kernels that copy tiles decline.
    dq, dk, dv = _attention_backward(
        q,
        k,
        v,
        block_ids,
        out,
        lse,
        dout.contiguous(),
        *ctx.options,
        cu_q,
        cu_k,
        *ctx.bounds_and_choice,
    )
    return (dq, dk, dv, *(None,) * 11)


_attention.register_autograd(_attention_grad, setup_context=_attention_setup)


@torch.library.custom_op("msa_cpp::indexer_kl", mutates_args=())
def _indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_ids: Optional[Tensor],
    lse: Optional[Tensor],
    softmax_scale: float,
    index_scale: float,
    loss_coefficient: float,
    block_size: int,
    cu_seqlens_q: Optional[Tensor],
    cu_seqlens_k: Optional[Tensor],
    max_seq_len_q: int,
    max_seq_len_k: int,
    with_gradients: bool,
    backend: Optional[str],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    top_k = 1 if block_ids is None else block_ids.shape[-1]
    problem = Problem(
        q.shape[1], k.shape[1], q.shape[2], index_q.shape[2], block_size, top_k
    )
    loss, dindex_q, dindex_k = functions.indexer_kl_backward(
        _rows(q),
        _rows(k),
        _rows(index_q),
        _rows(index_k),
        block_ids,
        problem=problem,
        batch=Batch(cu_seqlens_q, cu_seqlens_k, None, None, max_seq_len_q, max_seq_len_k),
        softmax_scale=softmax_scale,
        index_scale=index_scale,
        loss_coefficient=loss_coefficient,
        lse=lse,
        dindex_q=None if with_gradients else False,
        dindex_k=None if with_gradients else False,
        backend=backend,
        deterministic=deterministic,
    )
    if not with_gradients:
        dindex_q, dindex_k = index_q.new_empty(0), index_k.new_empty(0)
    return loss, dindex_q, dindex_k


@_indexer_kl.register_fake
def _(
    q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = index_q.new_empty((1,), dtype=_wide(index_q))
    with_gradients = rest[10]
    if not with_gradients:
        return loss, index_q.new_empty(0), index_k.new_empty(0)
    return loss, index_q.new_empty(index_q.shape), index_k.new_empty(index_k.shape)


def _indexer_kl_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, dindex_q, dindex_k = output
    ctx.mark_non_differentiable(dindex_q, dindex_k)
    ctx.save_for_backward(dindex_q, dindex_k)


def _indexer_kl_grad(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
    dindex_q, dindex_k = ctx.saved_tensors
    return (
        None,
        None,
        (dindex_q * dloss).to(dindex_q.dtype),
        (dindex_k * dloss).to(dindex_k.dtype),
        *(None,) * 13,
    )


_indexer_kl.register_autograd(_indexer_kl_grad, setup_context=_indexer_kl_setup)


def _same_lengths(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor | None:
    return cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k


def indexer(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 16,
    num_init_blocks: int = 0,
    num_local_blocks: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    seq_lens_k: Tensor | None = None,
    max_seq_len_q: int = 0,
    max_seq_len_k: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The blocks that each query attends. Not differentiable: the KL loss trains its inputs.

    index_q: [total_q, num_kv_heads, index_dim]; index_k: [total_k, 1, index_dim], or paged
    [num_pages, 1, block_size, index_dim] with page_table and seq_lens_k.
    cu_seqlens_q, cu_seqlens_k: int32 [batch_size + 1], offsets of sequences in total_q and total_k;
    keys without cu_seqlens_k divide like queries. max_seq_len_*: upper bounds, 0 if unknown.
    Returns int32 [num_kv_heads, total_q, top_k], ascending block ids of the query's sequence, then -1.
    """
    if page_table is None:
        cu_seqlens_k = _same_lengths(cu_seqlens_q, cu_seqlens_k)
    block_ids: Tensor = _indexer(
        index_q.detach(),
        index_k.detach(),
        block_size,
        top_k,
        num_init_blocks,
        num_local_blocks,
        cu_seqlens_q,
        cu_seqlens_k,
        page_table,
        seq_lens_k,
        max_seq_len_q,
        max_seq_len_k,
        backend,
    )
    return block_ids


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor,
    *,
    block_size: int = 128,
    softmax_scale: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    seq_lens_k: Tensor | None = None,
    max_seq_len_q: int = 0,
    max_seq_len_k: int = 0,
    backend: str | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the selected blocks, differentiable in q, k and v.

    q: [total_q, num_q_heads, head_dim]; k, v: [total_k, num_kv_heads, head_dim], or paged
    [num_pages, num_kv_heads, block_size, head_dim] (then without gradients).
    block_ids: int32 [num_kv_heads, total_q, top_k] of indexer(); a constant, -1 is skipped.
    softmax_scale: 0 means 1 / sqrt(head_dim). The other arguments are those of indexer();
    deterministic: bitwise repeatable results and gradients.
    Returns out, shaped like q, and lse, float32 [total_q, num_q_heads] (natural log, no gradient).
    """
    if page_table is None:
        cu_seqlens_k = _same_lengths(cu_seqlens_q, cu_seqlens_k)
    out, lse = _attention(
        q,
        k,
        v,
        block_ids,
        softmax_scale,
        block_size,
        cu_seqlens_q,
        cu_seqlens_k,
        page_table,
        seq_lens_k,
        max_seq_len_q,
        max_seq_len_k,
        backend,
        deterministic,
    )
    return out, lse


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 128,
    softmax_scale: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    seq_lens_k: Tensor | None = None,
    max_seq_len_q: int = 0,
    max_seq_len_k: int = 0,
    backend: str | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal attention over every visible token, differentiable in q, k and v: the warm-up stage.

    Arguments and results are those of sparse_attention(); block_size matters for paged keys only.
    """
    if page_table is None:
        cu_seqlens_k = _same_lengths(cu_seqlens_q, cu_seqlens_k)
    out, lse = _attention(
        q,
        k,
        v,
        None,
        softmax_scale,
        block_size,
        cu_seqlens_q,
        cu_seqlens_k,
        page_table,
        seq_lens_k,
        max_seq_len_q,
        max_seq_len_k,
        backend,
        deterministic,
    )
    return out, lse


def indexer_kl_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_ids: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    block_size: int = 128,
    softmax_scale: float = 0.0,
    index_scale: float = 0.0,
    loss_coefficient: float = 1.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seq_len_q: int = 0,
    max_seq_len_k: int = 0,
    backend: str | None = None,
    deterministic: bool = True,
) -> Tensor:
    """loss_coefficient times the mean KL divergence, over tokens and KV heads, of the index branch's
    softmax from the attention's (paper eqs 9-11); differentiable in index_q and index_k only.

    q, k: the teacher, as in sparse_attention(); they get no gradient. index_q, index_k: the student,
    as in indexer(). block_ids: the support is their visible tokens; None: every visible token (the
    warm-up stage). lse: the second result of sparse_attention() (of dense_attention() in the warm-up
    stage) for the same q, k and block_ids; optional, spares computing it again. Scales: 0 means 1 / sqrt of the dimension.
    Returns a float32 scalar. Gradients are computed in the same pass.
    """
    with_gradients = torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad)
    loss: Tensor = _indexer_kl(
        q.detach(),
        k.detach(),
        index_q,
        index_k,
        block_ids,
        None if lse is None else lse.detach(),
        softmax_scale,
        index_scale,
        loss_coefficient,
        block_size,
        cu_seqlens_q,
        _same_lengths(cu_seqlens_q, cu_seqlens_k),
        max_seq_len_q,
        max_seq_len_k,
        with_gradients,
        backend,
        deterministic,
    )[0]
    return loss.squeeze(0)
