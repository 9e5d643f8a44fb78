# SPDX-License-Identifier: Apache-2.0
"""Prefill of 256K tokens and decoding at 1M tokens through one MSA layer: time and memory.

    python3 bench/long_context.py run      # measures, writes bench/results/cpu/long-context-<date>.json
    python3 bench/tables.py                # the tables of all result files
    python3 bench/long_context.py try --prefill 16384 --context 131072   # smaller, prints the table only

The checkpoint is bench/random_checkpoint.py's: 16 query / 4 KV heads of 128, hidden size 256, random weights,
in a temporary folder. The prompt of the prefill is this repository's own text, repeated. Decoding starts from
caches filled with random keys and values (msa run --fill-context), since a prefill of 1M tokens would take
half an hour; the decode steps then do all that they would do after one. Each job runs once, in a process of
its own; a third job with a short context shows what the program takes by itself.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

import random_checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
MSA = ROOT / "build" / "release" / "tools" / "msa"
DOCUMENT = ROOT / "build" / "release" / "document.txt"
PREFILL_TOKENS, DECODE_CONTEXT = 256 << 10, 1 << 20
DECODE_STEPS, DECODE_PROMPT = 32, 256
MIB = 1 << 20
MAX_WORKING_BYTES = 512_000_000  # promised up to 1M tokens


def run_msa(folder, prompt, options):
    """One msa process; its progress stays visible on stderr."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run([MSA, "run", "--model", folder, "--prompt-file", prompt, "--json", report.name,
                        *map(str, options)],
                       check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return json.loads(pathlib.Path(report.name).read_text())


def memory_of(run):
    plan = run["memory"]
    return {
        "weight_bytes": plan["weight_bytes"],
        "cache_bytes": run["cache_bytes"],
        "planned_cache_bytes": plan["cache_bytes"],
        "planned_working_bytes": plan["working_bytes"],
        "peak_process_bytes": run["peak_memory_bytes"],
        # An upper bound of the working memory: program, libraries and tokenizer are in it.
        "beyond_weights_and_caches_bytes": run["peak_memory_bytes"] - plan["weight_bytes"] - run["cache_bytes"],
    }


def job(name, folder, prompt, options):
    print(f"{name}: msa run {' '.join(map(str, options))}", file=sys.stderr, flush=True)
    report = run_msa(folder, prompt, options)
    run = report["runs"][0]
    assert run["finish_reason"] == "length", run["finish_reason"]
    memory = memory_of(run)
    # The last token drawn needs no keys, so a page may stay unused.
    assert memory["cache_bytes"] <= memory["planned_cache_bytes"], memory
    assert memory["beyond_weights_and_caches_bytes"] <= MAX_WORKING_BYTES, memory
    row = {"job": name, "options": " ".join(map(str, options)), "prompt_tokens": report["prompt_tokens"],
           "context": run["memory"]["context"], "prefill": run["prefill"], "decode": run["decode"],
           "memory": memory}
    return row, report["device"]


def measure(prefill_tokens, decode_context):
    subprocess.run(["sh", "cmake/document.sh", DOCUMENT], check=True, cwd=ROOT)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="msa_long_context_") as folder:
        random_checkpoint.write(folder)
        # One token per byte. Other bytes than ASCII's would do as well.
        text = DOCUMENT.read_bytes()
        prompt = pathlib.Path(folder) / "prompt.txt"
        prompt.write_bytes((text * (prefill_tokens // len(text) + 1))[:prefill_tokens])
        short = pathlib.Path(folder) / "short.txt"
        short.write_bytes(text[:DECODE_PROMPT])
        # generate() draws the first token from the prompt's logits, so one more than there are steps.
        fill = decode_context - DECODE_PROMPT - DECODE_STEPS - 1
        jobs = (
            ("short context", short, ["--max-tokens", 2]),
            ("decode", short, ["--max-tokens", DECODE_STEPS + 1, "--fill-context", fill]),
            ("prefill", prompt, ["--max-tokens", 1]),
        )
        rows = []
        for name, file, options in jobs:
            row, device = job(name, folder, file, options)
            rows.append(row)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {
        "schema": "msa.long_context/1", "date": date, "commit": commit, "device": device,
        "model": "bench/random_checkpoint.py: 1 sparse layer, 16 / 4 heads of 128, hidden 256, bf16",
        "command": "python3 bench/long_context.py run", "rows": rows,
    }


def tokens_text(tokens):
    return f"{tokens >> 20}M" if tokens % MIB == 0 else f"{tokens >> 10}K"


def table(report):
    rows = {row["job"]: row for row in report["rows"]}
    lines = ["| job | time | caches | working memory, planned | process peak beyond weights and caches |",
             "|---|---|---|---|---|"]
    for name in ("prefill", "decode", "short context"):
        row = rows[name]
        phase = row["prefill"] if name == "prefill" else row["decode"]
        per_token = phase["seconds"] / phase["tokens"]
        if name == "prefill":
            what = f"prefill of {tokens_text(row['prompt_tokens'])} tokens"
            time = f"{phase['seconds']:.0f} s ({1 / per_token:,.0f} tokens/s)"
        else:
            what = (f"decode at {tokens_text(row['context'])} tokens" if name == "decode"
                    else f"the program itself ({row['context']} tokens)")
            time = f"{1e3 * per_token:.1f} ms/token" if name == "decode" else ""
        memory = row["memory"]
        parts = [memory[key] / MIB for key in ("cache_bytes", "planned_working_bytes",
                                               "beyond_weights_and_caches_bytes")]
        lines.append(f"| {what} | {time} | " + " | ".join(f"{part:,.0f} MiB" for part in parts) + " |")
    return "\n".join(lines)


def caption(report, path):
    steps = next(row for row in report["rows"] if row["job"] == "decode")["decode"]["tokens"]
    return (
        f"{report['device']}, {report['date']}; `{report['command']}` at commit `{report['commit'][:12]}`; one "
        f"run each. One sparse layer of 16 query / 4 KV heads, hidden size 256, bf16; decoding is the mean of "
        f"{steps} steps after caches filled with random keys. Data: `{path}`."
    )


def summary_table(report, path):
    return f"Long contexts:\n\n{table(report)}\n\n{caption(report, path)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run")
    attempt = commands.add_parser("try")
    attempt.add_argument("--prefill", type=int, default=16 << 10, help="tokens of the prompt")
    attempt.add_argument("--context", type=int, default=128 << 10, help="tokens at the end of decoding")
    options = parser.parse_args()
    if options.command == "try":
        print(table(measure(options.prefill, options.context)))
        return
    report = measure(PREFILL_TOKENS, DECODE_CONTEXT)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"long-context-{report['date']}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("python3 bench/tables.py now writes it into the tables", file=sys.stderr)


if __name__ == "__main__":
    main()
