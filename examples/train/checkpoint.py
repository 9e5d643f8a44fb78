# SPDX-License-Identifier: Apache-2.0
"""One file per checkpoint, the same for one process, DDP and FSDP: whole tensors by parameter name."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from config import ModelConfig, Schedule, model_from_dict, schedule_from_dict, to_dict


def whole(value: Any) -> Any:
    """A tensor's full value on the CPU; a collective operation where it is sharded."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def placed(value: Any, like: Tensor) -> Any:
    """The inverse: on the device of `like` and sharded as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:  # AdamW's step: beside the weight where the update is one CUDA kernel, else on the CPU
        return value.to(like.device) if like.device.type == "cuda" else value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Every process must call this; it copies from the device."""
    state: dict[str, Any] = {"model": {name: whole(tensor) for name, tensor in model.state_dict().items()}}
    if optimizer is not None:
        state["optimizer"] = {
            name: {key: whole(value) for key, value in optimizer.state[weight].items()}
            for name, weight in model.named_parameters()
        }
    return state


def save(path: pathlib.Path, state: dict[str, Any], model: ModelConfig, schedule: Schedule, **fields: Any) -> None:
    """Atomic: a run that is stopped here leaves the checkpoint before."""
    part = path.with_suffix(".part")
    torch.save({**state, "config": to_dict(model), "schedule": to_dict(schedule), **fields}, part)
    os.replace(part, path)


def load(path: pathlib.Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    state["config"] = model_from_dict(state["config"])
    state["schedule"] = schedule_from_dict(state["schedule"])
    return state


def restore(model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]) -> list[str]:
    """Returns the parameters that the checkpoint lacks (the index branch of a GQA checkpoint): they keep
    their values and start without moments."""
    missing = []
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in state["model"]:
                tensor.copy_(placed(state["model"][name], tensor))
            else:
                missing.append(name)
    for name, weight in model.named_parameters():
        if optimizer is not None and name in state.get("optimizer", {}):
            moments = state["optimizer"][name]
            optimizer.state[weight] = {key: placed(value, weight) for key, value in moments.items()}
    return missing
