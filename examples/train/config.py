# SPDX-License-Identifier: Apache-2.0
"""Sizes of the model and the schedule of a run; `PRESETS` has the ones that the documents use."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Attention = Literal["gqa", "msa"]
Stage = Literal["dense", "warmup", "sparse"]


@dataclass(frozen=True)
class ModelConfig:
    """The MiniMax-M3 text architecture; the first `num_dense_layers` attend densely, as M3's first three do."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_dense_layers: int = 1
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    index_dim: int = 64
    block_size: int = 128
    top_k: int = 8
    rotary_dim: int = 32
    rope_theta: float = 1e5  # M3 has 5e6 for 1M tokens; faster rotations make heads that look one token back easier
    intermediate_size: int = 768
    num_experts: int = 0  # 0: dense MLPs; else layers from num_dense_layers on have experts and a shared one
    experts_per_token: int = 2
    expert_size: int = 256
    norm_eps: float = 1e-6
    max_positions: int = 1048576
    attention: Attention = "msa"

    def is_sparse(self, layer: int) -> bool:
        return self.attention == "msa" and layer >= self.num_dense_layers

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.num_dense_layers


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one length of context."""

    share: float  # of all steps
    length: int  # tokens per row
    tokens: int  # per step, of all rows
    recall_rows: float  # share of rows with planted facts, the rest is text alone
    planted: float  # share of tokens of such a row that belong to planted facts


@dataclass(frozen=True)
class Schedule:
    steps: int = 2700
    # Short rows and small steps first: copying from the context emerges after a number of steps, not of tokens,
    # and sooner where facts are near.
    phases: tuple[Phase, ...] = (
        Phase(0.20, 128, 16384, 0.8, 0.7),
        Phase(0.22, 256, 16384, 0.7, 0.6),
        Phase(0.26, 1024, 32768, 0.6, 0.5),
        Phase(0.18, 4096, 65536, 0.5, 0.4),
        Phase(0.11, 32768, 65536, 0.5, 0.25),
        Phase(0.03, 65536, 65536, 0.5, 0.2),
    )
    # Rows of up to top_k blocks are attended whole in both stages: the run from scratch is sparse from 4096 tokens on.
    warmup_share: float = 0.42  # of the steps: dense attention, index branch trained on all tokens
    convert_at: float = 0.77  # where the converted run leaves the GQA run
    convert_warmup_share: float = 0.25  # of the converted run's own steps
    lr: float = 3e-3
    lr_warmup_steps: int = 100
    final_lr: float = 0.1  # of lr
    weight_decay: float = 0.1
    clip: float = 1.0
    kl_coefficient: float = 1.0
    seed: int = 20260602

    def phase_of(self, step: int) -> Phase:
        done = 0.0
        for phase in self.phases:
            done += phase.share
            if step < round(done * self.steps):
                return phase
        return self.phases[-1]

    def convert_step(self) -> int:
        return round(self.convert_at * self.steps)


@dataclass(frozen=True)
class Preset:
    model: ModelConfig
    schedule: Schedule


PRESETS: dict[str, Preset] = {
    # 9.8 million parameters, 19.6 MB in bf16.
    "mini": Preset(ModelConfig(), Schedule()),
    # Everything at toy size, for smoke.py and tests on a CPU.
    "smoke": Preset(
        ModelConfig(
            vocab_size=640, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
            index_dim=32, block_size=16, top_k=4, rotary_dim=16, intermediate_size=128,
        ),
        Schedule(
            steps=24, lr_warmup_steps=4, warmup_share=0.4, convert_at=0.5, convert_warmup_share=0.4,
            phases=(Phase(0.5, 128, 1024, 0.5, 0.5), Phase(0.5, 256, 1024, 0.5, 0.5)),
        ),
    ),
}


def to_dict(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def model_from_dict(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**fields)


def schedule_from_dict(fields: dict[str, Any]) -> Schedule:
    phases = tuple(Phase(**phase) for phase in fields["phases"])
    return Schedule(**{**fields, "phases": phases})
