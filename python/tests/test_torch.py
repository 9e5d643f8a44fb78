# SPDX-License-Identifier: Apache-2.0
"""msa_cpp.torch on the CPU, in float64 (the reference backend) where gradients are compared: they
then differ from autograd's by the order of sums only. test_torch_cuda.py has the GPU's tests."""

import pytest

torch = pytest.importorskip("torch")

import torch_reference as reference  # noqa: E402

import msa_cpp  # noqa: E402
import msa_cpp.torch as msa  # noqa: E402
from msa_cpp import _arrays  # noqa: E402

BLOCK, TOP_K = 16, 3
# Sums of some hundred terms of order 1 in another order.
TIGHT = dict(rtol=1e-11, atol=1e-11)


def layer(lengths=(90,), dtype=torch.float64, seed=0, requires_grad=True):
    """q, k, v, index_q, index_k of 4 query heads and 2 KV heads, and the offsets of the sequences."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    shapes = ((tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (tokens, 2, 32), (tokens, 1, 32))
    tensors = [
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for s in shapes
    ]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return *tensors, (offsets if len(lengths) > 1 else None)


def gradients_of(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def test_tensors_are_not_copied():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32):
        tensor = torch.zeros(3, 4, 5, dtype=dtype)[1:, ::2]
        view = _arrays.import_array("x", tensor, writable=True, stream=None)
        assert view.pointer == tensor.data_ptr()
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    view = _arrays.import_array("x", parameter, writable=False, stream=None)
    assert view.pointer == parameter.data_ptr()


def test_functions_return_tensors():
    q, k, v, index_q, index_k, _ = layer(dtype=torch.bfloat16, requires_grad=False)
    problem = msa_cpp.Problem(4, 2, 16, 32, BLOCK, TOP_K)
    ids = msa_cpp.indexer(index_q, index_k, problem=problem)
    out, lse = msa_cpp.sparse_attention_forward(q, k, v, ids, problem=problem)
    assert ids.dtype == torch.int32 and out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected, _ = reference.attention(q, k, v, reference.support(ids, 90, BLOCK))
    # Weights and results rounded to 8 bits; values up to 4.
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=4 * 2.0**-8)


@pytest.mark.parametrize("lengths", [(90,), (40, 1, 49)])
@pytest.mark.parametrize("sparse", [True, False])
def test_attention(lengths, sparse):
    q, k, v, index_q, index_k, offsets = layer(lengths)
    if sparse:
        ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=TOP_K, cu_seqlens_q=offsets)
        assert not ids.requires_grad and ids.shape == (2, 90, TOP_K)
        out, lse = msa.sparse_attention(q, k, v, ids, block_size=BLOCK, cu_seqlens_q=offsets)
    else:
        ids = None
        out, lse = msa.dense_attention(q, k, v, cu_seqlens_q=offsets)
    assert not lse.requires_grad
    mask = reference.batch_support(ids, lengths, BLOCK, kv_heads=2)
    expected, expected_lse = reference.attention(q, k, v, mask)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(lse, expected_lse, **TIGHT)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    got = gradients_of((out * weights).sum(), q, k, v)
    for a, b in zip(got, gradients_of((expected * weights).sum(), q, k, v), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_gradcheck():
    q, k, v, index_q, index_k, _ = layer((40,))
    ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=2)

    def attend(q, k, v):
        return msa.sparse_attention(q, k, v, ids, block_size=BLOCK)[0]

    def align(index_q, index_k):
        return msa.indexer_kl_loss(q.detach(), k.detach(), index_q, index_k, ids, block_size=BLOCK)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)
    assert torch.autograd.gradcheck(align, (index_q, index_k), fast_mode=True)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_gradients_that_are_not_contiguous(kind):
    q, k, v, index_q, index_k, _ = layer()
    ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=TOP_K)
    dense = torch.randn(90, 4, 16, dtype=torch.float64)
    dout = {
        "expanded": torch.ones(1, 1, 1, dtype=torch.float64).expand(90, 4, 16),
        "transposed": dense.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "sliced": dense.repeat_interleave(2, dim=-1)[..., ::2],
    }[kind]
    results = []
    for gradient in (dout, dout.contiguous()):
        out, _ = msa.sparse_attention(q, k, v, ids, block_size=BLOCK)
        results.append(torch.autograd.grad(out, (q, k, v), gradient))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_inputs_that_are_not_contiguous():
    q, k, v, *_ = layer()
    expected, _ = msa.dense_attention(q, k, v)
    packed = torch.cat((q, k, v), dim=1)
    out, _ = msa.dense_attention(*packed.split((4, 2, 2), dim=1))
    assert torch.equal(out, expected)
    got = gradients_of(out.square().sum(), q, k, v)
    for a, b in zip(got, gradients_of(expected.square().sum(), q, k, v), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [(90,), (40, 1, 49)])
@pytest.mark.parametrize("sparse", [True, False])
def test_indexer_kl_loss(lengths, sparse):
    q, k, _, index_q, index_k, offsets = layer(lengths)
    shared = dict(block_size=BLOCK, cu_seqlens_q=offsets)
    ids = msa.indexer(index_q, index_k, top_k=TOP_K, **shared) if sparse else None
    loss = msa.indexer_kl_loss(q, k, index_q, index_k, ids, loss_coefficient=0.25, **shared)
    assert loss.shape == () and loss.dtype == torch.float64
    mask = reference.batch_support(ids, lengths, BLOCK, kv_heads=2)
    expected = 0.25 * reference.indexer_kl(q.detach(), k.detach(), index_q, index_k, mask)
    torch.testing.assert_close(loss, expected, **TIGHT)
    got = gradients_of(3.0 * loss, index_q, index_k)
    for a, b in zip(got, gradients_of(3.0 * expected, index_q, index_k), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.parametrize("sparse", [True, False])
def test_kl_loss_takes_the_lse_of_attention(sparse):
    q, k, v, index_q, index_k, _ = layer()
    ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=TOP_K) if sparse else None
    attend = (q, k, v, ids) if sparse else (q, k, v)
    _, lse = (msa.sparse_attention if sparse else msa.dense_attention)(*attend, block_size=BLOCK)
    got = msa.indexer_kl_loss(q, k, index_q, index_k, ids, lse=lse, block_size=BLOCK)
    expected = msa.indexer_kl_loss(q, k, index_q, index_k, ids, block_size=BLOCK)
    torch.testing.assert_close(got, expected, **TIGHT)


def test_teacher_gets_no_gradient():
    q, k, _, index_q, index_k, _ = layer()
    msa.indexer_kl_loss(q, k, index_q, index_k).backward()
    assert q.grad is None and k.grad is None
    assert index_q.grad.abs().sum() > 0 and index_k.grad.abs().sum() > 0


def test_kl_loss_without_gradients():
    q, k, _, index_q, index_k, _ = layer()
    expected = msa.indexer_kl_loss(q, k, index_q, index_k)
    with torch.no_grad():
        assert torch.equal(msa.indexer_kl_loss(q, k, index_q, index_k), expected)


def test_gradients_have_the_dtypes_of_inputs():
    q, k, v, index_q, index_k, _ = layer(dtype=torch.bfloat16)
    ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=TOP_K)
    out, _ = msa.sparse_attention(q, k, v, ids, block_size=BLOCK)
    loss = msa.indexer_kl_loss(q, k, index_q, index_k, ids, block_size=BLOCK)
    assert loss.dtype == torch.float32
    mask = reference.support(ids, 90, BLOCK)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, index_q, index_k)]
    expected = reference.attention(*wide[:3], mask)[0].sum()
    expected = expected + reference.indexer_kl(wide[0].detach(), wide[1].detach(), *wide[3:], mask)
    got = gradients_of(out.float().sum() + loss, q, k, v, index_q, index_k)
    for a, b in zip(got, gradients_of(expected, *wide), strict=True):
        assert a.dtype == torch.bfloat16
        # out, on which dq and dk depend through a difference, and the result are rounded to 8 bits.
        assert (a.double() - b).abs().max() <= 4 * 2.0**-8 * b.abs().max()


def test_second_derivatives_are_refused():
    q, k, v, *_ = layer()
    (dq,) = torch.autograd.grad(msa.dense_attention(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), q)


def test_paged_keys_have_no_gradient():
    q, *_ = layer((2,))
    pages = torch.zeros(1, 2, BLOCK, 16, dtype=torch.float64)
    options = dict(
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens_k=torch.full((1,), 5, dtype=torch.int32),
        block_size=BLOCK,
    )
    with pytest.raises(NotImplementedError, match="paged"):
        msa.dense_attention(q, pages, pages, **options)
    out, _ = msa.dense_attention(q.detach(), pages, pages, **options)
    assert torch.equal(out, torch.zeros_like(out))


def test_workspaces_of_bytes():
    q, k, v, *_ = layer(dtype=torch.float32, requires_grad=False)
    problem = msa_cpp.Problem(4, 2, 16, 32, BLOCK, TOP_K)
    args = msa_cpp.DenseAttentionForward(problem, q=q, k=k, v=v, out=torch.empty_like(q))
    plan = msa_cpp.plan(args)
    for dtype in (torch.int8, torch.uint8):
        args.out.zero_()
        plan.run(args, workspace=torch.empty(plan.workspace_bytes, dtype=dtype))
        assert torch.equal(args.out, msa.dense_attention(q, k, v, block_size=BLOCK)[0])


def test_negated_views():
    q, k, v, *_ = layer(requires_grad=False)
    expected, _ = msa.dense_attention(-q, k, v)
    assert torch.equal(msa.dense_attention(torch._neg_view(q), k, v)[0], expected)


def test_errors_are_python_s():
    q, k, v, *_ = layer()
    with pytest.raises(ValueError, match="num_q_heads"):
        msa.dense_attention(q[:, :3], k, v)
    with pytest.raises(NotImplementedError, match="cpu: "):
        msa.dense_attention(q, k, v, backend="cpu")


OPERATORS = torch.ops.msa_cpp


def operator_arguments(lengths):
    q, k, v, index_q, index_k, offsets = layer(lengths)
    ids = msa.indexer(index_q, index_k, block_size=BLOCK, top_k=TOP_K, cu_seqlens_q=offsets)
    sequences = (offsets, offsets)
    paging, bounds, choice = (None, None), (0, 0), (None, True)
    attention = (0.0, BLOCK, *sequences, *paging, *bounds, *choice)
    backward = (0.0, BLOCK, *sequences, *bounds, *choice)
    kl = (0.0, 0.0, 1.0, BLOCK, *sequences, *bounds)
    out, lse, dout = (x.detach() for x in (q, q[..., 0], q))
    plain = [x.detach() for x in (q, k, v)]
    return [
        (
            OPERATORS.indexer,
            (index_q, index_k, BLOCK, TOP_K, 0, 1, *sequences, *paging, *bounds, None),
        ),
        (OPERATORS.attention, (q, k, v, ids, *attention)),
        (OPERATORS.attention, (q, k, v, None, *attention)),
        (OPERATORS.attention_backward, (*plain, ids, out, lse, dout, *backward)),
        (OPERATORS.indexer_kl, (*plain[:2], index_q, index_k, ids, lse, *kl, True, *choice)),
        (OPERATORS.indexer_kl, (*plain[:2], index_q, index_k, None, None, *kl, False, *choice)),
    ]


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("lengths", [(40,), (20, 30)])
def test_opcheck(index, lengths):
    operator, arguments = operator_arguments(lengths)[index]
    if operator is OPERATORS.indexer or arguments[-3] is False:
        arguments = tuple(x.detach() if torch.is_tensor(x) else x for x in arguments)
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_whole_graph(backend):
    def losses(q, k, v, index_q, index_k, offsets):
        shared = dict(block_size=BLOCK, cu_seqlens_q=offsets)
        ids = msa.indexer(index_q, index_k, top_k=TOP_K, **shared)
        out, _ = msa.sparse_attention(q * 1.5, k, v, ids, **shared)
        warm, _ = msa.dense_attention(q, k, v, **shared)
        kl = msa.indexer_kl_loss(q, k, index_q, index_k, ids, **shared)
        return (out - warm).square().mean() + kl

    *tensors, offsets = layer((40, 50))
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    loss = compiled(*tensors, offsets)
    expected = losses(*tensors, offsets)
    torch.testing.assert_close(loss, expected, **TIGHT)
    got = gradients_of(loss, *tensors)
    for a, b in zip(got, gradients_of(expected, *tensors), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_compile_with_changing_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: msa.dense_attention(q, k, v)[0], fullgraph=True, dynamic=True,
        backend="aot_eager",
    )  # fmt: skip
    for tokens in (30, 47, 64):
        q, k, v, *_ = layer((tokens,))
        assert torch.equal(compiled(q, k, v), msa.dense_attention(q, k, v)[0])
