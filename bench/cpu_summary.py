# SPDX-License-Identifier: Apache-2.0
"""The CPU backend's operations against the ceilings of this machine, and the targets made from them.

    python3 bench/cpu_summary.py run     # cpu_ops_bench once, writes the two files below
    python3 bench/cpu_summary.py merge   # summary.json again, from the newest result files
    python3 bench/tables.py              # then the tables

Writes bench/results/cpu/ops-gbench-<date>.json, one row per benchmark, and bench/results/cpu/summary.json, flat.
A row whose times vary by more than 3% (coefficient of variation), or that ran while the machine gave less
than 85% of its FMA peak (a virtual machine may lose a core for seconds), runs again, at most twice; the
steadiest attempt at full speed counts. Options of `run`: --allow-dirty takes a work tree with changes, --filter REGEX only some
rows (keys without their rows become null), --out FOLDER another folder than bench/results/cpu,
--repetitions N and --min-time SECONDS per row.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu"
BENCH = ROOT / "build" / "release" / "bench" / "cpu_ops_bench"
COMMAND = "python3 bench/cpu_summary.py run"
MAX_CV = 0.03
MAX_ATTEMPTS = 3
MIN_PEAK = 0.85  # Of the run's FMA peak, measured beside each row.
MAX_LOAD = 0.3
COUNTERS = ("gflops", "gbytes_per_s", "fraction_of_peak", "fraction_of_bandwidth", "fma_peak_gflops",
            "read_gbytes_per_s", "overlap4", "select_seconds", "attend_seconds")

# Key of summary.json -> counter and row of the benchmark.
FROM_ROWS = {
    "index.32k.fraction_of_peak": ("fraction_of_peak", "index_scores/m3/chunk512/32k"),
    "attention.32k.fraction_of_peak": ("fraction_of_peak", "sparse/m3/chunk512/32k/real-like"),
    "attention_weak.32k.fraction_of_peak": ("fraction_of_peak", "sparse/m3/chunk512/32k/weak"),
    "attention_random.32k.fraction_of_peak": ("fraction_of_peak", "sparse/m3/chunk512/32k/random"),
    "dense.32k.fraction_of_peak": ("fraction_of_peak", "layer/m3/32k/dense"),
    "decode.128k.fraction_of_bandwidth": ("fraction_of_bandwidth", "decode/m3/b1/128k/step"),
    "decode_b8.128k.fraction_of_bandwidth": ("fraction_of_bandwidth", "decode/m3/b8/128k/step"),
    "decode_index.128k.fraction_of_bandwidth": ("fraction_of_bandwidth", "decode/m3/b1/128k/indexer"),
    "decode_codes.128k.fraction_of_bandwidth": ("fraction_of_bandwidth",
                                                "decode/m3/b1/128k/step_codes/real-like"),
}
# Key of summary.json -> rows whose times are divided.
RATIOS = {
    "topk.32k.share_of_index": ("select_top_k/m3/chunk512/32k", "index_scores/m3/chunk512/32k"),
    "layer.32k.dense_over_msa": ("layer/m3/32k/dense", "layer/m3/32k/msa/real-like"),
    "layer_fused.32k.dense_over_msa": ("layer/m3/32k/dense", "layer/m3/32k/msa_fused/real-like"),
    "decode_codes.128k.speedup": ("decode/m3/b1/128k/step", "decode/m3/b1/128k/step_codes/real-like"),
    "layer_random.32k.dense_over_msa": ("layer/m3/32k/dense", "layer/m3/32k/msa/random"),
}
LLAMA_CPP = {"llama_cpp.prefill_32k_ratio": "prefill_32k_ratio",
             "llama_cpp.decode_32k_ratio": "decode_32k_ratio"}

# Key, what it is, limit, whether more is better, and whether the number is a percentage.
TARGETS = (
    ("index.32k.fraction_of_peak", "indexer scores, 32K tokens: of the FMA peak", 0.70, True, True),
    ("topk.32k.share_of_index", "top-k: of the indexer's time", 0.05, False, True),
    ("attention.32k.fraction_of_peak", "sparse attention, 64/4 heads, 32K: of the FMA peak", 0.55, True,
     True),
    ("dense.32k.fraction_of_peak", "our dense causal attention, 32K: of the FMA peak", 0.50, True, True),
    ("layer.32k.dense_over_msa", "prefill of one layer, 32K, 64/4 heads: dense over MSA", 6.0, True,
     False),
    ("decode.128k.fraction_of_bandwidth",
     "decode step at 128K: bytes that must be read, of the read bandwidth", 0.80, True, True),
    ("llama_cpp.prefill_32k_ratio", "prefill of 32K tokens, small M3: llama.cpp over msa.cpp", 6.0, True,
     False),
    ("llama_cpp.decode_32k_ratio", "decode at 32K, small M3: llama.cpp over msa.cpp", 6.0, True, False),
)


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()


def commit_id(allow_dirty):
    """The commit that is measured. Result files and README.md's tables may have changed."""
    changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    if changes and not allow_dirty:
        sys.exit(f"cpu_summary: the work tree has changes; commit them, or --allow-dirty:\n{changes}")
    return git("rev-parse", "HEAD") + ("-dirty" if changes else "")


