# SPDX-License-Identifier: Apache-2.0
"""Trains one of three models on the same tokens in the same order.

    python examples/train/train.py --data data --out runs --recipe gqa
    python examples/train/train.py --data data --out runs --recipe msa        # warmup, then sparse
    python examples/train/train.py --data data --out runs --recipe converted  # from runs/gqa/convert.pt, then likewise
    torchrun --nproc-per-node 2 examples/train/train.py ... --parallel fsdp

A run goes on from its latest.pt where there is one; --minutes stops it in time, after writing that file. A
run that was stopped gives the same weights as one that was not. log.csv has one line per --log-every steps.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import datetime
import json
import math
import os
import pathlib
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoint
import tasks
from config import PRESETS, ModelConfig, Schedule, Stage
from model import Model, attention_operations, compile_parts, initialise

FIELDS = ("step", "stage", "length", "loss", "text", "answer", "accuracy", "repeat", "kl", "norm", "index_norm", "lr", "tokens_per_s", "seconds")


class Objective(nn.Module):
    """Loss and metrics of some rows; what DDP and FSDP wrap."""

    def __init__(self, model: Model, kl_coefficient: float) -> None:
        super().__init__()
        self.model, self.kl_coefficient = model, kl_coefficient
        self.register_buffer("weights", torch.tensor(tasks.WEIGHTS), persistent=False)

    def head(self, hidden: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss, and sums over text and answers: [text loss, texts, answer loss, answers
        right, answers, repetitions right, repetitions]."""
        logits = self.model.logits(hidden)
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * self.weights[kinds.long()]).sum() / targets.numel()
        with torch.no_grad():
            text, answer, repeat = ((kinds == kind).float() for kind in (tasks.TEXT, tasks.ANSWER, tasks.REPEAT))
            right = (logits.argmax(-1) == targets).float()
            values = (losses * text, text, losses * answer, right * answer, answer, right * repeat, repeat)
            sums = torch.stack([value.sum() for value in values])
        return loss, sums

    def forward(self, ids: Tensor, kinds: Tensor, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
        hidden, kl_losses = self.model(ids[:, :-1], stage)
        loss, sums = self.head(hidden, ids[:, 1:].flatten(), kinds.flatten())
        kl = torch.stack(kl_losses).sum() if kl_losses else loss.new_zeros(())
        return loss + self.kl_coefficient * kl, sums, kl.detach()


def stage_of(run: str, step: int, schedule: Schedule) -> Stage:
    if run == "gqa":
        return "dense"
    if run == "msa":
        return "warmup" if step < schedule.warmup_share * schedule.steps else "sparse"
    own_steps = schedule.steps - schedule.convert_step()
    return "warmup" if step - schedule.convert_step() < schedule.convert_warmup_share * own_steps else "sparse"


def learning_rate(step: int, schedule: Schedule) -> float:
    done = min(1.0, step / schedule.steps)
    cosine = schedule.final_lr + (1 - schedule.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
    return schedule.lr * min(1.0, (step + 1) / schedule.lr_warmup_steps) * cosine


def is_index(name: str) -> bool:
    return ".indexer." in name


def make_optimizer(model: Model, schedule: Schedule, fused: bool) -> torch.optim.AdamW:
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        (decayed if weight.dim() >= 2 and "embed" not in name else plain).append(weight)
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95), eps=1e-10, fused=fused)


