# SPDX-License-Identifier: Apache-2.0
"""msa_cpp.torch.SparseAttention: stages, gradients, packing, names, torch.compile, transformers."""

import pytest

torch = pytest.importorskip("torch")

import torch_reference as reference  # noqa: E402

from msa_cpp.torch import SparseAttention, rotary_table  # noqa: E402

TIGHT = dict(rtol=1e-10, atol=1e-10)
SHAPE = dict(
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    index_dim=16,
    block_size=16,
    top_k=2,
    rotary_dim=8,
    rope_theta=100.0,
)


def make(stage="sparse", dtype=torch.float64, **options):
    torch.manual_seed(0)
    module = SparseAttention(**SHAPE, stage=stage, **options).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def hidden(*shape, dtype=torch.float64):
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plain(module, x, stage):
    """The module on one sequence [tokens, hidden], with torch_reference's attention."""
    rotary = module.rotary(torch.arange(len(x)))
    q, k, v = module.main_branch(x, rotary)
    index_q, index_k = module.index_branch(x, rotary)
    ids = module.select(index_q, index_k) if stage == "sparse" else None
    mask = reference.batch_support(ids, (len(x),), module.block_size, module.num_kv_heads)
    out, _ = reference.attention(q, k, v, mask)
    loss = reference.indexer_kl(q.detach(), k.detach(), index_q, index_k, mask)
    return module.o_proj(out.flatten(-2)), module.loss_coefficient * loss


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_stages_against_autograd(stage):
    module = make(stage, loss_coefficient=0.5)
    x = hidden(70).requires_grad_()
    out, loss = module(x)
    expected, expected_loss = plain(module, x, stage)
    torch.testing.assert_close(out, expected, **TIGHT)
    torch.testing.assert_close(loss, expected_loss, **TIGHT)
    inputs = [x, *module.parameters()]
    got = torch.autograd.grad(out.square().sum() + loss, inputs)
    want = torch.autograd.grad(expected.square().sum() + expected_loss, inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_each_loss_trains_its_own_parameters():
    module = make()
    x = hidden(70).requires_grad_()
    names = {name for name, _ in module.named_parameters()}
    index_names = {name for name in names if name.startswith("index_")}
    for pick, trained in ((0, names - index_names), (1, index_names)):
        module.zero_grad()
        x.grad = None
        module(x)[pick].sum().backward()
        reached = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == trained
        assert (x.grad is None) == (pick == 1)


def test_dense_stage_and_no_loss():
    module = make("dense")
    x = hidden(70)
    out, loss = module(x)
    assert loss == 0.0
    warm, warm_loss = module(x, stage="warmup")
    assert torch.equal(out, warm) and warm_loss > 0.0
    assert module(x, stage="sparse", with_loss=False)[1] == 0.0
    with pytest.raises(ValueError, match="stage is 'cold'"):
        module(x, stage="cold")


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_batched_packed_and_single_agree(stage):
    module = make(stage)
    x = hidden(3, 40)
    out, loss = module(x)
    offsets = torch.tensor([0, 40, 80, 120], dtype=torch.int32)
    packed, packed_loss = module(x.flatten(0, 1), cu_seqlens=offsets)
    torch.testing.assert_close(out.flatten(0, 1), packed, **TIGHT)
    torch.testing.assert_close(loss, packed_loss, **TIGHT)
    single = [module(row) for row in x]
    torch.testing.assert_close(out, torch.stack([o for o, _ in single]), **TIGHT)
    torch.testing.assert_close(loss, torch.stack([kl for _, kl in single]).mean(), **TIGHT)


def test_packed_sequences_of_other_lengths():
    module = make()
    x = hidden(60)
    out, _ = module(x, cu_seqlens=torch.tensor([0, 25, 25, 60], dtype=torch.int32))
    torch.testing.assert_close(out[25:], module(x[25:])[0], **TIGHT)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_compile_whole_graph(stage):
    torch._dynamo.reset()
    module = make(stage)
    x = hidden(2, 40).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = [x, *module.parameters()]
    results = []
    for run in (compiled, module):
        out, loss = run(x)
        results.append((out, loss, *torch.autograd.grad(out.square().sum() + loss, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def test_autocast_and_bfloat16():
    x = hidden(2, 40, dtype=torch.float32)
    module = make(dtype=torch.float32)
    exact, exact_loss = module(x, stage="warmup")
    with torch.autocast("cpu", torch.bfloat16):
        out, loss = module(x, stage="warmup")
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32
    (out.float().square().sum() + loss).backward()
    assert module.q_proj.weight.grad.dtype == torch.float32
    half, half_loss = module.bfloat16()(x.bfloat16(), stage="warmup")
    assert half.dtype == torch.bfloat16
    # Some ten roundings to 8 bits between input and output, of numbers of the size of the largest.
    for other, other_loss in ((out, loss), (half, half_loss)):
        assert (other.float() - exact).abs().max() < 10 * 2.0**-8 * exact.abs().max()
        assert (other_loss - exact_loss).abs() < 10 * 2.0**-8 * exact_loss


def test_rotary_table():
    cos, sin = rotary_table(torch.tensor([0, 3, 1 << 20]), 8, 5e6)
    angles = torch.tensor([0.0, 3.0, 1 << 20], dtype=torch.float64)[:, None]
    angles = angles * 5e6 ** (-torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(cos, angles.cos().float())
    torch.testing.assert_close(sin, angles.sin().float())


def test_names_and_both_spellings():
    module = make()
    state = module.state_dict()
    assert set(state) == {
        f"{prefix}{name}.weight"
        for prefix, names in (
            ("", ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            ("index_", ("q_proj", "k_proj", "q_norm", "k_norm")),
        )
        for name in names
    }
    theirs = {name.replace("index_", "indexer."): value for name, value in state.items()}
    other = SparseAttention(**SHAPE).double()
    other.load_state_dict(theirs)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name])


def test_rotary_dim_is_checked():
    with pytest.raises(ValueError, match="rotary_dim is 18"):
        SparseAttention(**{**SHAPE, "rotary_dim": 18})


def test_against_transformers():
    """The attention of transformers' MiniMax-M3, with its state dict as it is."""
    name = "transformers.models.minimax_m3_vl"
    modeling = pytest.importorskip(f"{name}.modeling_minimax_m3_vl")
    configuration = pytest.importorskip(f"{name}.configuration_minimax_m3_vl")
    config = configuration.MiniMaxM3VLTextConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=16,
        index_topk_blocks=2,
        index_local_blocks=1,
        num_hidden_layers=1,
        layer_types=["minimax_m3_sparse"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
        },
    )
    config._attn_implementation = "eager"
    torch.manual_seed(2)
    theirs = modeling.MiniMaxM3VLAttention(config, 0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = SparseAttention.from_config(config).double()
    ours.load_state_dict(theirs.state_dict())
    x = hidden(2, 70).requires_grad_()
    positions = torch.arange(70)[None]
    rotary = modeling.MiniMaxM3VLRotaryEmbedding(config)(x, positions)
    expected, _ = theirs(x, rotary, None, position_ids=positions)
    out, _ = ours(x)
    # Theirs norms and takes the softmax in float32: 2e-7 each, times sums of some tens of terms.
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    names = [f"{part}_proj.weight" for part in "qkvo"] + ["q_norm.weight", "k_norm.weight"]
    results = []
    for module, output in ((ours, out), (theirs, expected)):
        parameters = dict(module.named_parameters())
        inputs = [x, *(parameters[name] for name in names)]
        results.append(torch.autograd.grad(output.sin().sum(), inputs))
    for name, a, b in zip(["x", *names], *results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