def cpu_model():
    match = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else "unknown CPU"


def short_name(name):
    """Without what Google Benchmark appends: /iterations:1/repeats:3/real_time."""
    return re.sub(r"(/(iterations:\d+|repeats:\d+|real_time))+$", "", name)


def run_bench(pattern, arguments):
    """Repetitions by row name, and the context that Google Benchmark gives."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        subprocess.run(
            [BENCH, f"--benchmark_filter={pattern}", f"--benchmark_repetitions={arguments.repetitions}",
             f"--benchmark_min_time={arguments.min_time}", f"--benchmark_out={output.name}",
             "--benchmark_out_format=json"], check=True, cwd=ROOT)
        text = pathlib.Path(output.name).read_text()
    if not text:
        sys.exit(f"cpu_summary: --filter '{pattern}' matches no row")
    report = json.loads(text)
    repetitions = {}
    for run in report["benchmarks"]:
        if run["run_type"] != "iteration":
            continue
        if run.get("error_occurred"):
            sys.exit(f"cpu_summary: {run['name']}: {run['error_message']}")
        repetitions.setdefault(short_name(run["name"]), []).append(run)
    return repetitions, report["context"]


def cv(times):
    return statistics.stdev(times) / statistics.mean(times) if len(times) > 1 else 0.0


def peak_of(runs):
    return statistics.median(run.get("fma_peak_gflops", 0.0) for run in runs)


def slowed(runs, peak):
    """Whether the machine was not whole while these repetitions ran."""
    return "fma_peak_gflops" in runs[0] and peak_of(runs) < MIN_PEAK * peak


def row_of(name, runs, attempts):
    times = [run["real_time"] for run in runs]  # ms
    middle = statistics.median(times)
    row = {"name": name, "time_ms": middle,
           "mad_ms": statistics.median(abs(time - middle) for time in times),
           "cv": cv(times), "times_ms": times, "iterations": runs[0]["iterations"], "attempts": attempts}
    for counter in COUNTERS:
        if counter in runs[0]:
            row[counter] = statistics.median(run[counter] for run in runs)
    return row


def measure(arguments):
    commit = commit_id(arguments.allow_dirty)
    subprocess.run(["cmake", "--build", ROOT / "build" / "release", "--target", "cpu_ops_bench"],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    load = os.getloadavg()[0]
    if load > MAX_LOAD:
        print(f"cpu_summary: warning: the load average is {load:.1f}; others use this machine",
              file=sys.stderr)
    repetitions, context = run_bench(arguments.filter, arguments)
    attempts = dict.fromkeys(repetitions, 1)
    for _ in range(1, MAX_ATTEMPTS):
        # The time of a ceiling's row is of no interest: its value is the best pass.
        peak = max(map(peak_of, repetitions.values()))
        unsteady = [name for name, runs in repetitions.items()
                    if "/" in name and (slowed(runs, peak) or
                                        cv([run["real_time"] for run in runs]) > MAX_CV)]
        if not unsteady:
            break
        print(f"cpu_summary: again, for their spread or the machine's: {', '.join(unsteady)}", flush=True)
        pattern = "^(" + "|".join(re.escape(name).replace(r"\-", "-") for name in unsteady) + ")(/iter|/real)"
        again, _ = run_bench(pattern, arguments)
        for name, runs in again.items():
            attempts[name] += 1
            repetitions[name] = min(repetitions[name], runs,
                                    key=lambda runs: (slowed(runs, peak),
                                                      cv([run["real_time"] for run in runs])))
    return {
        "schema": "msa.ops-gbench/1",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "device": f"{cpu_model()}, {context['threads']} threads, {context['simd_target']}",
        "command": COMMAND, "load_average": load, "repetitions": arguments.repetitions,
        "rows": [row_of(name, runs, attempts[name]) for name, runs in repetitions.items()],
    }


def newest(folder, pattern):
    return max(folder.glob(pattern), default=None)


def summarize(report, llama_cpp):
    """The flat summary; a key that was not measured is null, and `note` says which and why."""
    rows = {row["name"]: row for row in report["rows"]}
    notes = []

    def ceiling(name, counter):
        return rows[name][counter] if name in rows else None

    summary = {"fma_peak_gflops": ceiling("fma_peak", "gflops"),
               "read_gbytes_per_s": ceiling("read_bandwidth", "gbytes_per_s"),
               "copy_gbytes_per_s": ceiling("copy_bandwidth", "gbytes_per_s")}
    for key, (counter, name) in FROM_ROWS.items():
        summary[key] = rows[name][counter] if name in rows else None
    for key, (top, bottom) in RATIOS.items():
        summary[key] = (rows[top]["time_ms"] / rows[bottom]["time_ms"]
                        if top in rows and bottom in rows else None)
    missing = [key for key, value in summary.items() if value is None]
    if missing:
        notes.append(f"not in this run: {', '.join(missing)}")
    for key, name in LLAMA_CPP.items():
        summary[key] = llama_cpp.get(name) if llama_cpp else None
    if not llama_cpp:
        notes.append("llama_cpp.*: not measured on this machine (no llama_cpp-*.json)")
    elif None in (summary[key] for key in LLAMA_CPP):
        notes.append(f"llama_cpp.*: {llama_cpp.get('note', 'not in its result file')}")
    unsteady = [row["name"] for row in report["rows"] if "/" in row["name"] and row["cv"] > MAX_CV]
    if unsteady:
        notes.append(f"spread above 3% in every attempt: {', '.join(unsteady)}")
    peak = max((row.get("fma_peak_gflops", 0.0) for row in report["rows"]), default=0.0)
    halved = [row["name"] for row in report["rows"]
              if "/" in row["name"] and row.get("fma_peak_gflops", peak) < MIN_PEAK * peak]
    if halved:
        notes.append(f"below {MIN_PEAK:.0%} of the FMA peak in every attempt: {', '.join(halved)}")
    if report["load_average"] > MAX_LOAD:
        notes.append(f"load average at the start: {report['load_average']:.1f}")
    summary |= {"commit": report["commit"], "date": report["date"], "device": report["device"],
                "command": report["command"]}
    if llama_cpp:
        summary["llama_cpp.commit"] = llama_cpp.get("commit")
        summary["llama_cpp.date"] = llama_cpp.get("date")
    if notes:
        summary["note"] = "; ".join(notes)
    return summary


def merge(folder):
    path = newest(folder, "ops-gbench-*.json")
    if path is None:
        sys.exit(f"cpu_summary: no ops-gbench-*.json in {folder}")
    other = newest(folder, "llama_cpp-*.json")
    summary = summarize(json.loads(path.read_text()), json.loads(other.read_text()) if other else None)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for key, value in summary.items():
        print(f"{key:42} {value if not isinstance(value, float) else round(value, 4)}")


# Tables, see bench/tables.py.


def origin(report, path):
    dirty = " with changes" if report["commit"].endswith("-dirty") else ""
    return (f"{report['device']}, {report['date']}; `{report['command']}` at commit "
            f"`{report['commit'][:12]}`{dirty}. Data: `{path}`.")


def targets_table(report, path):
    lines = ["| on one machine, within one run | measured | target | |", "|---|---|---|---|"]

    def text(value, percent):
        return f"{100 * value:.1f}%" if percent else f"{value:.1f}x"

    for key, what, limit, more, percent in TARGETS:
        value = report.get(key)
        sign = "≥" if more else "≤"
        target = f"{sign} {100 * limit:.0f}%" if percent else f"{sign} {limit:.0f}x"
        if value is None:
            lines.append(f"| {what} | not measured | {target} | |")
            continue
        met = value >= limit if more else value <= limit
        lines.append(f"| {what} | {text(value, percent)} | {target} | {'met' if met else '**missed**'} |")
    ceilings = (f"FMA peak {report['fma_peak_gflops']:.0f} GFLOP/s, reads {report['read_gbytes_per_s']:.0f} "
                f"GB/s, copies {report['copy_gbytes_per_s']:.0f} GB/s. "
                if report["fma_peak_gflops"] and report["read_gbytes_per_s"] and
                report["copy_gbytes_per_s"] else "")
    note = f" Note: {report['note']}." if "note" in report else ""
    return "\n".join(lines) + f"\n\n{ceilings}{origin(report, path)}{note}"


def rows_table(report, path):
    lines = ["| row | time | spread | GFLOP/s | of FMA peak | GB/s | of read bandwidth | overlap |",
             "|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        if "/" not in row["name"]:
            continue
        flops = (f"{row['gflops']:.0f} | {100 * row['fraction_of_peak']:.1f}%" if row["gflops"] else "- | -")
        decode = "decode" in row["name"]
        bytes_read = (f"{row['gbytes_per_s']:.1f} | {100 * row['fraction_of_bandwidth']:.1f}%"
                      if decode or not row["gflops"] else "- | -")
        overlap = f"{row['overlap4']:.2f}" if row.get("overlap4") else "-"
        lines.append(f"| {row['name']} | {row['time_ms']:.4g} ms | {100 * row['cv']:.1f}% | {flops} "
                     f"| {bytes_read} | {overlap} |")
    return (
        f"Medians of {report['repetitions']} repetitions (layers: 3); spread is the coefficient of variation; "
        "overlap the distinct blocks of 4 neighbouring tokens over the blocks of one. What each row is: "
        "[docs/benchmarking.md](../../../docs/benchmarking.md).\n\n" + "\n".join(lines) +
        f"\n\n{origin(report, path)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "merge"))
    parser.add_argument("--allow-dirty", action="store_true")
    parser.add_argument("--filter", default=".")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--min-time", type=float, default=0.2)
    arguments = parser.parse_args()
    if arguments.what == "run":
        report = measure(arguments)
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"ops-gbench-{report['date']}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    merge(arguments.out)


if __name__ == "__main__":
    main()
