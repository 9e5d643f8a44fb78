# SPDX-License-Identifier: Apache-2.0
"""Prefill of examples/tiny_m3 with sparse and with dense attention at several prompt lengths.

    python3 bench/prefill.py run      # writes bench/results/cpu/prefill-<date>.json
    python3 bench/tables.py           # the tables of all result files

Runs msa at each length REPEATS times, sparse and dense in turn, so that both see the same machine; the
table has medians, and the spread is kept in the file.
"""

import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
MSA = ROOT / "build" / "release" / "tools" / "msa"
DOCUMENT = ROOT / "build" / "release" / "document.txt"
LENGTHS = (8192, 16384, 32768)
REPEATS = 3


def run_once(tokens):
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [MSA, "run", "--model", "examples/tiny_m3", "--prompt-file", DOCUMENT,
             "--max-prompt-tokens", str(tokens), "--max-tokens", "16", "--attention", "both",
             "--quiet", "--json", report.name],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        )
        return json.loads(pathlib.Path(report.name).read_text())


def ceilings():
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [MSA, "bench", "--filter", "SelectTopK m3.chunk512.8k", "--min-time", "0", "--json",
             report.name],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        )
        return json.loads(pathlib.Path(report.name).read_text())["ceilings"]


def median_and_spread(values):
    middle = statistics.median(values)
    return {"median": middle, "mad": statistics.median(abs(v - middle) for v in values)}


def measure():
    subprocess.run(["sh", "cmake/document.sh", DOCUMENT], check=True, cwd=ROOT)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    rows, head = [], {}
    for tokens in LENGTHS:
        reports = []
        for repeat in range(REPEATS):
            print(f"{tokens} tokens, run {repeat + 1} of {REPEATS}", flush=True)
            reports.append(run_once(tokens))
        head = reports[0]
        row = {"prompt_tokens": reports[0]["prompt_tokens"]}
        for index, mode in enumerate(("msa", "dense")):
            for phase in ("prefill", "decode"):
                phases = [report["runs"][index][phase] for report in reports]
                row[f"{mode}.{phase}"] = {
                    part: median_and_spread([p[part] for p in phases])
                    for part in ("seconds", "indexer", "selection", "attention", "rest")
                } | {"tokens": phases[0]["tokens"]}
        rows.append(row)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    report = {
        "schema": "msa.prefill/1", "date": date, "commit": commit, "device": head["device"],
        "model": "examples/tiny_m3", "command": "python3 bench/prefill.py run",
        "repeats": REPEATS, "ceilings": ceilings(), "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"prefill-{date}.json").write_text(json.dumps(report, indent=1) + "\n")


def attention_flops(tokens, mode):
    """Necessary FLOPs of all layers: 4 * head_dim per query head and visible, attended token."""
    config = json.loads((ROOT / "examples" / "tiny_m3" / "config.json").read_text())
    block, top_k = config["index_block_size"], config["index_topk_blocks"]
    if mode == "dense":
        pairs = tokens * (tokens + 1) // 2
    else:  # top_k - 1 whole blocks and the visible part of the local one
        pairs = sum(min(p // block, top_k - 1) * block + p % block + 1 for p in range(tokens))
    heads = config["num_attention_heads"] * config["num_hidden_layers"]
    return 4 * config["head_dim"] * heads * pairs


def percent_of_peak(report, row, mode):
    seconds = row[f"{mode}.prefill"]["attention"]["median"]
    gflops = attention_flops(row["prompt_tokens"], mode) / seconds * 1e-9
    return 100 * gflops / report["ceilings"]["fma_gflops"]


def table(report):
    lines = [
        "| prompt tokens | MSA prefill | dense prefill | ratio | attention per token, MSA (of FMA peak) "
        "| dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        tokens = row["prompt_tokens"]
        seconds = {m: row[f"{m}.prefill"]["seconds"]["median"] for m in ("msa", "dense")}
        # "Attention" is all of MSA but the index branch: the softmax attention over selected blocks.
        per_token = {m: row[f"{m}.prefill"]["attention"]["median"] / tokens for m in ("msa", "dense")}
        attention = " | ".join(
            f"{per_token[m] * 1e6:.0f} us ({percent_of_peak(report, row, m):.0f}%)"
            for m in ("msa", "dense")
        )
        lines.append(
            f"| {tokens:,} | {seconds['msa']:.2f} s | {seconds['dense']:.2f} s "
            f"| {seconds['dense'] / seconds['msa']:.1f}x | {attention} |"
        )
    return "\n".join(lines)


def shares(report):
    lines = ["| prompt tokens | mode | indexer | selection | attention | rest | decode |",
             "|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        for mode in ("msa", "dense"):
            prefill, decode = row[f"{mode}.prefill"], row[f"{mode}.decode"]
            total = prefill["seconds"]["median"]
            parts = " | ".join(f"{100 * prefill[part]['median'] / total:.1f}%"
                               for part in ("indexer", "selection", "attention", "rest"))
            ms = 1e3 * decode["seconds"]["median"] / decode["tokens"]
            lines.append(f"| {row['prompt_tokens']:,} | {mode} | {parts} | {ms:.1f} ms/token |")
    return "\n".join(lines)


def caption(report, path):
    mads = [100 * row[f"{mode}.prefill"]["seconds"]["mad"] / row[f"{mode}.prefill"]["seconds"]["median"]
            for row in report["rows"] for mode in ("msa", "dense")]
    return (
        f"{report['device']}, {report['date']}; `{report['command']}` at commit "
        f"`{report['commit'][:12]}`; medians of {report['repeats']}, median absolute deviation up to "
        f"{max(mads):.0f}%. FMA peak of the same run: {report['ceilings']['fma_gflops']:.0f} GFLOP/s. "
        f"Two layers of 16 query / 2 KV heads, bf16. Data: `{path}`."
    )


def summary_table(report, path):
    return f"{table(report)}\n\n{caption(report, path)}"


def details(report, path):
    first, last = report["rows"][0], report["rows"][-1]
    growth = [row["msa.prefill"]["attention"]["median"] / row["prompt_tokens"] for row in (first, last)]
    return (
        f"{table(report)}\n\n{caption(report, path)}\n\n"
        f"Attention per token at {last['prompt_tokens']:,} tokens is {growth[1] / growth[0]:.2f}x that "
        f"at {first['prompt_tokens']:,}.\n\nWhere the time goes\n\n{shares(report)}"
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["run"]:
        sys.exit(__doc__)
    measure()
