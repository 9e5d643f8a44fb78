# SPDX-License-Identifier: Apache-2.0
"""Held-out loss by position, retrieval by length of context, and how well the index branch selects.

    python examples/train/evaluate.py --data data --runs runs --out docs/experiments/summary.json

Reads RUN/latest.pt of each run. Retrieval counts what is the most likely token, at `--trials` rows per length:
    pass key   one statement at a random depth of held-out text, the question at its end; all five digits right
    pairs      32 pairs of words in groups, spread over the text, 8 of them asked for at the end; share right
Block recall and score recall (paper 5.2): of the top_k blocks with the most attention, the share that the
index branch selects, and the share of those blocks' probability that it catches.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import tasks
from attention_torch import batch_of, teacher_probabilities
from config import Stage
from model import Model, attention_operations

SEED = 7
RUNS = ("gqa", "msa", "converted")


class Recorder:
    """Attention operations that keep the inputs of sparse attention, layer by layer."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.layers = ops, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def sparse_attention(self, q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, **shared: Any) -> Any:
        self.layers.append((q, k, block_ids, shared["cu_seqlens_q"]))
        return self.ops.sparse_attention(q, k, v, block_ids, **shared)


class Evaluation:
    def __init__(self, model: Model, stage: Stage, data: pathlib.Path, device: torch.device, tokens: int) -> None:
        self.model, self.stage, self.device, self.tokens = model, stage, device, tokens
        self.corpus, self.planter = tasks.Corpus.open(data, "heldout"), tasks.Planter(data)

    def hidden(self, rows: list[np.ndarray]) -> Tensor:
        """[rows, length, hidden] of rows of equal length."""
        ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(self.device)
        gpu = self.device.type == "cuda"
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
            hidden, _ = self.model(ids, self.stage)
        return hidden.unflatten(0, ids.shape)

    def batches(self, length: int, count: int) -> Iterator[list[np.random.Generator]]:
        """Generators of one row each; every run sees the same rows."""
        rows = max(1, self.tokens // length)
        for begin in range(0, count, rows):
            yield [np.random.default_rng((SEED, length, number)) for number in range(begin, min(begin + rows, count))]

    def validation_loss(self, length: int, windows: int, edges: list[int]) -> dict[str, float]:
        """Mean loss of held-out text by position, nats per token."""
        losses = torch.zeros(length, dtype=torch.float64)
        for generators in self.batches(length, windows):
            rows = [self.corpus.window(rng, length + 1) for rng in generators]
            hidden = self.hidden([row[:-1] for row in rows])
            for row, states in zip(rows, hidden):
                targets = torch.from_numpy(row[1:].astype(np.int64)).to(self.device)
                losses += F.cross_entropy(self.model.logits(states), targets, reduction="none").double().cpu()
        losses /= windows
        edges = [edge for edge in edges if edge < length] + [length]
        buckets = {f"{a}-{b}": losses[a:b].mean().item() for a, b in zip(edges[:-1], edges[1:])}
        return {**buckets, "all": losses.mean().item()}

    def right_answers(self, length: int, trials: int, make: Any) -> tuple[float, float]:
        """Share of rows of which all answers are the most likely tokens, and share of all answers."""
        rows_right, answers_right = 0.0, 0.0
        for generators in self.batches(length, trials):
            rows, masks = zip(*(make(rng, length) for rng in generators))
            hidden = self.hidden(list(rows))
            for row, mask, states in zip(rows, masks, hidden):
                answers = np.flatnonzero(mask)
                logits = self.model.logits(states[torch.from_numpy(answers - 1).to(self.device)])
                right = logits.argmax(-1).cpu().numpy() == row[answers]
                rows_right += right.all()
                answers_right += right.mean()
        return rows_right / trials, answers_right / trials

    def pass_key_row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.planter.name(rng)
        key = "".join(map(str, rng.integers(10, size=tasks.NUM_DIGITS)))
        statement = self.planter.encode(f"\n# The pass key of {name} is {key}.\n")
        question = self.planter.encode(tasks.QUESTION.format(name=name) + key)
        text = self.corpus.window(rng, length - len(statement) - len(question))
        depth = int(rng.random() * (len(text) + 1))
        row = np.concatenate([text[:depth], statement, text[depth:], question])
        return row, np.arange(length) >= length - tasks.NUM_DIGITS

    def pairs_row(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.choice(self.planter.words, 32, replace=False).tolist()
        values = rng.choice(self.planter.words, 32).tolist()
        lists = [self.planter.pair_list(keys[i : i + 8], values[i : i + 8], tasks.PLANTED)[0] for i in range(0, 32, 8)]
        asked = rng.choice(32, 8, replace=False).tolist()
        question, kinds = self.planter.pair_list([keys[i] for i in asked], [values[i] for i in asked], tasks.ANSWER)
        text = self.corpus.window(rng, length - sum(map(len, lists)) - len(question))
        cuts = sorted(int(rng.random() * (len(text) + 1)) for _ in lists)
        pieces = [part for cut, end, some in zip([0, *cuts], cuts, lists) for part in (text[cut:end], some)]
        row = np.concatenate([*pieces, text[cuts[-1] :], question])
        return row, np.concatenate([np.zeros(length - len(kinds), dtype=bool), kinds == tasks.ANSWER])

    def recall(self, length: int, windows: int, queries: int = 256) -> dict[str, list[float]]:
        """Per sparse layer, over queries that see more than top_k blocks."""
        config, ops = self.model.config, self.model.ops
        sums: list[list[float]] = []
        for number in range(windows):
            rng = np.random.default_rng((SEED, length, number))
            recorder = Recorder(ops)
            self.model.ops = recorder
            self.hidden([self.corpus.window(rng, length)])
            self.model.ops = ops
            first = config.block_size * (config.top_k + 1)
            rows = torch.from_numpy(np.sort(rng.choice(np.arange(first, length), queries))).to(self.device)
            sums.append([x for layer in recorder.layers for x in self.layer_recall(*layer, rows)])
        means = np.mean(sums, axis=0).reshape(-1, 2)
        return {"block_recall": means[:, 0].tolist(), "score_recall": means[:, 1].tolist()}

    def layer_recall(self, q: Tensor, k: Tensor, block_ids: Tensor, cu: Tensor, rows: Tensor) -> tuple[float, float]:
        config = self.model.config
        length = q.shape[0]
        visible = torch.arange(length, device=q.device) <= rows[:, None]
        scores = teacher_probabilities(batch_of(q, cu)[:, :, rows], batch_of(k, cu), visible[None, None])[0]
        scores = F.pad(scores, (0, -length % config.block_size)).unflatten(-1, (-1, config.block_size)).sum(-1)
        best = scores.topk(config.top_k, dim=-1).indices  # [kv heads, rows, top_k]
        ids = block_ids[:, rows].long()
        found = (best[..., None] == ids[..., None, :]).any(-1)
        mass = scores.gather(-1, best)
        return found.double().mean().item(), ((mass * found).sum(-1) / mass.sum(-1)).double().mean().item()


def evaluate(run: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    state = checkpoint.load(args.runs / run / "latest.pt")
    model = Model(state["config"], attention_operations(args.attention, device)).to(device).eval()
    checkpoint.restore(model, None, state)
    stage: Stage = "sparse" if state["config"].attention == "msa" else "dense"
    evaluation = Evaluation(model, stage, args.data, device, args.tokens)
    begin = time.monotonic()
    result: dict[str, Any] = {"steps": state["step"], "training_seconds": round(state["seconds"], 1)}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {run}: {text}", flush=True)

    edges = [0, 1024, 2048, 4096, 8192, 16384, 32768]
    result["validation_loss"] = evaluation.validation_loss(args.loss_length, args.windows, edges)
    say("loss " + ", ".join(f"{key}: {value:.4f}" for key, value in result["validation_loss"].items()))
    result["pass_key"], result["pairs"] = {}, {}
    for length in args.lengths:
        result["pass_key"][str(length)], _ = evaluation.right_answers(length, args.trials, evaluation.pass_key_row)
        _, result["pairs"][str(length)] = evaluation.right_answers(length, args.trials, evaluation.pairs_row)
        say(f"{length} tokens: pass key {result['pass_key'][str(length)]:.3f}, pairs {result['pairs'][str(length)]:.3f}")
    if stage == "sparse":
        result["recall"] = {str(args.recall_length): evaluation.recall(args.recall_length, 4)}
        for name, values in result["recall"][str(args.recall_length)].items():
            say(f"{name} by layer: " + " ".join(f"{value:.3f}" for value in values))
    return result


def merge(files: list[pathlib.Path], out: pathlib.Path) -> None:
    parts = [json.loads(file.read_text()) for file in files]
    runs = {run: part["runs"][run] for run in RUNS for part in parts if run in part["runs"]}
    out.write_text(json.dumps({**parts[-1], "runs": runs}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="folder of data.py")
    parser.add_argument("--runs", type=pathlib.Path, help="folder of train.py")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="summary to write; runs that it has stay")
    parser.add_argument("--merge", type=pathlib.Path, nargs="+", help="only put these summaries together")
    parser.add_argument("--only", choices=RUNS, action="append", help="this run; several times for several")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--trials", type=int, default=64, help="rows per length and task")
    parser.add_argument("--loss-length", type=int, default=65536)
    parser.add_argument("--windows", type=int, default=16, help="of held-out text")
    parser.add_argument("--recall-length", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=131072, help="computed together")
    parser.add_argument("--attention", choices=("auto", "msa", "flex", "torch"), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.merge:
        return merge(args.merge, args.out)
    if args.data is None or args.runs is None:
        parser.error("--data and --runs are needed")
    device = torch.device(args.device)
    summary = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    summary["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    summary["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    summary["trials"] = args.trials
    for run in args.only or [run for run in RUNS if (args.runs / run / "latest.pt").exists()]:
        summary["runs"][run] = evaluate(run, args, device)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
