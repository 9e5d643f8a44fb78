# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of train.py as a Hugging Face directory: config.json, model.safetensors, tokenizer.json.

    python examples/train/export.py --checkpoint runs/msa/latest.pt --data data --out examples/mini_m3
    build/release/tools/msa run --model examples/mini_m3 --prompt 'def main('

transformers (AutoModelForCausalLM) and `msa run` load it. A GQA run is written as a model without sparse layers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import attention_torch
import checkpoint
from config import ModelConfig
from model import SWIGLU_ALPHA, SWIGLU_LIMIT, Model

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def config_json(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, note: str) -> dict[str, Any]:
    layers = range(config.num_layers)
    fields: dict[str, Any] = {"msa_note": note} if note else {}
    return fields | {
        "model_type": "minimax_m3_vl_text",
        "architectures": ["MiniMaxM3VLForCausalLM"],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rotary_dim": config.rotary_dim,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        },
        "rms_norm_eps": config.norm_eps,
        "layer_types": ["minimax_m3_sparse" if config.is_sparse(layer) else "full_attention" for layer in layers],
        "index_n_heads": config.num_kv_heads,
        "index_head_dim": config.index_dim,
        "index_block_size": config.block_size,
        "index_topk_blocks": config.top_k,
        "index_local_blocks": 1,
        "mlp_layer_types": ["sparse" if config.has_experts(layer) else "dense" for layer in layers],
        "dense_intermediate_size": config.intermediate_size,
        "intermediate_size": config.expert_size,
        "shared_intermediate_size": config.expert_size,
        "num_local_experts": max(config.num_experts, 1),
        "num_experts_per_tok": config.experts_per_token if config.num_experts else 1,
        "routed_scaling_factor": 2.0,
        "swiglu_alpha": SWIGLU_ALPHA,
        "swiglu_limit": SWIGLU_LIMIT,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id("]~!b["),
        "eos_token_id": tokenizer.token_to_id("[e~["),
    }  # fmt: skip


def export(source: pathlib.Path, tokenizer_file: pathlib.Path, out: pathlib.Path, dtype: torch.dtype, note: str = "") -> int:
    """Returns the bytes written."""
    state = checkpoint.load(source)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state["model"].items():
        name = name if name.startswith("lm_head") else f"model.{name}"
        # Norms and the choice of experts are few numbers that the results are sensitive to.
        tensors[name] = tensor.float() if tensor.dim() == 1 else tensor.to(dtype)
        if tensor.dim() == 1 and not name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].to(dtype)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    fields = config_json(state["config"], Tokenizer.from_file(str(tokenizer_file)), dtype, note)
    (out / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    return sum((out / name).stat().st_size for name in ("config.json", "model.safetensors", "tokenizer.json"))


def load_model(source: pathlib.Path, dtype: torch.dtype = torch.float32) -> Model:
    """The trained model on the CPU in float32, its weights rounded to `dtype` first: what export() wrote."""
    state = checkpoint.load(source)
    model = Model(state["config"], attention_torch)
    checkpoint.restore(model, None, state)
    return model.to(dtype).float().eval()


@torch.no_grad()
def logits_of(model: Model, ids: list[int]) -> torch.Tensor:
    """f32 [tokens, vocab]."""
    stage = "sparse" if model.config.attention == "msa" else "dense"
    return model.logits(model(torch.tensor([ids]), stage)[0])


def greedy(model: Model, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The continuation, and by how much each token's logit stands above the next one's."""
    ids, margins = list(ids), []
    for _ in range(count):
        best = logits_of(model, ids)[-1].topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return ids[-count:], margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--note", default="", help="what `msa run` shows first")
    args = parser.parse_args()
    size = export(args.checkpoint, args.data / "tokenizer.json", args.out, DTYPES[args.dtype], args.note)
    print(f"{args.out}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
