# SPDX-License-Identifier: Apache-2.0
"""The operations of `msa_cpp.torch` on a GPU without the package: FlexAttention with masks of selected blocks.

Same functions as attention_torch.py. Two ideas keep them fast:
- the heads of a group are rows of one attention problem, so a kernel's 128 rows are 128 / group_size tokens and
  visit the union of few selections;
- the gradient of the KL loss is a difference of attention outputs. With P the teacher and S the student on
  the same support,  dL/dindex_q[i] ~ sum_j (S_ij - P_ij) index_k[j]  and
  dL/dindex_k[j] ~ sum_i (S_ij - P_ij) index_q[i]:  attention with index keys as values, and what its backward
  gives to those values when index queries come in as the output's gradient.
The loss's value is exact on SAMPLED queries of the call, an unbiased estimate. Its gradient uses all queries in the
warmup, and in the sparse stage a random one of every KL_STRIDE tiles of 128 queries: a step has thousands of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attention_torch
from attention_torch import batch_of, dense_attention, packed, select

__all__ = ["dense_attention", "indexer", "indexer_kl_loss", "sparse_attention"]

TILE = 128  # rows of FlexAttention's tiles
SAMPLED = 64
KL_STRIDE = 4
_compiled_flex = torch.compile(flex_attention, dynamic=False)
# One specialisation per length of context and use; beyond the limit it would run uncompiled, in quadratic memory.
torch._dynamo.config.recompile_limit = 256


@triton.jit
def _block_scores_kernel(
    q_data, k_data, out, length, num_blocks, num_heads: tl.constexpr, dim: tl.constexpr, rows: tl.constexpr,
    block_size: tl.constexpr,
):  # fmt: skip
    """Scores of `rows` queries of one head against all blocks that they see."""
    row_begin = tl.program_id(0) * rows
    batch_idx = tl.program_id(1) // num_heads
    head = tl.program_id(1) % num_heads
    row = row_begin + tl.arange(0, rows)
    channel = tl.arange(0, dim)
    token = batch_idx.to(tl.int64) * length
    q = tl.load(
        q_data + ((token + row[:, None]) * num_heads + head) * dim + channel[None, :], mask=row[:, None] < length, other=0.0
    )
    out_row = out + (tl.program_id(1).to(tl.int64) * length + row) * num_blocks
    for block in range(0, (row_begin + rows - 1) // block_size + 1):
        key = block * block_size + tl.arange(0, block_size)
        k = tl.load(k_data + (token + key[None, :]) * dim + channel[:, None], mask=key[None, :] < length, other=0.0)
        scores = tl.dot(q, k)
        scores = tl.where(key[None, :] <= row[:, None], scores, float("-inf"))
        tl.store(out_row + block, tl.max(scores, 1), mask=(row < length) & (block < num_blocks))


@torch.no_grad()
def indexer(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int = 128,
    top_k: int = 16,
    num_local_blocks: int = 1,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    tokens, heads, dim = index_q.shape
    batch = 1 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    length = tokens // batch
    num_blocks = -(-length // block_size)
    scores = torch.full((batch, heads, length, num_blocks), float("-inf"), device=index_q.device)
    rows = 128
    _block_scores_kernel[(triton.cdiv(length, rows), batch * heads)](
        index_q.contiguous(), index_k.contiguous(), scores, length, num_blocks, heads, dim, rows, block_size
    )
    position = torch.arange(length, device=index_q.device)
    ids = select(scores, position, block_size, top_k, num_local_blocks)
    return ids.transpose(0, 1).flatten(1, 2)


def chosen_blocks(block_ids: Tensor, batch: int, num_blocks: int) -> Tensor:
    """bool [batch, num_kv_heads, length, num_blocks]."""
    ids = block_ids.unflatten(1, (batch, -1)).transpose(0, 1).long()
    chosen = torch.zeros(*ids.shape[:-1], num_blocks + 1, dtype=torch.bool, device=ids.device)
    return chosen.scatter_(-1, ids.masked_fill(ids < 0, num_blocks), True)[..., :num_blocks]


def block_mask(chosen: Tensor, rows: Tensor, group: int, block_size: int) -> BlockMask:
    """For queries packed as len(rows) * group rows: which tiles to visit, and which tokens of them count.

    chosen: bool [batch, num_kv_heads, len(rows), num_blocks]; rows: positions of the queries, whole tiles of them.
    """
    tiles = chosen.unflatten(2, (-1, TILE // group)).any(3).to(torch.int32)  # [batch, heads, tiles, num_blocks]
    order = tiles.argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row // group
        return (key <= rows[token]) & chosen[b, h, token, key // block_size]

    return BlockMask.from_kv_blocks(
        tiles.sum(-1, dtype=torch.int32), order, BLOCK_SIZE=(TILE, block_size), mask_mod=mask_mod,
        seq_lengths=(len(rows) * group, chosen.shape[-1] * block_size),
    )  # fmt: skip


def group_rows(q: Tensor, num_kv_heads: int) -> Tensor:
    """[batch, heads, length, dim] -> [batch, num_kv_heads, length * group, dim], a token's heads together."""
    q = q.unflatten(1, (num_kv_heads, -1)).transpose(2, 3)
    return q.flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q: [batch, num_kv_heads, rows, dim] as group_rows() gives it."""
    return _compiled_flex(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, *, block_size: int = 128, cu_seqlens_q: Tensor | None = None
) -> tuple[Tensor, None]:
    q, k, v = (batch_of(x, cu_seqlens_q) for x in (q, k, v))
    length, heads = q.shape[2], k.shape[1]
    chosen = chosen_blocks(block_ids, q.shape[0], -(-length // block_size))
    mask = block_mask(chosen, torch.arange(length, device=q.device), q.shape[1] // heads, block_size)
    out = attend(group_rows(q, heads), k, v, mask)
    return packed(out.unflatten(2, (length, -1)).transpose(2, 3).flatten(1, 2)), None


def sampled_tiles(length: int, device: torch.device) -> Tensor:
    """Positions of every KL_STRIDE-th tile of tokens, from a random one on (of the CPU's generator)."""
    tiles = length // TILE
    stride = min(KL_STRIDE, tiles)
    first = torch.arange(int(torch.randint(stride, ())), tiles, stride) * TILE
    return (first[:, None] + torch.arange(TILE)).flatten().to(device, non_blocking=True)


class _IndexerKl(torch.autograd.Function):
    """value of the loss; its gradients are made in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, block_ids: Tensor | None, block_size: int,
        coefficient: float,
    ) -> Tensor:  # fmt: skip
        # All [batch, heads, length, dim], without a history.
        batch, heads, length, dim = index_q.shape
        group = q.shape[1] // heads
        index_q, index_k = index_q.detach(), index_k.detach()
        rows = torch.arange(length, device=q.device) if block_ids is None else sampled_tiles(length, q.device)
        some_q, some_index_q = (x if block_ids is None else x[:, :, rows] for x in (q, index_q))
        with torch.enable_grad():
            keys = index_k.expand(-1, heads, -1, -1).contiguous()
            values = [keys.clone().requires_grad_() for _ in range(2)]
            if block_ids is None:
                out = torch.nn.functional.scaled_dot_product_attention
                teacher = out(q, k, values[0], is_causal=True, enable_gqa=True).unflatten(1, (heads, group))
                student = out(index_q, keys, values[1], is_causal=True)
            else:
                chosen = chosen_blocks(block_ids, batch, -(-length // block_size))[:, :, rows]
                mask = block_mask(chosen, rows, group, block_size)
                teacher = attend(group_rows(some_q, heads), k, values[0], mask)
                teacher = teacher.unflatten(2, (len(rows), group)).transpose(2, 3)
                student = attend(some_index_q, keys, values[1], block_mask(chosen, rows, 1, block_size))
            incoming = some_index_q[:, :, None].expand_as(teacher) / group
            (of_teacher,) = torch.autograd.grad(teacher, values[0], incoming.contiguous())
            (of_student,) = torch.autograd.grad(student, values[1], some_index_q.contiguous())
        scale = coefficient * dim**-0.5 / (batch * len(rows) * heads)
        some_dindex_q = (student.detach().float() - teacher.detach().float().mean(2)) * scale
        dindex_q = some_dindex_q if block_ids is None else torch.zeros_like(index_q, dtype=torch.float32)
        if block_ids is not None:
            dindex_q[:, :, rows] = some_dindex_q
        dindex_k = (of_student.float() - of_teacher.float()).sum(1, keepdim=True) * scale
        ctx.save_for_backward(dindex_q, dindex_k)
        return coefficient * _IndexerKl.sampled_value(index_q, index_k, q, k, block_ids, block_size)

    @staticmethod
    def sampled_value(
        index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, block_ids: Tensor | None, block_size: int
    ) -> Tensor:
        batch, heads, length, dim = index_q.shape
        stride = max(1, length // SAMPLED)
        rows = torch.arange(stride - 1, length, stride, device=q.device)
        mask = torch.arange(length, device=q.device) <= rows[:, None]
        mask = mask.expand(batch, heads, -1, -1)
        if block_ids is not None:
            chosen = chosen_blocks(block_ids, batch, -(-length // block_size))[:, :, rows]
            mask = mask & chosen.repeat_interleave(block_size, dim=-1)[..., :length]
        teacher = attention_torch.teacher_probabilities(q[:, :, rows], k, mask)
        student = (index_q[:, :, rows].float() @ index_k.float().mT) * dim**-0.5
        student = student.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
        return (torch.xlogy(teacher, teacher) - teacher * student).sum() / (batch * len(rows) * heads)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dindex_q, dindex_k = ctx.saved_tensors
        return dindex_q * dloss, dindex_k * dloss, None, None, None, None, None


def indexer_kl_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_ids: Tensor | None = None,
    *,
    block_size: int = 128,
    lse: Tensor | None = None,  # msa_cpp.torch's, which saves a pass; here it is None
    loss_coefficient: float = 1.0,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    q, k = batch_of(q.detach(), cu_seqlens_q), batch_of(k.detach(), cu_seqlens_q)
    index_q, index_k = batch_of(index_q, cu_seqlens_q), batch_of(index_k, cu_seqlens_q)
    with torch.autocast(q.device.type, enabled=False):
        return _IndexerKl.apply(index_q, index_k, q, k, block_ids, block_size, loss_coefficient)
