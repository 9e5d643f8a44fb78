# SPDX-License-Identifier: Apache-2.0
"""Results against the paper's equations in float64, on the reference backend and on the CPU's.

On float64 arrays the reference backend differs from numpy by the order of sums only: a few hundred
terms of order 1, so 1000 units in the last place bound it. In float32 inputs are exact and scores of 32
terms err by 32 half-units, which the exponential turns into the same relative error of a weight.
"""

import ml_dtypes
import numpy as np
import paper
import pytest
from conftest import Case

import msa_cpp
from msa_cpp import Batch, Problem

TIGHT = dict(rtol=1000 * np.finfo(np.float64).eps, atol=1000 * np.finfo(np.float64).eps)
SINGLE = dict(rtol=64 * np.finfo(np.float32).eps, atol=64 * np.finfo(np.float32).eps)


def expected_ids(case, **rules):
    p = case.problem
    scores = paper.block_scores(case.index_q, case.index_k, p.block_size)
    return paper.select(scores, case.num_keys, p.block_size, p.top_k, **rules)


def expected_support(case):
    return paper.support(expected_ids(case), case.num_keys, case.problem.block_size)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, TIGHT), (np.float32, SINGLE)])
@pytest.mark.parametrize("num_queries", [200, 37, 1])
def test_forward(dtype, tolerance, num_queries):
    case = Case(dtype, num_queries)
    p = case.problem
    ids = msa_cpp.indexer(case.index_q, case.index_k, problem=p)
    np.testing.assert_array_equal(ids, expected_ids(case))
    out, lse = msa_cpp.sparse_attention_forward(case.q, case.k, case.v, ids, problem=p)
    ids_of_step, attention_of_step = msa_cpp.indexed_attention_forward(
        case.index_q, case.index_k, case.q, case.k, case.v, problem=p
    )
    np.testing.assert_array_equal(ids_of_step, ids)
    np.testing.assert_array_equal(attention_of_step.out, out)
    np.testing.assert_array_equal(attention_of_step.lse, lse)
    expected_out, expected_lse = paper.attention(case.q, case.k, case.v, expected_support(case))
    assert out.dtype == dtype and lse.dtype == dtype
    np.testing.assert_allclose(out, expected_out, **tolerance)
    np.testing.assert_allclose(lse, expected_lse, **tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, TIGHT), (np.float32, SINGLE)])
def test_dense(dtype, tolerance):
    case = Case(dtype)
    out, lse = msa_cpp.dense_attention_forward(case.q, case.k, case.v, problem=case.problem)
    everything = paper.everything(case.problem.num_kv_heads, len(case.q), case.num_keys)
    expected_out, expected_lse = paper.attention(case.q, case.k, case.v, everything)
    np.testing.assert_allclose(out, expected_out, **tolerance)
    np.testing.assert_allclose(lse, expected_lse, **tolerance)


def test_scores_then_selection(case):
    p = Problem(**{**vars(case.problem), "num_init_blocks": 1, "num_local_blocks": 1})
    scores = msa_cpp.indexer_scores(case.index_q, case.index_k, problem=p)
    expected = paper.block_scores(case.index_q, case.index_k, p.block_size)
    np.testing.assert_allclose(scores, expected, **TIGHT)
    batch = Batch(cu_seqlens_k=np.array([0, case.num_keys], np.int32))
    ids = msa_cpp.select_top_k(scores, problem=p, batch=batch)
    np.testing.assert_array_equal(ids, expected_ids(case, num_init_blocks=1))


def test_scores_have_columns_for_the_longest_sequence(case32):
    batch = Batch(
        cu_seqlens_q=np.array([0, 80, 200], np.int32),
        cu_seqlens_k=np.array([0, 80, 200], np.int32),
        max_seq_len_k=120,
    )
    scores = msa_cpp.indexer_scores(case32.index_q, case32.index_k, problem=case32.problem, batch=batch)
    assert scores.shape == (2, 200, 8)
    second = paper.block_scores(case32.index_q[80:], case32.index_k[80:], 16)
    np.testing.assert_allclose(scores[:, 80:], second, **SINGLE)


