# SPDX-License-Identifier: Apache-2.0
"""The attention of a MiniMax-M3 layer as a torch.nn.Module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops

Stage = Literal["dense", "warmup", "sparse"]


class RMSNorm(nn.Module):
    """Per-head RMS norm with weights trained as 1 + weight, in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim]; the result is at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide * scale * (1.0 + self.weight.to(wide.dtype))


def rotary_table(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [*positions.shape, rotary_dim / 2]. positions: any integers."""
    # Angles of far positions need float64: float32 has 24 bits for the position and its fraction.
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * theta ** (-exponents / rotary_dim)
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first dims of each head, in halves. x: [tokens, heads, dim]."""
    cos, sin = (table.to(x.dtype)[:, None, :] for table in rotary)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class SparseAttention(nn.Module):
    """MiniMax Sparse Attention with its projections, per-head norms and partial RoPE.

    Parameters have the names of MiniMax-M3's checkpoint below `self_attn.`: q_proj, k_proj, v_proj,
    o_proj, q_norm, k_norm, index_q_proj, index_k_proj, index_q_norm, index_k_norm (no biases). State
    dicts with transformers' `indexer.q_proj` spelling load too. The index branch reads a detached
    input and only the KL loss trains it; everything else is trained by what is done with the output.

    Stages: "sparse", attention over selected blocks and the KL loss on them; "warmup", dense attention
    and the KL loss on every visible token; "dense", dense attention without the index branch.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 64,
        num_kv_heads: int = 4,
        head_dim: int = 128,
        *,
        index_dim: int = 128,
        block_size: int = 128,
        top_k: int = 16,
        num_init_blocks: int = 0,
        num_local_blocks: int = 1,
        rotary_dim: int = 64,
        rope_theta: float = 5e6,
        norm_eps: float = 1e-6,
        stage: Stage = "sparse",
        loss_coefficient: float = 1.0,
        backend: str | None = None,
        deterministic: bool = True,
    ) -> None:
        super().__init__()
        if rotary_dim % 2 or rotary_dim > min(head_dim, index_dim):
            raise ValueError(
                f"rotary_dim is {rotary_dim}, expected an even number up to "
                f"{min(head_dim, index_dim)}"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.index_dim = head_dim, index_dim
        self.block_size, self.top_k = block_size, top_k
        self.num_init_blocks, self.num_local_blocks = num_init_blocks, num_local_blocks
        self.rotary_dim, self.rope_theta = rotary_dim, rope_theta
        self.stage: Stage = stage
        self.loss_coefficient = loss_coefficient
        self.backend, self.deterministic = backend, deterministic
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)
        self.index_q_proj = nn.Linear(hidden_size, num_kv_heads * index_dim, bias=False)
        self.index_k_proj = nn.Linear(hidden_size, index_dim, bias=False)
        self.index_q_norm = RMSNorm(index_dim, norm_eps)
        self.index_k_norm = RMSNorm(index_dim, norm_eps)

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> SparseAttention:
        """For the text part of a transformers MiniMax-M3 configuration."""
        rope = config.rope_parameters
        arguments = dict(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            index_dim=config.index_head_dim,
            block_size=config.index_block_size,
            top_k=config.index_topk_blocks,
            num_local_blocks=config.index_local_blocks,
            rotary_dim=int(config.head_dim * rope.get("partial_rotary_factor", 1.0)),
            rope_theta=rope["rope_theta"],
            norm_eps=config.rms_norm_eps,
        )
        return cls(**(arguments | overrides))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            theirs = f"{prefix}indexer.{name}.weight"
            if theirs in state_dict:
                state_dict[f"{prefix}index_{name}.weight"] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of forward(rotary=...), which layers can share. positions: integers [tokens]."""
        return rotary_table(positions, self.rotary_dim, self.rope_theta)

    def main_branch(
        self, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim] of x [tokens, hidden]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim))
        return _rotate(q, rotary).to(v.dtype), _rotate(k, rotary).to(v.dtype), v

    def index_branch(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """index_q [tokens, num_kv_heads, index_dim] and index_k [tokens, 1, index_dim], of x detached."""
        x = x.detach()
        index_q, index_k = self.index_q_proj(x), self.index_k_proj(x)
        dtype = index_q.dtype
        index_q = self.index_q_norm(index_q.unflatten(-1, (self.num_kv_heads, self.index_dim)))
        index_k = self.index_k_norm(index_k.unflatten(-1, (1, self.index_dim)))
        return _rotate(index_q, rotary).to(dtype), _rotate(index_k, rotary).to(dtype)

    def select(
        self, index_q: Tensor, index_k: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Block ids, int32 [num_kv_heads, tokens, top_k], of what index_branch() returns."""
        return ops.indexer(
            index_q,
            index_k,
            block_size=self.block_size,
            top_k=self.top_k,
            num_init_blocks=self.num_init_blocks,
            num_local_blocks=self.num_local_blocks,
            cu_seqlens_q=cu_seqlens,
            backend=self.backend,
        )

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        stage: Stage | None = None,
        with_loss: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Returns the output, shaped like x, and loss_coefficient times the KL loss, a float32 scalar (0 in
        the dense stage and without with_loss).

        x: [batch, tokens, hidden], or packed [tokens, hidden] with cu_seqlens, int32 [batch + 1].
        rotary: self.rotary(positions) for all batch * tokens; default: positions from 0 in each sequence.
        stage: default self.stage.
        """
        stage = self.stage if stage is None else stage
        if stage not in ("dense", "warmup", "sparse"):
            raise ValueError(f"stage is {stage!r}, expected 'dense', 'warmup' or 'sparse'")
        shape, device = x.shape, x.device
        tokens = torch.arange(shape.numel() // shape[-1], device=device)
        if x.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens is for packed x [tokens, hidden], x has 3 dimensions")
            if shape[0] > 1:
                cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32, device=device) * shape[1]
            positions = tokens % shape[1]
            x = x.reshape(-1, shape[-1])
        elif cu_seqlens is None:
            positions = tokens
        else:
            sequence = torch.searchsorted(cu_seqlens, tokens, right=True, out_int32=True) - 1
            positions = tokens - cu_seqlens[sequence]
        if rotary is None:
            rotary = self.rotary(positions)

        q, k, v = self.main_branch(x, rotary)
        block_ids: Tensor | None = None
        index_q: Any = None
        index_k: Any = None
        if stage == "sparse" or (stage == "warmup" and with_loss):
            index_q, index_k = self.index_branch(x, rotary)
        if stage == "sparse":
            block_ids = self.select(index_q, index_k, cu_seqlens)
        shared: dict[str, Any] = dict(
            block_size=self.block_size,
            cu_seqlens_q=cu_seqlens,
            backend=self.backend,
            deterministic=self.deterministic,
        )
        if block_ids is None:
            out, lse = ops.dense_attention(q, k, v, **shared)
        else:
            out, lse = ops.sparse_attention(q, k, v, block_ids, **shared)
        if stage == "dense" or not with_loss:
            loss = torch.zeros((), device=device)
        else:
            loss = ops.indexer_kl_loss(
                q,
                k,
                index_q,
                index_k,
                block_ids,
                lse=lse,
                loss_coefficient=self.loss_coefficient,
                **shared,
            )
        return self.o_proj(out.flatten(-2)).view(shape), loss

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"index_dim={self.index_dim}, block_size={self.block_size}, top_k={self.top_k}, "
            f"stage={self.stage!r}"
        )
