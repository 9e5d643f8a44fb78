# SPDX-License-Identifier: Apache-2.0
"""The half of bench/llama_cpp.py that runs in the virtual environment with llama-cpp-python.

    python -I bench/llama_cpp_side.py model FOLDER        # writes FOLDER/hf, FOLDER/*.gguf
    python -I bench/llama_cpp_side.py time JSON-OPTIONS   # one timed run, its report on stdout

-I keeps bench/ out of the module path, where llama_cpp.py would hide the package of that name.
"""

import json
import math
import pathlib
import shutil
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20260602
LAYERS = 4  # the first dense in attention and MLP, the others sparse with experts
SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 128, "index_n_heads": 4, "index_head_dim": 128, "index_block_size": 128,
    "index_topk_blocks": 16, "index_local_blocks": 1, "num_local_experts": 4,
    "num_experts_per_tok": 2, "intermediate_size": 128, "shared_intermediate_size": 128,
    "dense_intermediate_size": 512, "rotary_dim": 64, "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.0,
}
THETA = 5e6


def tensor_shapes():
    """Names as transformers writes them; matrices [out, in]."""
    s = SIZES
    h, d = s["hidden_size"], s["head_dim"]
    q, kv = s["num_attention_heads"] * d, s["num_key_value_heads"] * d
    yield "model.embed_tokens.weight", (s["vocab_size"], h)
    yield "lm_head.weight", (s["vocab_size"], h)
    yield "model.norm.weight", (h,)
    for n in range(LAYERS):
        p = f"model.layers.{n}."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        for name, shape in (("q_proj", (q, h)), ("k_proj", (kv, h)), ("v_proj", (kv, h)),
                            ("o_proj", (h, q)), ("q_norm", (d,)), ("k_norm", (d,))):
            yield f"{p}self_attn.{name}.weight", shape
        if n == 0:
            i = s["dense_intermediate_size"]
            yield p + "mlp.gate_up_proj.weight", (2 * i, h)
            yield p + "mlp.down_proj.weight", (h, i)
            continue
        x = s["index_head_dim"]
        yield p + "self_attn.indexer.q_proj.weight", (s["index_n_heads"] * x, h)
        yield p + "self_attn.indexer.k_proj.weight", (x, h)
        yield p + "self_attn.indexer.q_norm.weight", (x,)
        yield p + "self_attn.indexer.k_norm.weight", (x,)
        e, i, shared = s["num_local_experts"], s["intermediate_size"], s["shared_intermediate_size"]
        yield p + "mlp.gate.weight", (e, h)
        yield p + "mlp.gate.e_score_correction_bias", (e,)
        yield p + "mlp.experts.gate_up_proj", (e, 2 * i, h)
        yield p + "mlp.experts.down_proj", (e, h, i)
        yield p + "mlp.shared_experts.gate_up_proj.weight", (2 * shared, h)
        yield p + "mlp.shared_experts.down_proj.weight", (h, shared)


def make_weights():
    """Random f32 values that bf16, f16 and f32 all hold exactly, so that every file is one model."""
    generator = np.random.default_rng(SEED)
    weights = {}
    for name, shape in tensor_shapes():
        std = 1 / math.sqrt(shape[-1])
        if "norm" in name:
            std = 0.1  # norms multiply by 1 + weight
        elif "bias" in name:
            std = 0.05
        elif "embed_tokens" in name:
            std = 1.0
        values = (generator.standard_normal(shape) * std).astype(np.float32)
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        values[np.abs(values) < 2.0**-14] = 0  # f16 has fewer bits below its normal range
        assert np.array_equal(values.astype(np.float16).astype(np.float32), values)
        weights[name] = values
    return weights