@pytest.mark.parametrize("sparse", [True, False])
def test_attention_backward(case, sparse):
    p = case.problem
    if sparse:
        ids, mask = expected_ids(case), expected_support(case)
    else:
        ids, mask = None, paper.everything(p.num_kv_heads, len(case.q), case.num_keys)
    out, lse = paper.attention(case.q, case.k, case.v, mask)
    gradients = msa_cpp.sparse_attention_backward(
        case.q, case.k, case.v, ids, out, lse, case.dout, problem=p, backend="reference"
    )
    expected = paper.attention_gradients(case.q, case.k, case.v, mask, case.dout)
    for name, got, want in zip(gradients._fields, gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, **TIGHT, err_msg=name)


@pytest.mark.parametrize("sparse", [True, False])
def test_backward_of_the_cpu_backend(case32, sparse):
    """float32: each gradient is a sum of up to 200 terms that are products of a handful of roundings."""
    p = case32.problem
    ids = expected_ids(case32) if sparse else None
    mask = (
        expected_support(case32)
        if sparse
        else paper.everything(p.num_kv_heads, len(case32.q), case32.num_keys)
    )
    q, k, v, index_q, index_k = (
        case32.q, case32.k, case32.v, case32.index_q, case32.index_k
    )  # fmt: skip
    out, lse = (x.astype(np.float32) for x in paper.attention(q, k, v, mask))
    shared = dict(problem=p, backend="cpu")
    got = [
        *msa_cpp.sparse_attention_backward(q, k, v, ids, out, lse, case32.dout, **shared),
        *msa_cpp.indexer_kl_backward(q, k, index_q, index_k, ids, **shared),
    ]
    expected = [
        *paper.attention_gradients(q, k, v, mask, case32.dout),
        *paper.indexer_kl(q, k, index_q, index_k, mask),
    ]
    for x, want in zip(got, expected, strict=True):
        error = np.abs(x - want).max()
        assert error <= 1000 * np.finfo(np.float32).eps * np.abs(want).max()


@pytest.mark.parametrize("sparse", [True, False])
def test_indexer_kl(case, sparse):
    p = case.problem
    ids = expected_ids(case) if sparse else None
    mask = (
        expected_support(case)
        if sparse
        else paper.everything(p.num_kv_heads, len(case.q), case.num_keys)
    )
    got = msa_cpp.indexer_kl_backward(
        case.q, case.k, case.index_q, case.index_k, ids, problem=p, loss_coefficient=0.5
    )
    # The library keeps the coefficient in float32, where 0.5 is exact.
    expected = paper.indexer_kl(case.q, case.k, case.index_q, case.index_k, mask, 0.5)
    assert got.loss.shape == (1,)
    for name, x, want in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(x, np.broadcast_to(want, x.shape), **TIGHT, err_msg=name)


def test_optional_outputs(case):
    p = case.problem
    kl = msa_cpp.indexer_kl_backward(
        case.q, case.k, case.index_q, case.index_k, problem=p, dindex_q=False, dindex_k=False
    )
    assert kl.loss[0] > 0.0 and kl.dindex_q is None and kl.dindex_k is None
    forward = msa_cpp.dense_attention_forward(case.q, case.k, case.v, problem=p, lse=False)
    assert forward.lse is None


def paged(rows, block_size, order):
    """Rows [tokens, heads, dim] as pages [num_pages, heads, block_size, dim], block b in page order[b]."""
    pages = np.zeros((len(order), rows.shape[1], block_size, rows.shape[2]), rows.dtype)
    for block, page in enumerate(order):
        part = rows[block * block_size : (block + 1) * block_size]
        pages[page, :, : len(part)] = part.swapaxes(0, 1)
    return pages


def test_append_then_decode(case32):
    """A prompt appended to pages in two calls, then one decoding query, equals the ragged result."""
    p, n = case32.problem, case32.num_keys
    order = np.random.default_rng(1).permutation(13)
    table = order.astype(np.int32)[None]
    k_pages, v_pages = (np.zeros((13, 2, 16, 16), np.float32) for _ in range(2))
    index_k_pages = np.zeros((13, 1, 16, 32), np.float32)
    for begin, end in ((0, 150), (150, n)):
        batch = Batch(page_table=table, seq_lens_k=np.array([end], np.int32))
        msa_cpp.append_kv(
            k=case32.k[begin:end],
            v=case32.v[begin:end],
            index_k=case32.index_k[begin:end],
            k_pages=k_pages,
            v_pages=v_pages,
            index_k_pages=index_k_pages,
            problem=p,
            batch=batch,
        )
    np.testing.assert_array_equal(k_pages, paged(case32.k, 16, order))
    np.testing.assert_array_equal(index_k_pages, paged(case32.index_k, 16, order))

    batch = Batch(page_table=table, seq_lens_k=np.array([n], np.int32))
    ids = msa_cpp.indexer(case32.index_q[-1:], index_k_pages, problem=p, batch=batch)
    out, _ = msa_cpp.sparse_attention_forward(
        case32.q[-1:], k_pages, v_pages, ids, problem=p, batch=batch
    )
    last = Case(np.float32)
    mask = expected_support(last)
    np.testing.assert_array_equal(ids, expected_ids(last)[:, -1:])
    expected, _ = paper.attention(last.q, last.k, last.v, mask)
    np.testing.assert_allclose(out, expected[-1:], **SINGLE)


