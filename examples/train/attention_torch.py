# SPDX-License-Identifier: Apache-2.0
"""The operations of `msa_cpp.torch` in plain PyTorch, for sequences of equal length: the oracle, and what
runs where the package is not installed. Time and memory are those of dense attention.

Tensors are packed as there: [batch * length, heads, dim], batch = len(cu_seqlens_q) - 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # queries whose scores are in memory together


def batch_of(x: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """[tokens, heads, dim] -> [batch, heads, length, dim]."""
    batch = 1 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def packed(x: Tensor) -> Tensor:
    """The inverse of batch_of()."""
    return x.transpose(1, 2).flatten(0, 1)


def row_parts(length: int, rows: int = ROWS) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, rows):
        yield begin, min(begin + rows, length)


def causal(begin: int, end: int, device: torch.device) -> Tensor:
    """bool [end - begin, end]: query begin + i sees keys up to itself."""
    return torch.arange(end, device=device) <= torch.arange(begin, end, device=device)[:, None]


def select(block_scores: Tensor, query: Tensor, block_size: int, top_k: int, num_local_blocks: int = 1) -> Tensor:
    """int32 [..., queries, top_k] ascending, then -1.

    block_scores: f32 [..., queries, blocks], -inf where nothing is visible; query: positions [queries].
    """
    num_blocks = block_scores.shape[-1]
    local = (query // block_size)[:, None] - torch.arange(num_blocks, device=query.device)
    scores = block_scores.masked_fill((local >= 0) & (local < num_local_blocks), float("inf"))
    best, ids = scores.topk(min(top_k, num_blocks), dim=-1)
    ids = ids.masked_fill(best == float("-inf"), num_blocks).sort(dim=-1).values
    ids = F.pad(ids, (0, top_k - ids.shape[-1]), value=num_blocks)
    return ids.masked_fill(ids == num_blocks, -1).to(torch.int32)


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
    """int32 [num_kv_heads, tokens, top_k] of index_q [tokens, num_kv_heads, dim], index_k [tokens, 1, dim]."""
    index_q, index_k = batch_of(index_q, cu_seqlens_q).float(), batch_of(index_k, cu_seqlens_q).float()
    length = index_q.shape[2]
    num_blocks = -(-length // block_size)
    parts = []
    for begin, end in row_parts(length):
        scores = index_q[:, :, begin:end] @ index_k[:, :, :end].mT
        scores = scores.masked_fill(~causal(begin, end, scores.device), float("-inf"))
        scores = F.pad(scores, (0, num_blocks * block_size - end), value=float("-inf"))
        block_scores = scores.unflatten(-1, (num_blocks, block_size)).amax(-1)
        parts.append(select(block_scores, torch.arange(begin, end, device=scores.device), block_size, top_k, num_local_blocks))
    return torch.cat(parts, dim=2).transpose(0, 1).flatten(1, 2)  # [heads, batch * length, top_k]


def selected_tokens(block_ids: Tensor, batch: int, begin: int, end: int, block_size: int) -> Tensor:
    """bool [batch, num_kv_heads, end - begin, end]: the visible tokens of the selected blocks."""
    ids = block_ids.unflatten(1, (batch, -1)).transpose(0, 1)[:, :, begin:end].long()
    num_blocks = -(-end // block_size)
    chosen = torch.zeros(*ids.shape[:-1], num_blocks + 1, dtype=torch.bool, device=ids.device)
    chosen.scatter_(-1, ids.masked_fill((ids < 0) | (ids >= num_blocks), num_blocks), True)
    tokens = chosen[..., :num_blocks].repeat_interleave(block_size, dim=-1)[..., :end]
    return tokens & causal(begin, end, ids.device)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = 128, cu_seqlens_q: Tensor | None = None
) -> tuple[Tensor, None]:
    """Causal attention: [tokens, num_heads, dim]. The log-sum-exp is not computed."""
    q, k, v = (batch_of(x, cu_seqlens_q) for x in (q, k, v))
    return packed(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)), None


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, *, block_size: int = 128, cu_seqlens_q: Tensor | None = None
) -> tuple[Tensor, None]:
    """Attention over the visible tokens of the selected blocks."""
    q, k, v = (batch_of(x, cu_seqlens_q) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    parts = []
    for begin, end in row_parts(q.shape[2]):
        mask = selected_tokens(block_ids, q.shape[0], begin, end, block_size).repeat_interleave(group, dim=1)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=True
            )
        )
    return packed(torch.cat(parts, dim=2)), None


def teacher_probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """f32 [batch, num_kv_heads, rows, keys]: mean over a group's heads of softmax on the support `mask`.

    q: [batch, num_heads, rows, dim]; k: [batch, num_kv_heads, keys, dim]; mask: bool, broadcast over kv heads.
    """
    q = q.unflatten(1, (k.shape[1], -1)).float()  # [batch, kv heads, group, rows, dim]
    scores = (q @ k.float()[:, :, None].mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).mean(2)


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
    """loss_coefficient times the mean KL divergence of the index branch from the attention (paper eqs 9-11)."""
    q, k = batch_of(q.detach(), cu_seqlens_q), batch_of(k.detach(), cu_seqlens_q)
    index_q, index_k = batch_of(index_q, cu_seqlens_q).float(), batch_of(index_k, cu_seqlens_q).float()
    batch, heads, length, dim = index_q.shape
    total = index_q.new_zeros(())
    for begin, end in row_parts(length):
        if block_ids is None:
            mask = causal(begin, end, q.device).expand(batch, heads, -1, -1)
        else:
            mask = selected_tokens(block_ids, batch, begin, end, block_size)
        teacher = teacher_probabilities(q[:, :, begin:end], k[:, :, :end], mask)
        student = (index_q[:, :, begin:end] @ index_k[:, :, :end].mT) * dim**-0.5
        student = student.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
        total = total + (torch.xlogy(teacher, teacher) - teacher * student).sum()
    return loss_coefficient * total / (batch * length * heads)
