# SPDX-License-Identifier: Apache-2.0
"""Writes tests/model/fixtures: tiny random MiniMax-M3 checkpoints and what transformers makes of them.

Made with transformers 5.23.0 and torch 2.11.0, float32, eager attention, on a CPU:

    pip install torch==2.11.0 transformers==5.23.0
    python tests/model/make_model_fixtures.py

Each folder is a checkpoint directory with one file more, expected.safetensors:
    prompt            I32 [tokens]
    positions         I32 [rows]: positions of the prompt, ascending, the last one included
    logits            F32 [rows, vocab]
    block_ids.<layer> I32 [index heads, rows, top_k], ascending, then -1; sparse layers only
    greedy            I32 [64]: the continuation with cached decoding
    greedy_logits     F32 [64, vocab]: the logits that chose each of them

A choice between near-equals would test rounding, not the model, so the seed of each checkpoint is the
first one with which every selection of blocks and experts and every greedy token is clear of the next
candidate by a margin far above float32 rounding.
"""

import contextlib
import json
import pathlib
import shutil

import safetensors.torch
import torch
import transformers
from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NUM_GREEDY = 64

# Margins, and the rounding that they stand above. Index scores are dot products of up to 128 terms of
# size about 2, so their float32 error is about 1e-5; expert scores lie in (0, 1), error about 1e-7;
# logits are of size 5 and may differ by 1e-4 of that.
BLOCK_MARGIN = 1e-4
EXPERT_MARGIN = 2e-6
TOKEN_MARGIN = 5e-3

SPARSE, FULL = "minimax_m3_sparse", "full_attention"
COMMON = dict(
    vocab_size=256,
    num_experts_per_tok=2,
    num_local_experts=4,
    max_position_embeddings=8192,
    eos_token_id=None,
    bos_token_id=None,
    hidden_act="silu",
)
CASES = {
    # Few selected of many small blocks; dense and sparse attention, dense and MoE layers.
    "group2_block16": dict(
        config=dict(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, rotary_dim=16, intermediate_size=48, dense_intermediate_size=96,
            shared_intermediate_size=32, index_n_heads=2, index_head_dim=32, index_block_size=16,
            index_topk_blocks=4, layer_types=[FULL, SPARSE, SPARSE, SPARSE],
            mlp_layer_types=["dense", "sparse", "sparse", "dense"],
        ),
        tokens=333,
    ),
    # The shape of real blocks, a prompt beyond 2048 tokens, one KV head.
    "group8_block128": dict(
        config=dict(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
            head_dim=128, rotary_dim=64, intermediate_size=48, dense_intermediate_size=64,
            shared_intermediate_size=48, index_n_heads=1, index_head_dim=128, index_block_size=128,
            index_topk_blocks=4, layer_types=[SPARSE, SPARSE], mlp_layer_types=["dense", "sparse"],
        ),
        tokens=2313,
    ),
    # More slots than blocks, so attention is dense; tied embeddings, two local blocks, in shards.
    "group1_all_blocks": dict(
        config=dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=64, rotary_dim=32, intermediate_size=32, dense_intermediate_size=64,
            shared_intermediate_size=32, index_n_heads=4, index_head_dim=64, index_block_size=128,
            index_topk_blocks=16, index_local_blocks=2, tie_word_embeddings=True,
            layer_types=[FULL, SPARSE], mlp_layer_types=["sparse", "sparse"],
        ),
        tokens=517,
        shard_size="100KB",
    ),
    # Released spelling of config.json and tensor names; selection matters beyond 1024 tokens.
    "group4_released": dict(
        config=dict(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
            head_dim=64, rotary_dim=32, intermediate_size=48, dense_intermediate_size=64,
            shared_intermediate_size=48, index_n_heads=2, index_head_dim=64, index_block_size=64,
            index_topk_blocks=16, layer_types=[FULL, SPARSE, SPARSE],
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
        tokens=2177,
        released=True,
    ),
}


