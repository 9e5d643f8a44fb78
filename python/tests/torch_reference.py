# SPDX-License-Identifier: Apache-2.0
"""The method in plain PyTorch float64, for autograd to differentiate. Masks are bool tensors
[kv_heads, queries, keys] over the packed tokens of a batch."""

import torch


def support(block_ids, num_keys, block_size):
    """Of one sequence: the visible tokens of the selected blocks."""
    block_of_key = torch.arange(num_keys, device=block_ids.device) // block_size
    chosen = (block_ids[..., None] == block_of_key).any(-2)
    return chosen & causal(block_ids.shape[1], num_keys, block_ids.device)


def causal(num_queries, num_keys, device=None):
    last = torch.arange(num_keys - num_queries, num_keys, device=device)
    return torch.arange(num_keys, device=device) <= last[:, None]


def batch_support(block_ids, lengths, block_size, kv_heads):
    """Of packed sequences; block_ids None: every visible token."""
    device = None if block_ids is None else block_ids.device
    mask = torch.zeros(kv_heads, sum(lengths), sum(lengths), dtype=torch.bool, device=device)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        if block_ids is None:
            mask[:, part, part] = causal(length, length, device)
        else:
            mask[:, part, part] = support(block_ids[:, part], length, block_size)
        begin += length
    return mask


def head_scores(q, k, mask):
    group = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q.double(), keys) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask.repeat_interleave(group, dim=0), float("-inf"))


def attention(q, k, v, mask):
    """out [queries, q_heads, dim] and lse [queries, q_heads]; every query sees itself."""
    scores = head_scores(q, k, mask)
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
    return out, scores.logsumexp(-1).T


def indexer_kl(q, k, index_q, index_k, mask):
    """The mean over queries and KV heads of KL(teacher || student)."""
    teacher = head_scores(q, k, mask).softmax(-1)
    teacher = teacher.unflatten(0, (k.shape[1], -1)).mean(1)
    scores = torch.einsum("ird,jd->rij", index_q.double(), index_k[:, 0].double())
    scores = scores * index_q.shape[-1] ** -0.5
    log_student = scores.masked_fill(~mask, float("-inf")).log_softmax(-1)
    log_student = log_student.masked_fill(~mask, 0.0)
    divergence = torch.xlogy(teacher, teacher) - teacher * log_student
    return divergence.sum() / (mask.shape[0] * mask.shape[1])
