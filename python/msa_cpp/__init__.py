# SPDX-License-Identifier: Apache-2.0
"""MiniMax Sparse Attention (arXiv 2606.13392) for numpy, PyTorch and JAX arrays.

Functions named like the C++ operations take arrays and return arrays; the classes of the same names
are their argument structs, for plan() and Plan.run(). msa_cpp.torch has differentiable operators and
an attention module. docs/python.md of the repository introduces them.
"""

from __future__ import annotations

from typing import NamedTuple

from . import _core
from ._arrays import Array
from .cache import PageCopy, PagedKvCache
from .functions import (
    AttentionBackward,
    AttentionForward,
    IndexerKl,
    NormRope,
    append_kv,
    dense_attention_forward,
    indexed_attention_forward,
    indexer,
    indexer_kl_backward,
    indexer_scores,
    norm_rope_append_kv,
    select_top_k,
    sparse_attention_backward,
    sparse_attention_forward,
)
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
from .plans import Plan, plan

__version__ = _core.version()


class BackendInfo(NamedTuple):
    name: str  #: "reference", "cpu", "cuda_generic", "cuda_sm90"
    available: bool  #: Usable on this machine now.
    detail: str  #: SIMD target and threads, device name, or why it is unavailable.


class ImplementationInfo(NamedTuple):
    operation: str  #: "SparseAttentionForward"
    implementation: str  #: "cpu"
    dtypes: str  #: "f32 f16 bf16"


def backends() -> list[BackendInfo]:
    """The backends of this build."""
    return [BackendInfo(*row) for row in _core.backends()]


def implementations() -> list[ImplementationInfo]:
    """Every implementation of this build, in the order in which plan() asks them."""
    return [ImplementationInfo(*row) for row in _core.implementations()]


def num_threads() -> int:
    """Threads of the CPU backend, the caller's included."""
    return _core.num_threads()


def set_num_threads(num_threads: int) -> None:
    """Sets the threads of the CPU backend, 1 to 1024. Not to be called during a run."""
    _core.set_num_threads(num_threads)


__all__ = [
    "AppendKv",
    "Array",
    "AttentionBackward",
    "AttentionForward",
    "BackendInfo",
    "Batch",
    "DenseAttentionForward",
    "IndexedAttentionForward",
    "ImplementationInfo",
    "Indexer",
    "IndexerKl",
    "IndexerKlBackward",
    "IndexerScores",
    "NormRope",
    "NormRopeAppendKv",
    "Operation",
    "PageCopy",
    "PagedKvCache",
    "Plan",
    "Problem",
    "SelectTopK",
    "SparseAttentionBackward",
    "SparseAttentionForward",
    "append_kv",
    "backends",
    "dense_attention_forward",
    "implementations",
    "indexed_attention_forward",
    "indexer",
    "indexer_kl_backward",
    "indexer_scores",
    "norm_rope_append_kv",
    "num_threads",
    "plan",
    "select_top_k",
    "set_num_threads",
    "sparse_attention_backward",
    "sparse_attention_forward",
]
