# SPDX-License-Identifier: Apache-2.0
"""Plots and tables of the runs: loss, KL loss, retrieval by length, recall of the index branch. Needs matplotlib.

    python examples/train/plot.py --runs runs --summary docs/experiments/summary.json --out docs/experiments
"""

from __future__ import annotations

import argparse
import csv
import json
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"gqa": "tab:gray", "msa": "tab:blue", "converted": "tab:orange"}
NAMES = {"gqa": "GQA", "msa": "MSA from scratch", "converted": "MSA converted from GQA"}


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return [{k: v if k == "stage" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def smooth(values: list[float], width: int = 9) -> list[float]:
    half = width // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_training(runs: pathlib.Path, out: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    panels = (("text", "loss of text, nats per token"), ("accuracy", "planted answers right"), ("kl", "KL loss, sum over layers"))
    for run, colour in COLOURS.items():
        path = runs / run / "log.csv"
        if not path.exists():
            continue
        log = read_log(path)
        for axis, (key, _) in zip(axes, panels):
            if key == "kl" and run == "gqa":
                continue
            axis.plot([row["step"] for row in log], smooth([row[key] for row in log]), color=colour, label=NAMES[run], lw=1)
            changes = [b["step"] for a, b in zip(log, log[1:]) if a["stage"] != b["stage"]]
            for step in changes:
                axis.axvline(step, color=colour, lw=0.7, ls=":")
    for axis, (_, title) in zip(axes, panels):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step (dotted: warmup ends)")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 5.0))
    axes[0].legend(fontsize=8)
    finish(figure, out / "training.png")


def plot_evaluation(summary: dict[str, Any], out: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    for run, result in summary["runs"].items():
        colour, name = COLOURS[run], NAMES[run]
        buckets = {key: value for key, value in result["validation_loss"].items() if key != "all"}
        axes[0].plot(list(buckets), list(buckets.values()), "o-", color=colour, label=name, ms=3, lw=1)
        for axis, task in zip(axes[1:], ("pass_key", "pairs")):
            lengths = [int(length) for length in result[task]]
            axis.plot(lengths, list(result[task].values()), "o-", color=colour, label=name, ms=3, lw=1)
        for recall in result.get("recall", {}).values():
            layers = range(len(recall["score_recall"]))
            axes[3].plot(layers, recall["score_recall"], "o-", color=colour, label=f"score, {name}", ms=3, lw=1)
            axes[3].plot(layers, recall["block_recall"], "o:", color=colour, label=f"block, {name}", ms=3, lw=1)
    titles = ("held-out loss by position", "pass key found", "pairs of words found (8 of 32)", "recall by sparse layer")
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].tick_params(axis="x", labelrotation=60, labelsize=6)
    for axis in axes[1:3]:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of context")
    for axis in axes[1:]:
        axis.set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=7)
    axes[3].legend(fontsize=6)
    finish(figure, out / "evaluation.png")


def write_tables(summary: dict[str, Any], path: pathlib.Path) -> None:
    """Markdown: a row per run."""
    runs = summary["runs"]
    head = f"{summary['device']}, {summary['date'][:10]}; {summary['trials']} rows per length and task."
    lines = ["# Results", "", "Written by `examples/train/plot.py`. " + head, ""]

    def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
        lines.extend([f"## {title}", "", "| run | " + " | ".join(columns) + " |", "|" + "---|" * (1 + len(columns))])
        lines.extend(f"| {NAMES[run]} | " + " | ".join(cells) + " |" for run, cells in rows.items())
        lines.append("")

    first = next(iter(runs.values()))
    losses = {run: [f"{value:.4f}" for value in result["validation_loss"].values()] for run, result in runs.items()}
    table("Held-out loss by position, nats per token", list(first["validation_loss"]), losses)
    for task, title in (("pass_key", "Pass keys found by tokens of context"), ("pairs", "Pairs of words found by tokens of context")):
        cells = {run: [f"{100 * value:.0f}%" for value in result[task].values()] for run, result in runs.items()}
        table(title, list(first[task]), cells)
    recalls = {run: next(iter(result["recall"].values())) for run, result in runs.items() if "recall" in result}
    for name in ("block_recall", "score_recall"):
        cells = {run: [f"{value:.2f}" for value in recall[name]] for run, recall in recalls.items()}
        if cells:
            layers = [f"sparse layer {layer + 1}" for layer in range(len(next(iter(cells.values()))))]
            table(name.replace("_", " ").capitalize(), layers, cells)
    path.write_text("\n".join(lines).rstrip() + "\n")


def finish(figure: Any, path: pathlib.Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="folder of train.py (log.csv of each run)")
    parser.add_argument("--summary", type=pathlib.Path, required=True, help="of evaluate.py")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plot_training(args.runs, args.out)
    summary = json.loads(args.summary.read_text())
    plot_evaluation(summary, args.out)
    write_tables(summary, args.out / "results.md")


if __name__ == "__main__":
    main()