def make_model(config, seed):
    """A random model whose attention is far from uniform and whose logits are of size 5."""
    torch.manual_seed(seed)
    model = MiniMaxM3VLForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                # Norms multiply by 1 + weight; queries and keys of twice unit size sharpen attention.
                sharp = 1.0 if ".q_norm" in name or ".k_norm" in name else 0.0
                parameter.copy_(sharp + 0.1 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


@contextlib.contextmanager
def watch_choices(record):
    """Calls record(scores, k) for every top-k inside: 4-D for blocks, 2-D for experts."""
    original = torch.Tensor.topk
    original_function = torch.topk

    def topk(self, k, *arguments, **options):
        record(self, k)
        return original(self, k, *arguments, **options)

    def topk_function(values, k, *arguments, **options):
        record(values, k)
        return original_function(values, k, *arguments, **options)

    torch.Tensor.topk = topk
    torch.topk = topk_function
    try:
        yield
    finally:
        torch.Tensor.topk = original
        torch.topk = original_function


class Margins:
    """Smallest distance of a chosen candidate from the best one that was not chosen."""

    def __init__(self):
        self.block = float("inf")
        self.expert = float("inf")

    def __call__(self, scores, k):
        if k >= scores.shape[-1]:
            return
        ordered = scores.sort(dim=-1, descending=True).values
        margin = ordered[..., k - 1] - ordered[..., k]
        margin = margin[torch.isfinite(ordered[..., k])]  # -inf: everything visible is chosen
        if margin.numel() == 0:
            return
        if scores.ndim == 4:
            self.block = min(self.block, margin.min().item())
        else:
            self.expert = min(self.expert, margin.min().item())


def evaluate(model, prompt):
    """Logits of the prompt, selected blocks per sparse layer, greedy continuation, margins."""
    margins = Margins()
    blocks = {}
    hooks = []

    def keep_first(index):
        def hook(module, inputs, output):  # returns None: what a hook returns replaces the output
            blocks.setdefault(index, output)

        return hook

    for index, layer in enumerate(model.model.layers):
        if layer.self_attn.indexer is not None:
            hooks.append(layer.self_attn.indexer.register_forward_hook(keep_first(index)))
    with torch.no_grad(), watch_choices(margins):
        result = model(input_ids=prompt[None], use_cache=True)
        logits = result.logits[0]
        cache, last = result.past_key_values, logits[-1]
        greedy, greedy_logits, token_margin = [], [], float("inf")
        for _ in range(NUM_GREEDY):
            best = last.topk(2)
            token_margin = min(token_margin, (best.values[0] - best.values[1]).item())
            greedy.append(best.indices[0].item())
            greedy_logits.append(last)
            result = model(
                input_ids=torch.tensor([[greedy[-1]]]), past_key_values=cache, use_cache=True
            )
            last = result.logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits, blocks, greedy, torch.stack(greedy_logits), margins, token_margin


def positions_of(tokens, block):
    """The first and last, both sides of block edges, and some between."""
    edges = {e + d for e in range(0, tokens, max(block, tokens // 6)) for d in (-1, 0, 1)}
    spread = {i * (tokens - 1) // 7 for i in range(8)}
    return sorted(p for p in edges | spread if 0 <= p < tokens)


def ascending(ids, top_k):
    """[heads, rows, k] in any order with -1 -> ascending, -1 behind, top_k columns."""
    large = torch.iinfo(torch.int64).max
    ordered = ids.masked_fill(ids < 0, large).sort(dim=-1).values
    ordered = ordered.masked_fill(ordered == large, -1)
    padding = ordered.new_full((*ordered.shape[:-1], top_k - ordered.shape[-1]), -1)
    return torch.cat([ordered, padding], dim=-1).to(torch.int32)


def released_name(name):
    """A tensor name as the released checkpoint spells it."""
    name = name.replace("lm_head", "language_model.lm_head") if name.startswith("lm_head") else name
    name = "language_model." + name if name.startswith("model.") else name
    for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
        name = name.replace(f"self_attn.indexer.{part}", f"self_attn.index_{part}")
    return name


def released_tensors(model, config):
    tensors = {}
    for name, value in model.state_dict().items():
        is_moe = ".mlp." in name and config.mlp_layer_types[int(name.split(".")[2])] == "sparse"
        base = name.replace(".mlp.", ".block_sparse_moe.") if is_moe else name
        base = base.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")
        if base.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                stem = base.replace("experts.gate_up_proj", f"experts.{expert}")
                tensors[f"{stem}.w1.weight"], tensors[f"{stem}.w3.weight"] = gate, up
        elif base.endswith("experts.down_proj"):
            for expert, matrix in enumerate(value):
                tensors[base.replace("experts.down_proj", f"experts.{expert}.w2.weight")] = matrix
        elif base.endswith("gate_up_proj.weight"):
            gate, up = value.chunk(2)
            tensors[base.replace("gate_up_proj", "gate_proj")] = gate
            tensors[base.replace("gate_up_proj", "up_proj")] = up
        else:
            tensors[base] = value
    return {released_name(name): value.clone().contiguous() for name, value in tensors.items()}


def released_config(config):
    layers = config.num_hidden_layers
    sparse = [int(kind == SPARSE) for kind in config.layer_types]
    text = {
        key: getattr(config, key)
        for key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rotary_dim", "intermediate_size", "dense_intermediate_size",
            "shared_intermediate_size", "vocab_size", "num_experts_per_tok", "num_local_experts",
            "max_position_embeddings", "rms_norm_eps", "routed_scaling_factor", "swiglu_alpha",
            "swiglu_limit",
        )
    }
    text |= {
        "hidden_act": "swigluoai",
        "rope_theta": 5000000,
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": config.index_head_dim,
            "sparse_num_index_heads": config.index_n_heads,
            "sparse_topk_blocks": config.index_topk_blocks,
            "sparse_block_size": config.index_block_size,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": config.index_local_blocks,
            "sparse_attention_freq": sparse,
            "sparse_disable_index_value": [1] * layers,
        },
    }
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": text,
    }


def dense_difference(model, prompt, logits):
    """How far the logits move when every layer attends everything."""
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.indexer = None
    with torch.no_grad():
        dense = model(input_ids=prompt[None], use_cache=False).logits[0]
    for layer, indexer in zip(model.model.layers, indexers):
        layer.self_attn.indexer = indexer
    return (dense[-1] - logits[-1]).abs().max().item()


def write_case(name, case):
    # transformers rotates head_dim * partial_rotary_factor channels and does not read rotary_dim.
    factor = case["config"]["rotary_dim"] / case["config"]["head_dim"]
    config = MiniMaxM3VLTextConfig(**COMMON, **case["config"], partial_rotary_factor=factor)
    for seed in range(200):
        model = make_model(config, seed)
        prompt = torch.randint(config.vocab_size, (case["tokens"],))
        logits, blocks, greedy, greedy_logits, margins, token_margin = evaluate(model, prompt)
        print(f"  seed {seed}: block {margins.block:.1e}, expert {margins.expert:.1e}, "
              f"token {token_margin:.1e}", flush=True)
        if (margins.block > BLOCK_MARGIN and margins.expert > EXPERT_MARGIN
                and token_margin > TOKEN_MARGIN):
            break
    else:
        raise SystemExit(f"{name}: no seed has clear choices")
    scale = logits.abs().max().item()
    moved = dense_difference(model, prompt, logits)
    num_blocks = -(-case["tokens"] // config.index_block_size)
    print(f"{name}: seed {seed}, logits up to {scale:.1f}, {num_blocks} blocks, dense attention moves "
          f"the last logits by {moved:.2e}")
    if num_blocks > config.index_topk_blocks and moved < 100 * 1e-4 * scale:
        raise SystemExit(f"{name}: the selection hardly matters")

    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if case.get("released"):
        safetensors.torch.save_file(released_tensors(model, config), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(released_config(config), indent=1) + "\n")
    else:
        model.save_pretrained(folder, max_shard_size=case.get("shard_size", "1GB"))
        (folder / "generation_config.json").unlink(missing_ok=True)
    positions = torch.tensor(positions_of(case["tokens"], config.index_block_size))
    expected = {
        "prompt": prompt.to(torch.int32),
        "positions": positions.to(torch.int32),
        "logits": logits[positions].contiguous(),
        "greedy": torch.tensor(greedy, dtype=torch.int32),
        "greedy_logits": greedy_logits.contiguous(),
    }
    for layer, ids in blocks.items():
        expected[f"block_ids.{layer}"] = ascending(
            ids[0][:, positions], config.index_topk_blocks
        ).contiguous()
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for case_name, case_spec in CASES.items():
        write_case(case_name, case_spec)
