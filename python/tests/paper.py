# SPDX-License-Identifier: Apache-2.0
"""The method in numpy float64, from the paper's equations, for one sequence. Plain and slow."""

import numpy as np


def positions(num_queries, num_keys):
    """Query i stands at this key position."""
    return np.arange(num_keys - num_queries, num_keys)


def causal(num_queries, num_keys):
    """[num_queries, num_keys]: which keys a query may see."""
    return np.arange(num_keys)[None, :] <= positions(num_queries, num_keys)[:, None]


def index_scores(index_q, index_k, scale=None):
    """Equation 5: [heads, num_queries, num_keys], -inf for the future."""
    scale = index_q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * np.einsum("ird,jd->rij", np.float64(index_q), np.float64(index_k[:, 0]))
    return np.where(causal(len(index_q), len(index_k)), scores, -np.inf)


def block_scores(index_q, index_k, block_size, scale=None):
    """Equation 6: [heads, num_queries, num_blocks]."""
    scores = index_scores(index_q, index_k, scale)
    missing = -scores.shape[-1] % block_size
    scores = np.pad(scores, ((0, 0), (0, 0), (0, missing)), constant_values=-np.inf)
    return scores.reshape(*scores.shape[:2], -1, block_size).max(-1)


def select(scores, num_keys, block_size, top_k, num_init_blocks=0, num_local_blocks=1):
    """Equation 7: [heads, num_queries, top_k] of ascending ids, then -1. Forced blocks come first."""
    heads, num_queries, _ = scores.shape
    ids = np.full((heads, num_queries, top_k), -1, np.int32)
    for i, position in enumerate(positions(num_queries, num_keys)):
        local = position // block_size
        forced = {b for b in range(local - num_local_blocks + 1, local + 1) if b >= 0}
        forced |= {b for b in range(num_init_blocks) if b <= local}
        for r in range(heads):
            rest = [b for b in range(local + 1) if b not in forced]
            rest.sort(key=lambda b: (-scores[r, i, b], b))
            chosen = sorted([*forced, *rest[: top_k - len(forced)]])
            ids[r, i, : len(chosen)] = chosen
    return ids


def support(block_ids, num_keys, block_size):
    """[kv_heads, num_queries, num_keys]: the visible tokens of the selected blocks."""
    block_of_key = np.arange(num_keys) // block_size
    chosen = (block_ids[..., None] == block_of_key).any(-2)
    return chosen & causal(block_ids.shape[1], num_keys)


def everything(kv_heads, num_queries, num_keys):
    """The warm-up stage's support."""
    return np.broadcast_to(causal(num_queries, num_keys), (kv_heads, num_queries, num_keys))


def softmax(scores):
    """Over the last axis; a row of -inf gives zeros. Also the log of the sum."""
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    return weights / np.where(total == 0.0, 1.0, total), lse[..., 0]


def head_scores(q, k, mask):
    """Scaled scores per query head: [q_heads, num_queries, num_keys]."""
    group = q.shape[1] // k.shape[1]
    keys = np.repeat(np.float64(k), group, axis=1)
    scores = np.einsum("ihd,jhd->hij", np.float64(q), keys) * q.shape[-1] ** -0.5
    return np.where(np.repeat(mask, group, axis=0), scores, -np.inf)


def attention(q, k, v, mask):
    """Equation 8: out [num_queries, q_heads, dim] and lse [num_queries, q_heads]."""
    weights, lse = softmax(head_scores(q, k, mask))
    group = q.shape[1] // k.shape[1]
    out = np.einsum("hij,jhd->ihd", weights, np.repeat(np.float64(v), group, axis=1))
    return out, lse.T


def attention_gradients(q, k, v, mask, dout):
    """dq, dk, dv of sum(out * dout), the mask a constant."""
    group = q.shape[1] // k.shape[1]
    weights, _ = softmax(head_scores(q, k, mask))
    keys, values = (np.repeat(np.float64(x), group, axis=1) for x in (k, v))
    dweights = np.einsum("ihd,jhd->hij", np.float64(dout), values)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dscores *= q.shape[-1] ** -0.5
    dq = np.einsum("hij,jhd->ihd", dscores, keys)
    dk = np.einsum("hij,ihd->jhd", dscores, np.float64(q))
    dv = np.einsum("hij,ihd->jhd", weights, np.float64(dout))
    grouped = (len(k), k.shape[1], group, k.shape[2])
    return dq, dk.reshape(grouped).sum(2), dv.reshape(grouped).sum(2)


def indexer_kl(q, k, index_q, index_k, mask, coefficient=1.0):
    """Equations 9-11: the loss and its gradients for index_q and index_k; the teacher is constant."""
    kv_heads, num_queries, num_keys = mask.shape
    teacher, _ = softmax(head_scores(q, k, mask))
    teacher = teacher.reshape(kv_heads, -1, num_queries, num_keys).mean(1)
    scores = np.where(mask, index_scores(index_q, index_k), -np.inf)
    student, lse = softmax(scores)
    log_student = np.where(mask, scores - lse[..., None], 0.0)
    log_teacher = np.log(np.where(teacher > 0.0, teacher, 1.0))
    weight = coefficient / (num_queries * kv_heads)
    loss = weight * (teacher * (log_teacher - log_student)).sum()
    dscores = weight * (student - teacher) * index_q.shape[-1] ** -0.5
    dindex_q = np.einsum("rij,jd->ird", dscores, np.float64(index_k[:, 0]))
    dindex_k = np.einsum("rij,ird->jd", dscores, np.float64(index_q))
    return loss, dindex_q, dindex_k[:, None, :]
