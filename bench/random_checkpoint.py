# SPDX-License-Identifier: Apache-2.0
"""A MiniMax-M3 checkpoint of one sparse layer with random weights, for measuring long contexts.

    python3 bench/random_checkpoint.py FOLDER    # config.json, model.safetensors, tokenizer.json

16 query and 4 KV heads of 128, index keys of 128, blocks of 128 tokens of which 16 are read, hidden size
256, a dense MLP of 512, bf16. The tokenizer has one token per byte, so that a text's length is its number
of tokens. Needs nothing but Python's standard library.
"""

import array
import json
import math
import pathlib
import random
import struct
import sys

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, INDEX_DIM, VOCAB = 256, 512, 16, 4, 128, 128, 256
SEED = 20260602

CONFIG = {
    "msa_note": "random weights: the text that this checkpoint writes means nothing",
    "model_type": "minimax_m3_vl_text",
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "layer_types": ["minimax_m3_sparse"],
    "index_n_heads": KV_HEADS,
    "index_head_dim": INDEX_DIM,
    "index_block_size": 128,
    "index_topk_blocks": 16,
    "index_local_blocks": 1,
    "mlp_layer_types": ["dense"],
    "dense_intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 1048576,
    "rotary_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def shapes():
    layer = "model.layers.0."
    attention = layer + "self_attn."
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        attention + "q_proj.weight": (HEADS * DIM, HIDDEN),
        attention + "k_proj.weight": (KV_HEADS * DIM, HIDDEN),
        attention + "v_proj.weight": (KV_HEADS * DIM, HIDDEN),
        attention + "o_proj.weight": (HIDDEN, HEADS * DIM),
        attention + "q_norm.weight": (DIM,),
        attention + "k_norm.weight": (DIM,),
        attention + "indexer.q_proj.weight": (KV_HEADS * INDEX_DIM, HIDDEN),
        attention + "indexer.k_proj.weight": (INDEX_DIM, HIDDEN),
        attention + "indexer.q_norm.weight": (INDEX_DIM,),
        attention + "indexer.k_norm.weight": (INDEX_DIM,),
        layer + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        layer + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def random_bf16(generator, name, shape):
    """Every matrix keeps the size of what it is applied to: standard deviation 1 / sqrt(inputs)."""
    std = 0.1 if "norm" in name else 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(shape[-1])
    values = array.array("f", (generator.gauss(0.0, std) for _ in range(math.prod(shape))))
    if sys.byteorder == "big":
        values.byteswap()
    full = values.tobytes()
    half = bytearray(len(full) // 2)  # a bf16 is the upper half of an f32
    half[0::2], half[1::2] = full[2::4], full[3::4]
    return bytes(half)


def write_safetensors(path):
    generator = random.Random(SEED)
    header, data = {}, []
    offset = 0
    for name, shape in shapes().items():
        data.append(random_bf16(generator, name, shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data[-1])]}
        offset += len(data[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def tokenizer():
    # Byte-level tokenizers write bytes that are no printable Latin-1 letters as letters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"\S+|\s+"}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": letters, "merges": []},
    }


def write(folder):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()) + "\n")
    write_safetensors(folder / "model.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1])
