#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoint beside this file: config.json, model.safetensors, tokenizer.json.

A MiniMax-M3 text model with random weights, small enough for a repository and with the released
model's attention geometry: heads of 128, blocks of 128 tokens, 16 of them per query, one index head
per KV head. Layer 0 has a dense MLP, layer 1 experts. The tokenizer is trained on this repository.

Written with transformers 5.23.0, tokenizers 0.23.3, torch 2.11.0 (CPU). Weights depend on the seed
and torch only, the tokenizer on the repository's text.
"""

import json
import math
import pathlib

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEED = 20260602
VOCAB_SIZE = 2048
NOTE = "random weights: the text that this checkpoint writes means nothing"

# The released models' names: begin of text, begin of a turn, end of a turn, tool calls, thoughts.
SPECIAL_TOKENS = ["]~!b[", "]~b]", "[e~[", "]<]minimax[>["]
OTHER_TOKENS = ["<mm:think>", "</mm:think>"]
# Words with one leading sign or space and an English ending, digits by three, signs, line ends.
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def repository_text():
    """The text of cmake/document.sh, nearly: documents and sources, in a fixed order."""
    files = [
        path
        for folder in ("docs", "include", "src", "tools", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".md", ".h", ".hpp", ".cpp")
    ]
    for path in sorted(files):
        yield path.read_text(encoding="utf-8")


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(OTHER_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(repository_text(), trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens(OTHER_TOKENS)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def make_config(tokenizer):
    return MiniMaxM3VLTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1048576,
        # transformers takes the width of the rotation from the factor and ignores rotary_dim.
        rotary_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        layer_types=["minimax_m3_sparse"] * 2,
        index_n_heads=2,
        index_head_dim=128,
        index_block_size=128,
        index_topk_blocks=16,
        index_local_blocks=1,
        mlp_layer_types=["dense", "sparse"],
        dense_intermediate_size=512,
        intermediate_size=192,
        shared_intermediate_size=192,
        num_local_experts=4,
        num_experts_per_tok=2,
        bos_token_id=tokenizer.token_to_id("]~!b["),
        eos_token_id=tokenizer.token_to_id("[e~["),
        dtype="bfloat16",
    )


@torch.no_grad()
def set_weights(model):
    """Every matrix keeps the size of what it is applied to: standard deviation 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in sorted(model.named_parameters()):
        std = 1.0 / math.sqrt(weight.shape[-1])
        if "norm" in name:
            std = 0.1  # norms multiply by 1 + weight
        elif "embed_tokens" in name:
            std = 1.0
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    for name, buffer in sorted(model.named_buffers()):
        if "e_score_correction_bias" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.05)


@torch.no_grad()
def check(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(HERE, attn_implementation="eager")
    assert type(model) is MiniMaxM3VLForCausalLM and model.dtype == torch.bfloat16
    assert 2 * model.model.rotary_emb.inv_freq.numel() == model.config.rotary_dim
    text = "".join(repository_text())[:9000]
    ids = torch.tensor([tokenizer.encode(text).ids])
    output = model(ids, output_hidden_states=True)
    sizes = [f"{h.float().square().mean().sqrt():.2f}" for h in output.hidden_states]
    logits = output.logits.float()
    assert torch.isfinite(logits).all()
    print(f"  prompt of {ids.shape[1]} tokens: rms of hidden states {sizes}, of logits {logits.square().mean().sqrt():.2f}")
    written = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    print(f"  greedy continuation: {tokenizer.decode(written.tolist())!r}")


def main():
    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, torch {torch.__version__}")
    tokenizer = make_tokenizer()
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    model = MiniMaxM3VLForCausalLM(make_config(tokenizer))
    set_weights(model)
    model.to(torch.bfloat16).save_pretrained(HERE)
    (HERE / "generation_config.json").unlink()
    config = json.loads((HERE / "config.json").read_text())
    (HERE / "config.json").write_text(json.dumps({"msa_note": NOTE, **config}, indent=2) + "\n")
    total = 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        size = (HERE / name).stat().st_size
        total += size
        print(f"  {name}: {size} bytes")
    assert total <= 8 * 2**20
    text = "".join(repository_text())
    print(f"  {len(text.encode()) / len(tokenizer.encode(text).ids):.2f} bytes per token of this repository")
    check(tokenizer)


if __name__ == "__main__":
    main()
