# SPDX-License-Identifier: Apache-2.0
"""The MiniMax-M3 text architecture in PyTorch; parameters have the names that transformers gives them.

Three stages: "dense", attention over all tokens without the index branch; "warmup", the same output, with the
KL loss that trains the index branch on all visible tokens; "sparse", attention over the blocks that the index
branch selects, with the KL loss on those.
"""

from __future__ import annotations

import importlib
import math
import types
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, Stage

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def attention_operations(name: str, device: torch.device) -> types.ModuleType:
    """"msa", "flex" or "torch"; "auto" is the first of them that this machine has."""
    modules = {"msa": "msa_cpp.torch", "flex": "attention_flex", "torch": "attention_torch"}
    if name != "auto":
        return importlib.import_module(modules[name])
    try:
        return importlib.import_module(modules["msa"])
    except ImportError:
        return importlib.import_module(modules["flex" if device.type == "cuda" else "torch"])


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight.float())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels in halves. x: [tokens, heads, dim]; cos, sin: [tokens, 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0)


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Router(nn.Module):
    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))


class Experts(nn.Module):
    def __init__(self, hidden: int, size: int, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))


class Moe(nn.Module):
    """Sigmoid scores, the top ones renormalised and doubled, beside a shared expert. Few experts: each
    computes all tokens, which keeps shapes fixed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.gate = Router(config.hidden_size, config.num_experts)
        self.experts = Experts(config.hidden_size, config.expert_size, config.num_experts)
        self.shared_experts = Mlp(config.hidden_size, config.expert_size)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate.weight.float()))
        chosen = (scores + self.gate.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * scores
        weights = 2.0 * picked / picked.sum(-1, keepdim=True)
        out = self.shared_experts(x)
        for expert in range(weights.shape[-1]):
            hidden = swiglu(F.linear(x, self.experts.gate_up_proj[expert]))
            out = out + F.linear(hidden, self.experts.down_proj[expert]) * weights[:, expert, None].to(out.dtype)
        return out


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.index_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.index_dim, bias=False)
        self.q_norm = RMSNorm(config.index_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.index_dim, config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(dim, config.norm_eps)
        self.k_norm = RMSNorm(dim, config.norm_eps)
        self.indexer = Indexer(config) if config.is_sparse(layer) else None


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = Moe(config) if config.has_experts(layer) else Mlp(config.hidden_size, config.intermediate_size)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, with_index: bool) -> tuple[Tensor, ...]:
        """x: [tokens, hidden] -> q [tokens, heads, dim], k, v [tokens, kv heads, dim] and, if asked for, index q
        [tokens, kv heads, index dim] and index k [tokens, 1, index dim]."""
        attention, dim = self.self_attn, self.config.head_dim
        x = self.input_layernorm(x)
        v = attention.v_proj(x).unflatten(-1, (-1, dim))
        q = rotate(attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, dim))), cos, sin).to(v.dtype)
        k = rotate(attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, dim))), cos, sin).to(v.dtype)
        if not with_index:
            return q, k, v
        indexer, dim = attention.indexer, self.config.index_dim
        x = x.detach()  # the KL loss trains the index branch only (paper eq. 11)
        index_q = rotate(indexer.q_norm(indexer.q_proj(x).unflatten(-1, (-1, dim))), cos, sin).to(v.dtype)
        index_k = rotate(indexer.k_norm(indexer.k_proj(x).unflatten(-1, (-1, dim))), cos, sin).to(v.dtype)
        return q, k, v, index_q, index_k

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """x: [tokens, hidden] before the layer; out: [tokens, heads, dim] of the attention."""
        x = x + self.self_attn.o_proj(out.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, stage: Stage, ops: Any) -> tuple[Tensor, Tensor | None]:
        shared = {"block_size": self.config.block_size, "cu_seqlens_q": cu}
        if stage == "dense" or self.self_attn.indexer is None:
            q, k, v = self.project(x, cos, sin, False)
            return self.finish(x, ops.dense_attention(q, k, v, **shared)[0]), None
        q, k, v, index_q, index_k = self.project(x, cos, sin, True)
        block_ids = None
        # Where every query selects all that it sees, both stages are the same.
        if stage == "sparse" and int(x.shape[0]) // (cu.numel() - 1) > self.config.block_size * self.config.top_k:
            block_ids = ops.indexer(index_q, index_k, top_k=self.config.top_k, **shared)
            out, lse = ops.sparse_attention(q, k, v, block_ids, **shared)
        else:
            out, lse = ops.dense_attention(q, k, v, **shared)
        loss = None
        if torch.is_grad_enabled():
            loss = ops.indexer_kl_loss(q, k, index_q, index_k, block_ids, lse=lse, **shared)
        return self.finish(x, out), loss


class Model(nn.Module):
    def __init__(self, config: ModelConfig, ops: Any) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def rotary(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, f32 [rows * length, 1, rotary_dim / 2]."""
        config, device = self.config, self.lm_head.weight.device
        exponents = torch.arange(0, config.rotary_dim, 2, device=device).double() / config.rotary_dim
        angles = torch.arange(length, device=device).double()[:, None] * config.rope_theta**-exponents
        angles = angles.repeat(rows, 1)[:, None]
        return angles.cos().float(), angles.sin().float()

    def forward(self, ids: Tensor, stage: Stage) -> tuple[Tensor, list[Tensor]]:
        """ids: [rows, length] -> normalised hidden states [rows * length, hidden] and the layers' KL losses."""
        rows, length = ids.shape
        cos, sin = self.rotary(rows, length)
        cu = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=ids.device)
        x = self.embed_tokens(ids.flatten())
        losses = []
        for layer in self.layers:
            x, loss = layer(x, cos, sin, cu, stage, self.ops)
            if loss is not None:
                losses.append(loss)
        return self.norm(x), losses

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()


def initialise(model: Model, seed: int) -> None:
    """Every weight from (seed, its name): models that share a name share its values."""
    depth = 1.0 / math.sqrt(2 * model.config.num_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Unit-size q and k give scores up to sqrt(dim), too flat for one key among 64K: start sharper.
                weight.fill_(0.4)
                continue
            if weight.dim() == 1:
                continue
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            std = weight.shape[-1] ** -0.5
            if "embed_tokens" in name:
                std = 0.5
            elif "o_proj" in name or "down_proj" in name:
                std *= depth
            elif "lm_head" in name:
                std *= 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def compile_parts(model: Model, dynamic: bool) -> None:
    """Compiles what stands between attentions: once per number of tokens of a step, or once for all."""
    for layer in model.layers:
        layer.project = torch.compile(layer.project, dynamic=dynamic)  # type: ignore[method-assign]
        layer.finish = torch.compile(layer.finish, dynamic=dynamic)  # type: ignore[method-assign]
