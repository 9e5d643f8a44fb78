# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest

import msa_cpp

# JAX would otherwise take most of a GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Case:
    """Inputs of one layer for a single sequence, and the selection that the paper's rules make of them.

    200 keys in blocks of 16 leave the last block partial; 3 of 13 blocks are kept.
    """

    problem = msa_cpp.Problem(
        num_q_heads=4, num_kv_heads=2, head_dim=16, index_dim=32, block_size=16, top_k=3
    )

    def __init__(self, dtype=np.float64, num_queries=200, num_keys=200, seed=0):
        rng = np.random.default_rng(seed)
        p = self.problem

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        self.q = normal(num_queries, p.num_q_heads, p.head_dim)
        self.k = normal(num_keys, p.num_kv_heads, p.head_dim)
        self.v = normal(num_keys, p.num_kv_heads, p.head_dim)
        self.index_q = normal(num_queries, p.num_kv_heads, p.index_dim)
        self.index_k = normal(num_keys, 1, p.index_dim)
        self.dout = normal(num_queries, p.num_q_heads, p.head_dim)
        self.num_keys = num_keys


@pytest.fixture
def case():
    return Case()


@pytest.fixture
def case32():
    return Case(np.float32)
