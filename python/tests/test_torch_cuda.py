# SPDX-License-Identifier: Apache-2.0
"""CUDA tensors: results against float64, streams, graph capture, torch.compile, training. Skipped where
there is no GPU or the package was built without CUDA."""

import pytest

torch = pytest.importorskip("torch")

import torch_reference as reference  # noqa: E402

import msa_cpp  # noqa: E402
import msa_cpp.torch as msa  # noqa: E402

AVAILABLE = {b.name for b in msa_cpp.backends() if b.available and b.name.startswith("cuda")}
if not torch.cuda.is_available() or not AVAILABLE:
    pytest.skip("no GPU, or built without CUDA", allow_module_level=True)

LENGTHS = (700, 1, 299)
TOKENS, HEADS, KV_HEADS, DIM, TOP_K = sum(LENGTHS), 32, 2, 128, 3
PROBLEM = msa_cpp.Problem(HEADS, KV_HEADS, DIM, DIM, 128, TOP_K)
DTYPES = [torch.bfloat16, torch.float16]
# Digits after the leading one.
BITS = {torch.bfloat16: 7, torch.float16: 10}


def has(operation):
    return any(
        row.operation == operation and row.implementation in AVAILABLE
        for row in msa_cpp.implementations()
    )


needs_backward = pytest.mark.skipif(
    not has("SparseAttentionBackward") or not has("IndexerKlBackward"),
    reason="this build has no CUDA backward",
)


