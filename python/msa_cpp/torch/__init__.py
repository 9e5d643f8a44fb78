# SPDX-License-Identifier: Apache-2.0
"""Differentiable operators and an attention module for PyTorch; torch.compile(fullgraph=True) works.

>>> block_ids = msa_cpp.torch.indexer(index_q, index_k)
>>> out, lse = msa_cpp.torch.sparse_attention(q, k, v, block_ids)
>>> kl = msa_cpp.torch.indexer_kl_loss(q, k, index_q, index_k, block_ids)
>>> (task_loss(out) + kl).backward()

Tensors are packed: [tokens, heads, dim], with cu_seqlens for several sequences. The functions of
msa_cpp itself take PyTorch tensors too, without gradients, for caches and decoding.
"""

from .module import RMSNorm, SparseAttention, rotary_table
from .ops import dense_attention, indexer, indexer_kl_loss, sparse_attention

__all__ = [
    "RMSNorm",
    "SparseAttention",
    "dense_attention",
    "indexer",
    "indexer_kl_loss",
    "rotary_table",
    "sparse_attention",
]