def test_norm_rope_append(case32):
    """Norm with 1 + weight, rotation in halves of the first 8 of 16 dims, and the append."""
    p, n, rotary = case32.problem, 40, 8
    rng = np.random.default_rng(3)
    weight = rng.standard_normal(16).astype(np.float32)
    angles = np.arange(64)[:, None] * 100.0 ** (-np.arange(0, rotary, 2) / rotary)
    cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    k_pages = np.zeros((4, 2, 16, 16), np.float32)
    batch = Batch(
        page_table=np.arange(4, dtype=np.int32)[None], seq_lens_k=np.array([n], np.int32)
    )
    q_out, index_q_out = msa_cpp.norm_rope_append_kv(
        q=case32.q[:n],
        k=case32.k[:n],
        q_weight=weight,
        k_weight=weight,
        norm_weight_offset=1.0,
        cos_sin=cos_sin,
        k_pages=k_pages,
        problem=p,
        batch=batch,
    )
    assert index_q_out is None

    def expected(x):
        x = np.float64(x)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1.0 + np.float64(weight))
        half = rotary // 2
        cos, sin = (np.float64(cos_sin[:n, None, part]) for part in (slice(half), slice(half, None)))
        first, second = y[..., :half], y[..., half:rotary]
        return np.concatenate(
            [first * cos - second * sin, second * cos + first * sin, y[..., rotary:]], axis=-1
        )

    np.testing.assert_allclose(q_out, expected(case32.q[:n]), **SINGLE)
    got = np.concatenate([page.swapaxes(0, 1) for page in k_pages])[:n]
    np.testing.assert_allclose(got, expected(case32.k[:n]), **SINGLE)


def test_e4m3_keys(case32):
    """e4m3 keys and values with a scale per head, read by the reference."""
    p = case32.problem
    scale = np.array([0.5, 2.0], np.float32)
    k8, v8 = (
        (x / scale[:, None]).astype(ml_dtypes.float8_e4m3fn) for x in (case32.k, case32.v)
    )
    out, _ = msa_cpp.dense_attention_forward(
        case32.q, k8, v8, problem=p, k_scale=scale, v_scale=scale
    )
    k, v = (x.astype(np.float64) * scale[:, None] for x in (k8, v8))
    everything = paper.everything(p.num_kv_heads, len(case32.q), case32.num_keys)
    np.testing.assert_allclose(out, paper.attention(case32.q, k, v, everything)[0], **SINGLE)


def test_bfloat16(case32):
    p = case32.problem
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (case32.q, case32.k, case32.v))
    out, lse = msa_cpp.dense_attention_forward(q, k, v, problem=p)
    assert out.dtype == ml_dtypes.bfloat16 and lse.dtype == np.float32
    everything = paper.everything(p.num_kv_heads, len(q), case32.num_keys)
    expected, _ = paper.attention(q.astype(float), k.astype(float), v.astype(float), everything)
    # Weights and the result are rounded to 8 bits each: a mean of values up to 4 errs by twice that.
    np.testing.assert_allclose(out.astype(float), expected, rtol=2.0**-8, atol=4 * 2.0**-8)


def test_paged_cache():
    cache = msa_cpp.PagedKvCache(num_pages=4, block_size=16)
    first = cache.create()
    assert cache.append(first, 20) is None
    second = cache.fork(first, 20)
    copy = cache.append(second, 1)
    assert copy is not None and copy.source_page == cache.pages(first)[1] and copy.num_tokens == 4
    table, lengths = cache.batch_arrays([first, second])
    assert lengths.tolist() == [20, 21]
    assert table.tolist() == [cache.pages(first), cache.pages(second)]
    assert cache.num_free_pages == 1
    with pytest.raises(MemoryError):
        cache.append(first, 1000)
    cache.release(second)
    assert cache.num_free_pages == 2