class Trainer:
    def __init__(self, args: argparse.Namespace, config: ModelConfig, schedule: Schedule) -> None:
        self.args, self.config, self.schedule = args, config, schedule
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = torch.device(args.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.folder = args.out / args.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        model = Model(config, attention_operations(args.attention, self.device))
        initialise(model, schedule.seed)
        self.model = model.to(self.device)
        self.objective: nn.Module = Objective(self.model, schedule.kl_coefficient).to(self.device)
        if args.compile != "none":
            compile_parts(self.model, dynamic=args.compile == "dynamic")
            self.objective.head = torch.compile(self.objective.head, dynamic=args.compile == "dynamic")  # type: ignore[method-assign]
        if self.world > 1 and args.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in self.model.layers:
                fully_shard(layer)
            fully_shard(self.objective)
        elif self.world > 1:
            self.objective = nn.parallel.DistributedDataParallel(self.objective)
        self.optimizer = make_optimizer(self.model, schedule, fused=self.device.type == "cuda")
        self.step, self.seconds = 0, 0.0
        self.resume()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{self.args.recipe}: {text}", flush=True)

    def resume(self) -> None:
        latest, converted = self.folder / "latest.pt", self.args.recipe == "converted"
        source = latest if latest.exists() else self.args.out / "gqa" / "convert.pt" if converted else None
        if source is None:
            self.say(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M parameters, attention by {self.model.ops.__name__}")
            return
        state = checkpoint.load(source)
        missing = checkpoint.restore(self.model, self.optimizer, state)
        unexpected = [name for name in missing if not (converted and is_index(name))]
        if unexpected:
            raise ValueError(f"{source} lacks {unexpected}")
        if state["schedule"] != self.schedule:
            raise ValueError(f"{source} belongs to another schedule: {state['schedule']}")
        self.step, self.seconds = state["step"], state["seconds"] if source == latest else 0.0
        self.say(f"goes on from step {self.step} of {source}")

    def save(self, name: str) -> None:
        state = checkpoint.collect(self.model, self.optimizer)
        if self.rank == 0:
            path = self.folder / name
            checkpoint.save(path, state, self.config, self.schedule, step=self.step, seconds=self.seconds, run=self.args.recipe)

    def train_step(self, batch: dict[str, Tensor], stage: Stage) -> tuple[Tensor, ...]:
        ids, kinds = (batch[name].to(self.device, non_blocking=True) for name in ("ids", "kinds"))
        parts = max(1, min(self.args.accumulate, len(ids)))
        totals: list[Tensor] = []
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()
        for part, (some_ids, some_kinds) in enumerate(zip(ids.chunk(parts), kinds.chunk(parts))):
            share = len(some_ids) / len(ids)
            last = part == parts - 1
            ddp = isinstance(self.objective, nn.parallel.DistributedDataParallel)
            with self.objective.no_sync() if ddp and not last else contextlib.nullcontext():
                with autocast:
                    loss, sums, kl = self.objective(some_ids, some_kinds, stage)
                (loss * share).backward()
            values = [(loss * share).detach(), sums, kl * share]
            totals = [a + b for a, b in zip(totals, values)] if totals else values
        norms = []
        for index in (False, True):  # apart, so that the KL loss does not shrink the model's steps
            some = [w for name, w in self.model.named_parameters() if is_index(name) == index]
            norms.append(nn.utils.clip_grad_norm_(some, self.schedule.clip) if some else torch.zeros(()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return *totals, checkpoint_norm(norms[0]), checkpoint_norm(norms[1])

    def stops(self, deadline: float) -> bool:
        stop = time.monotonic() > deadline
        if self.world > 1:
            flag = torch.tensor(float(stop), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = bool(flag)
        return stop

    def train(self) -> bool:
        """Returns whether the run is complete."""
        args, schedule = self.args, self.schedule
        begin = time.monotonic()
        before = self.seconds
        deadline = begin + 60 * args.minutes - args.spare_seconds if args.minutes else math.inf
        dataset = tasks.StepDataset(args.data, schedule, self.rank, self.world)
        steps = range(self.step, min(schedule.steps, args.stop_step or schedule.steps))
        loader = DataLoader(
            dataset, batch_size=None, sampler=steps, num_workers=args.workers, prefetch_factor=4 if args.workers else None,
            pin_memory=self.device.type == "cuda", multiprocessing_context="spawn" if args.workers else None,
        )  # fmt: skip
        log = Log(self.folder / "log.csv", self.step) if self.rank == 0 else None
        mark, tokens = begin, 0
        for batch in loader:
            if self.stops(deadline):
                break
            if args.recipe == "gqa" and self.step == schedule.convert_step():
                self.save("convert.pt")
            torch.manual_seed(schedule.seed + self.step)  # what an operation samples depends on the step alone
            phase, stage = schedule.phase_of(self.step), stage_of(args.recipe, self.step, schedule)
            results = self.train_step(batch, stage)
            self.step += 1
            tokens += phase.tokens
            self.seconds = before + time.monotonic() - begin
            if self.step % args.log_every == 0 or self.step == schedule.steps:
                numbers = self.reduce(results)
                now = time.monotonic()
                speed = tokens / (now - mark)
                mark, tokens = now, 0
                row = dict(
                    step=self.step, stage=stage, length=phase.length, **numbers, lr=learning_rate(self.step - 1, schedule),
                    tokens_per_s=round(speed), seconds=round(self.seconds, 1),
                )  # fmt: skip
                if log is not None:
                    log.write(row)
                if self.step % (10 * args.log_every) == 0 or self.step == schedule.steps:
                    self.say(
                        f"step {self.step}/{schedule.steps} {stage} length {phase.length}: text {row['text']:.3f} answer "
                        f"{row['answer']:.3f} right {100 * row['accuracy']:.1f}% repeat {100 * row['repeat']:.1f}% kl {row['kl']:.3f} norm {row['norm']:.2f} "
                        f"{speed / 1e3:.0f}K tokens/s {self.seconds:.0f} s"
                    )
        self.save("latest.pt")
        complete = self.step >= schedule.steps
        self.say(f"{'complete' if complete else 'stopped'} at step {self.step}, {self.seconds:.0f} s in all")
        return complete

    def reduce(self, results: tuple[Tensor, ...]) -> dict[str, float]:
        loss, sums, kl, norm, index_norm = (value.float().to(self.device) for value in results)
        if self.world > 1:
            dist.all_reduce(sums)
            for value in (loss, kl):
                dist.all_reduce(value)
                value /= self.world
        text, texts, answer, right, answers, repeated, repeats = sums.tolist()
        return {
            "loss": loss.item(), "text": text / max(texts, 1.0), "answer": answer / max(answers, 1.0),
            "accuracy": right / max(answers, 1.0), "repeat": repeated / max(repeats, 1.0), "kl": kl.item(), "norm": norm.item(), "index_norm": index_norm.item(),
        }  # fmt: skip


def checkpoint_norm(norm: Tensor) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Log:
    """A CSV file that continues at a step: lines of later steps, of a run that was cut off, go."""

    def __init__(self, path: pathlib.Path, step: int) -> None:
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, FIELDS)
        self.writer.writeheader()
        self.writer.writerows(rows)

    def write(self, row: dict[str, Any]) -> None:
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self.file.flush()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of data.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
    parser.add_argument("--recipe", choices=("gqa", "msa", "converted"), required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--steps", type=int, default=0, help="another length of the whole schedule")
    parser.add_argument("--lr", type=float, default=0.0, help="another peak learning rate")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop and save after so long; 0: at the end")
    parser.add_argument("--spare-seconds", type=float, default=5.0, help="of --minutes, for saving")
    parser.add_argument("--stop-step", type=int, default=0, help="stop and save before this step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step that are computed one by one")
    parser.add_argument("--attention", choices=("auto", "msa", "flex", "torch"), default="auto")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", choices=("dynamic", "static", "none"), help="default: static on a GPU without fsdp, else none")
    parser.add_argument("--workers", type=int, default=None, help="processes that make rows; default 0 on a CPU, else 6")
    parser.add_argument("--log-every", type=int, default=5, help="steps")
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    if args.compile is None:
        args.compile = "static" if gpu and args.parallel != "fsdp" else "none"
    if args.workers is None:
        args.workers = 6 if gpu else 0
    return args


def main(argv: list[str] | None = None) -> bool:
    args = parse(argv)
    preset = PRESETS[args.preset]
    meta = json.loads((args.data / "meta.json").read_text())
    config = dataclasses.replace(
        preset.model, attention="gqa" if args.recipe == "gqa" else "msa", vocab_size=meta["vocab_size"]
    )
    changes = {key: value for key, value in (("steps", args.steps), ("lr", args.lr)) if value}
    trainer = Trainer(args, config, dataclasses.replace(preset.schedule, **changes))
    trainer.say(f"starts at {datetime.datetime.now(datetime.timezone.utc):%H:%M:%S} UTC on {trainer.world} x {args.device}")
    complete = trainer.train()
    if trainer.world > 1:
        dist.destroy_process_group()
    return complete


if __name__ == "__main__":
    main()