def write_huggingface(folder, weights):
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "msa_note": "random weights: the text that this checkpoint writes means nothing",
        "model_type": "minimax_m3_vl_text", "dtype": "bfloat16", "num_hidden_layers": LAYERS,
        **SIZES, "hidden_act": "silu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * (LAYERS - 1),
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1), "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5},
        "bos_token_id": None, "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copy(HERE.parent / "examples" / "tiny_m3" / "tokenizer.json", folder)
    header, offset = {}, 0
    for name, values in weights.items():
        header[name] = {"dtype": "BF16", "shape": values.shape,
                        "data_offsets": [offset, offset + 2 * values.size]}
        offset += 2 * values.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in weights.values():
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def write_gguf(path, weights, dtype):
    """What the converter of llama.cpp writes: norms with the 1 added; norms, router and indexer f32."""
    import gguf

    s = SIZES
    writer = gguf.GGUFWriter(path, "minimax-m3")
    arch = "minimax-m3."
    for key, value in {
        "context_length": s["max_position_embeddings"], "embedding_length": s["hidden_size"],
        "block_count": LAYERS, "feed_forward_length": s["dense_intermediate_size"],
        "attention.head_count": s["num_attention_heads"],
        "attention.head_count_kv": s["num_key_value_heads"],
        "attention.key_length": s["head_dim"], "attention.value_length": s["head_dim"],
        "rope.dimension_count": s["rotary_dim"], "vocab_size": s["vocab_size"],
        "expert_count": s["num_local_experts"], "expert_used_count": s["num_experts_per_tok"],
        "expert_feed_forward_length": s["intermediate_size"], "expert_shared_count": 1,
        "expert_gating_func": 2, "leading_dense_block_count": 1,
        "attention.indexer.head_count": s["index_n_heads"],
        "attention.indexer.key_length": s["index_head_dim"],
        "attention.indexer.top_k": s["index_topk_blocks"],
        "attention.indexer.block_size": s["index_block_size"],
        "attention.indexer.local_blocks": s["index_local_blocks"],
    }.items():
        writer.add_uint32(arch + key, value)
    writer.add_float32(arch + "attention.layer_norm_rms_epsilon", s["rms_norm_eps"])
    writer.add_float32(arch + "rope.freq_base", THETA)
    writer.add_float32(arch + "expert_weights_scale", s["routed_scaling_factor"])
    writer.add_bool(arch + "expert_weights_norm", True)
    writer.add_string("tokenizer.ggml.model", "none")

    def add(name, values):
        single = values.ndim == 1 or ".indexer." in name or "ffn_gate_inp" in name
        if name.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32 if single else dtype))

    def add_pair(prefix, suffix, packed):
        gate, up = np.split(packed, 2, axis=-2)
        add(prefix + f"ffn_gate{suffix}.weight", gate)
        add(prefix + f"ffn_up{suffix}.weight", up)

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output.weight", weights["lm_head.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    for n in range(LAYERS):
        theirs, ours = f"blk.{n}.", f"model.layers.{n}."
        add(theirs + "attn_norm.weight", weights[ours + "input_layernorm.weight"])
        add(theirs + "ffn_norm.weight", weights[ours + "post_attention_layernorm.weight"])
        for a, b in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"),
                     ("attn_output", "o_proj"), ("attn_q_norm", "q_norm"), ("attn_k_norm", "k_norm")):
            add(f"{theirs}{a}.weight", weights[f"{ours}self_attn.{b}.weight"])
        if n == 0:
            add_pair(theirs, "", weights[ours + "mlp.gate_up_proj.weight"])
            add(theirs + "ffn_down.weight", weights[ours + "mlp.down_proj.weight"])
            continue
        for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
            add(f"{theirs}indexer.{part}.weight", weights[f"{ours}self_attn.indexer.{part}.weight"])
        add(theirs + "ffn_gate_inp.weight", weights[ours + "mlp.gate.weight"])
        add(theirs + "exp_probs_b.bias", weights[ours + "mlp.gate.e_score_correction_bias"])
        add_pair(theirs, "_exps", weights[ours + "mlp.experts.gate_up_proj"])
        add(theirs + "ffn_down_exps.weight", weights[ours + "mlp.experts.down_proj"])
        add_pair(theirs, "_shexp", weights[ours + "mlp.shared_experts.gate_up_proj.weight"])
        add(theirs + "ffn_down_shexp.weight", weights[ours + "mlp.shared_experts.down_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_model(folder):
    weights = make_weights()
    write_huggingface(folder / "hf", weights)
    write_gguf(folder / "f16.gguf", weights, np.float16)
    write_gguf(folder / "f32.gguf", weights, np.float32)


class Llama:
    """One sequence in llama.cpp, through the C API."""

    MODES = {
        "msa": {},  # what the model asks for; runs only where flash attention is on
        "dense": {"n_seq_max": 2, "kv_unified": True},  # falls back to dense flash attention
        "dense_no_flash": {"flash_attn_type": 0},  # falls back to dense attention
    }

    def __init__(self, options):
        import llama_cpp

        self.api = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            options["gguf"].encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp can't load {options['gguf']}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-options["context"] // 256) * 256
        params.n_batch, params.n_ubatch = max(2048, options["ubatch"]), options["ubatch"]
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = 1
        types = {"f32": 0, "f16": 1, "bf16": 30}  # enum ggml_type, of which the package names a part
        params.type_k = params.type_v = types[options["cache"]]
        params.offload_kqv, params.op_offload, params.no_perf = False, False, True
        for name, value in self.MODES[options["mode"]].items():
            setattr(params, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp can't make a context for {options}"
        self.n_batch = params.n_batch
        self.batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def feed(self, ids, position, want_logits):
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 0
        batch.logits[count - 1] = int(want_logits)
        start = time.perf_counter()
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        assert status == 0, f"llama_decode of {count} tokens at {position} returns {status}"
        return seconds

    def logits(self):
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (SIZES["vocab_size"],)).copy()

    def forget(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)


def time_llama(options):
    ids = np.fromfile(options["ids"], np.int32).tolist()
    prefill, llama = options["prefill"], Llama(options | {"context": len(ids)})
    llama.feed(ids[: min(512, len(ids))], 0, True)
    llama.forget()
    report, seconds, logits = {"prefill": [], "decode": []}, 0.0, []
    for begin in range(0, prefill, llama.n_batch):
        end = min(begin + llama.n_batch, prefill)
        seconds += llama.feed(ids[begin:end], begin, end == prefill)
        report["prefill"].append({"tokens": end, "seconds": seconds})
    logits.append(llama.logits())
    for position in range(prefill, len(ids)):
        report["decode"].append(llama.feed(ids[position : position + 1], position, True))
        logits.append(llama.logits())
    np.stack(logits).tofile(options["logits"])
    report["system"] = llama.api.llama_print_system_info().decode()
    report["peak_memory_bytes"] = peak_memory_bytes()
    print(json.dumps(report))


def peak_memory_bytes():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if sys.argv[1] == "model":
        make_model(pathlib.Path(sys.argv[2]))
    else:
        time_llama(json.loads(sys.argv[2]))