def layer(dtype=torch.bfloat16, seed=0):
    """q, k, v, index_q, index_k on the GPU and the offsets of three sequences. Index vectors are small
    integers, so that every sum is exact and ties are real ones."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(TOKENS, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    index_q, index_k = (
        torch.randint(-2, 3, (TOKENS, heads, DIM), generator=generator) for heads in (KV_HEADS, 1)
    )
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to("cuda", torch.int32)
    return *(x.to("cuda", dtype) for x in (q, k, v, index_q, index_k)), offsets


def close(got, expected, dtype, terms=1):
    """Weights and the result are rounded to `dtype`: half a unit each of the largest value, `terms` times."""
    unit = 2.0 ** -BITS[dtype]
    error = (got.double() - expected).abs().max().item()
    assert error <= terms * unit * expected.abs().max().item(), error


@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_is_the_cpu_s(dtype):
    *_, index_q, index_k, offsets = layer(dtype)
    ids = msa.indexer(index_q, index_k, top_k=TOP_K, cu_seqlens_q=offsets)
    assert ids.is_cuda
    expected = msa.indexer(
        index_q.cpu(), index_k.cpu(), top_k=TOP_K, cu_seqlens_q=offsets.cpu(), backend="reference"
    )
    assert torch.equal(ids.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [True, False])
def test_forward(dtype, sparse):
    q, k, v, index_q, index_k, offsets = layer(dtype)
    ids = None
    if sparse:
        ids = msa.indexer(index_q, index_k, top_k=TOP_K, cu_seqlens_q=offsets)
        out, lse = msa.sparse_attention(q, k, v, ids, cu_seqlens_q=offsets)
    else:
        out, lse = msa.dense_attention(q, k, v, cu_seqlens_q=offsets)
    assert out.dtype == dtype and lse.dtype == torch.float32
    mask = reference.batch_support(ids, LENGTHS, 128, KV_HEADS).cuda()
    expected, expected_lse = reference.attention(q, k, v, mask)
    close(out, expected, dtype)
    # Sums of 128 products in float32.
    torch.testing.assert_close(lse.double(), expected_lse, rtol=128 * 2.0**-24, atol=128 * 2.0**-24)


def test_rows_apart_in_memory():
    """Slices of one packed projection, and elements that are no neighbours."""
    q, k, v, _, _, offsets = layer()
    expected, _ = msa.dense_attention(q, k, v, cu_seqlens_q=offsets)
    packed = torch.cat((q, k, v), dim=1)
    out, _ = msa.dense_attention(*packed.split((HEADS, KV_HEADS, KV_HEADS), 1), cu_seqlens_q=offsets)
    assert torch.equal(out, expected)
    apart = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in (q, k, v)]
    assert torch.equal(msa.dense_attention(*apart, cu_seqlens_q=offsets)[0], expected)


def test_refusals():
    q, k, v, *_ = layer()
    with pytest.raises(ValueError, match="different devices"):
        msa.dense_attention(q, k.cpu(), v)
    with pytest.raises(NotImplementedError, match="cuda_generic: "):
        msa.dense_attention(q.float(), k.float(), v.float())
    with pytest.raises(NotImplementedError, match="cpu: "):
        msa.dense_attention(q, k, v, backend="cpu")


def test_workspace_on_another_device():
    q, k, v, *_ = layer()
    args = msa_cpp.DenseAttentionForward(PROBLEM, q=q, k=k, v=v, out=torch.empty_like(q))
    with pytest.raises(ValueError, match="another device"):
        msa_cpp.plan(args).run(args, workspace=torch.empty(1 << 20, dtype=torch.int8))


def slow_copy(x):
    """A copy that takes the GPU some milliseconds to make."""
    noise = torch.randn(4096, 4096, device="cuda")
    for _ in range(8):
        noise = noise @ noise.T / 4096
    return x + 0.0 * noise.abs().clamp(max=1.0)[0, 0].nan_to_num().to(x.dtype)


@pytest.mark.parametrize("explicit", [False, True])
def test_streams(explicit):
    """Inputs made late on a side stream: only a call on that stream sees them."""
    q, k, v, *_ = layer()
    expected = msa_cpp.dense_attention_forward(q, k, v, problem=PROBLEM).out
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(stream):
            late = slow_copy(q)
            if not explicit:
                out = msa_cpp.dense_attention_forward(late, k, v, problem=PROBLEM).out
        if explicit:
            out = msa_cpp.dense_attention_forward(
                late, k, v, problem=PROBLEM, stream=stream.cuda_stream
            ).out
        with torch.cuda.stream(stream):
            copy = out.clone()
        stream.synchronize()
        assert torch.equal(copy, expected)


def test_graph_capture():
    q, k, v, index_q, index_k, offsets = layer()
    ids = torch.empty(KV_HEADS, TOKENS, TOP_K, dtype=torch.int32, device="cuda")
    batch = msa_cpp.Batch(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    select = msa_cpp.Indexer(PROBLEM, batch, index_q, index_k, block_ids=ids)
    attend = msa_cpp.SparseAttentionForward(PROBLEM, batch, q, k, v, ids, out=torch.empty_like(q))
    plans = []
    for args in (select, attend):
        plan = msa_cpp.plan(args)
        memory = torch.empty(plan.workspace_bytes, dtype=torch.int8, device="cuda")
        plans.append((plan, args, memory))

    def step():
        for plan, args, memory in plans:
            plan.run(args, workspace=memory)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for old, new in zip((q, k, v, index_q, index_k), layer(seed=5), strict=False):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    replayed = attend.out.clone()
    step()
    assert torch.equal(replayed, attend.out)
    new_ids = msa.indexer(index_q, index_k, top_k=TOP_K, cu_seqlens_q=offsets)
    assert torch.equal(ids, new_ids)


def test_decode_over_pages():
    """Keys appended to pages with e4m3 values, then one query a sequence."""
    lengths = (300, 129)
    generator = torch.Generator().manual_seed(0)
    cache = msa_cpp.PagedKvCache(num_pages=8)
    sequences = [cache.create() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        cache.append(sequence, length)
    table, seq_lens = (torch.from_numpy(x).cuda() for x in cache.batch_arrays(sequences))
    offsets = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    k, v = (
        torch.randn(sum(lengths), KV_HEADS, DIM, generator=generator).to("cuda", torch.bfloat16)
        for _ in range(2)
    )
    k_pages, v_pages = (
        torch.zeros(8, KV_HEADS, 128, DIM, dtype=torch.float8_e4m3fn, device="cuda")
        for _ in range(2)
    )
    batch = msa_cpp.Batch(cu_seqlens_q=offsets, page_table=table, seq_lens_k=seq_lens)
    msa_cpp.norm_rope_append_kv(
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, problem=PROBLEM, batch=batch
    )
    q = torch.randn(2, HEADS, DIM, generator=generator).to("cuda", torch.bfloat16)
    decode = msa_cpp.Batch(page_table=table, seq_lens_k=seq_lens)
    ids = torch.arange(TOP_K, dtype=torch.int32, device="cuda").expand(KV_HEADS, 2, TOP_K)
    out, _ = msa_cpp.sparse_attention_forward(
        q, k_pages, v_pages, ids.contiguous(), problem=PROBLEM, batch=decode
    )
    for row, (begin, length) in enumerate(zip((0, 300), lengths, strict=True)):
        keys, values = (
            x[begin : begin + length].float().to(torch.float8_e4m3fn).double() for x in (k, v)
        )
        mask = torch.ones(KV_HEADS, 1, length, dtype=torch.bool, device="cuda")
        expected, _ = reference.attention(q[row : row + 1], keys, values, mask)
        close(out[row : row + 1], expected, torch.bfloat16)


def test_compile_without_gradients():
    q, k, v, index_q, index_k, offsets = layer()

    def attend(q, k, v, index_q, index_k, offsets):
        ids = msa.indexer(index_q * 1.0, index_k, top_k=TOP_K, cu_seqlens_q=offsets)
        return msa.sparse_attention(q * 1.0, k, v, ids, cu_seqlens_q=offsets)[0]

    compiled = torch.compile(attend, fullgraph=True)
    arguments = (q, k, v, index_q, index_k, offsets)
    assert torch.equal(compiled(*arguments), attend(*arguments))


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    q, k, v, *_ = layer(torch.float16)
    expected = msa_cpp.dense_attention_forward(q, k, v, problem=PROBLEM).out
    torch.cuda.synchronize()
    arrays = [cupy.from_dlpack(x) for x in (q, k, v)]
    out = cupy.empty_like(arrays[0])
    args = msa_cpp.DenseAttentionForward(PROBLEM, q=arrays[0], k=arrays[1], v=arrays[2], out=out)
    plan = msa_cpp.plan(args)
    workspace = cupy.empty(max(plan.workspace_bytes, 1), cupy.int8)
    plan.run(args, workspace=workspace, stream=cupy.cuda.get_current_stream())
    cupy.cuda.get_current_stream().synchronize()
    assert torch.equal(torch.from_dlpack(out), expected)


def test_jax_arrays_are_read():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    q, k, v, *_ = layer()
    expected = msa_cpp.dense_attention_forward(q, k, v, problem=PROBLEM).out
    torch.cuda.synchronize()
    keys = jax.dlpack.from_dlpack(k)
    out, _ = msa_cpp.dense_attention_forward(q, keys, v, problem=PROBLEM)
    assert torch.equal(out, expected)


@needs_backward
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [True, False])
def test_gradients(dtype, sparse):
    q, k, v, index_q, index_k, offsets = layer(dtype)
    shared = dict(cu_seqlens_q=offsets)
    ids = msa.indexer(index_q, index_k, top_k=TOP_K, **shared) if sparse else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if sparse:
        out, _ = msa.sparse_attention(*inputs, ids, **shared)
    else:
        out, _ = msa.dense_attention(*inputs, **shared)
    dout = torch.randn(out.shape, device="cuda").to(dtype)
    got = torch.autograd.grad(out, inputs, dout)
    mask = reference.batch_support(ids, LENGTHS, 128, KV_HEADS).cuda()
    expected_out, _ = reference.attention(*inputs, mask)
    expected = torch.autograd.grad(expected_out, inputs, dout.double())
    # Weights, score gradients, delta (from a rounded out) and the result are rounded.
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        close(a, b.double(), dtype, terms=4)


@needs_backward
@pytest.mark.parametrize("sparse", [True, False])
def test_kl_loss(sparse):
    dtype = torch.bfloat16
    q, k, _, index_q, index_k, offsets = layer(dtype)
    shared = dict(cu_seqlens_q=offsets)
    ids = msa.indexer(index_q, index_k, top_k=TOP_K, **shared) if sparse else None
    index_q, index_k = (0.5 * x for x in (index_q, index_k))
    inputs = [x.requires_grad_() for x in (index_q, index_k)]
    loss = msa.indexer_kl_loss(q, k, *inputs, ids, **shared)
    assert loss.dtype == torch.float32
    mask = reference.batch_support(ids, LENGTHS, 128, KV_HEADS).cuda()
    expected = reference.indexer_kl(q, k, *inputs, mask)
    # Scores are sums of 128 exact products in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(loss, inputs)
    for a, b in zip(got, torch.autograd.grad(expected, inputs), strict=True):
        close(a, b.double(), dtype, terms=4)


@needs_backward
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_module_trains(stage):
    """A few steps of Adam on both losses, compiled and not, lower them alike."""
    x = torch.randn(2, 600, 256, device="cuda", dtype=torch.bfloat16)
    target = torch.randn(2, 600, 256, device="cuda")
    finals = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = msa.SparseAttention(256, 16, 1, top_k=TOP_K, stage=stage).cuda()
        forward = torch.compile(module, fullgraph=True) if compiled else module
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        history = []
        for _ in range(8):
            with torch.autocast("cuda", torch.bfloat16):
                out, kl = forward(x)
            loss = (out.float() - target).square().mean()
            optimizer.zero_grad()
            (loss + kl).backward()
            optimizer.step()
            history.append((loss.item(), kl.item()))
        assert all(last < first for first, last in zip(history[0], history[-1], strict=True))
        finals.append(torch.tensor(history[-1]))
    torch.testing.assert_close(*finals, rtol=0.02, atol=1e-3)
