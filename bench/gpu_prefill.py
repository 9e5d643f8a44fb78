# SPDX-License-Identifier: Apache-2.0
"""Prefill on one NVIDIA GPU: our kernels, cuDNN's dense attention and the GPU's ceilings in one run.

    python3 bench/gpu_prefill.py --binary build/cuda/bench/cuda/msa_bench_cuda --commit $(git rev-parse HEAD)
    python3 bench/tables.py      # then the tables

Needs torch with CUDA for the dense baselines and the GEMM; without it, or with --skip-dense, those are null.
Writes prefill_summary.json, flat, and prefill-<date>.json with every row to --out (bench/results/h100). What
was not measured is null, and `note` says why. Begins with our kernels and ends with the longest dense call,
because the chip slows down with long runs. About seven minutes; options to shorten it:

    --skip-1m       neither our 1M rows nor the dense one, which alone takes 40 s
    --skip-dense    no torch at all
    --filter, --skip   as in msa_bench_cuda, for our rows
    --seconds N     no case of ours begins after N seconds (default 240)
"""

from gpu_run import DIM, HEADS, KV_HEADS, LENGTHS, TorchRows, add_note, copy_ceiling, make_parser, origin, record, row

# Key of prefill_summary.json -> case of msa_bench_cuda and its field.
FROM_ROWS = {
    "index.128k_ms": ("index.128k", "time_ms"),
    "attention.128k.real_ms": ("attention.128k.real", "time_ms"),
    "attention.128k.weak_ms": ("attention.128k.weak", "time_ms"),
    "attention.128k.random_ms": ("attention.128k.random", "time_ms"),
    "total.8k_ms": ("total.8k", "time_ms"),
    "total.32k_ms": ("total.32k", "time_ms"),
    "total.128k_ms": ("total.128k", "time_ms"),
    "total.1m_ms": ("total.1m", "time_ms"),
    "total.1m.fp8_index_ms": ("total.1m.fp8_index", "time_ms"),
    "extra_memory.1m_gb": ("total.1m", "extra_memory_gb"),
}
# In the order of the file.
KEYS = ("gemm_tflops", "copy_tbytes_per_s", "index.128k_ms", "attention.128k.real_ms",
        "attention.128k.weak_ms", "attention.128k.random_ms", "total.8k_ms", "dense.8k_ms", "total.32k_ms",
        "dense.32k_ms", "total.128k_ms", "dense.128k_ms", "total.1m_ms", "dense.1m_ms",
        "total.1m.fp8_index_ms", "extra_memory.1m_gb", "commit", "date", "device")

# Key, what it is, limit, unit.
TARGETS = (
    ("index.128k_ms", "indexer with selection, 128K tokens", 12.0, "ms"),
    ("attention.128k.real_ms", "sparse attention, 128K, real-like selections", 18.5, "ms"),
    ("attention.128k.random_ms", "sparse attention, 128K, random selections", 28.0, "ms"),
    ("total.8k_ms", "MSA prefill, 8K", 1.6, "ms"),
    ("total.32k_ms", "MSA prefill, 32K", 6.8, "ms"),
    ("total.128k_ms", "MSA prefill, 128K", 31.0, "ms"),
    ("total.1m_ms", "MSA prefill, 1M", 1000.0, "ms"),
    ("total.1m.fp8_index_ms", "MSA prefill, 1M, FP8 index cache", 600.0, "ms"),
    ("extra_memory.1m_gb", "memory beside the tensors at 1M", 6.0, "GB"),
)


def measure_torch(torch, skip_1m):
    """GEMM, copy and dense rows; a row that fails has time_ms None and a note."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = TorchRows(torch)

    def dense(name, length, runs, warm_up):
        def measure():
            q = torch.randn(1, HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(1, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16)
                    for _ in range(2))
            attend = torch.nn.functional.scaled_dot_product_attention
            with torch.no_grad(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                times = rows.timer.milliseconds(
                    lambda: attend(q, k, v, is_causal=True, enable_gqa=True), runs, warm_up)
            note = {} if warm_up else {"note": "the only call, with cuDNN's planning"}
            return row(f"dense.{name}", times, work_flops=4.0 * DIM * HEADS * length * (length + 1) / 2,
                       **note)
        rows.add(f"dense.{name}", measure)

    rows.add_gemm()
    rows.add_copy()
    dense("8k", LENGTHS["8k"], 20, 3)
    dense("32k", LENGTHS["32k"], 7, 2)
    dense("128k", LENGTHS["128k"], 5, 1)
    if not skip_1m:
        dense("1m", LENGTHS["1m"], 1, 0)
    return rows.rows


def summary_of(report):
    rows = {entry["case"]: entry for entry in report["rows"]}
    missing = []

    def take(key, case, field):
        entry = rows.get(case)
        value = entry.get(field) if entry else None
        if value is None:
            missing.append(f"{key}: {entry.get('note', 'not measured') if entry else 'not measured'}")
        return value

    values = {key: take(key, case, field) for key, (case, field) in FROM_ROWS.items()}
    for name in LENGTHS:
        values[f"dense.{name}_ms"] = take(f"dense.{name}_ms", f"dense.{name}", "time_ms")
    values["gemm_tflops"] = take("gemm_tflops", "torch.gemm.8192", "tflops")
    values["copy_tbytes_per_s"] = copy_ceiling(report)
    values.update({key: report[key] for key in ("commit", "date", "device")})
    summary = {key: values[key] for key in KEYS}
    add_note(summary, report, missing)
    return summary


def targets_table(report, path):
    """prefill_summary.json against the targets; MSA rows with what dense attention takes."""
    lines = ["| on one GPU, within one run | measured | target | | dense cuDNN | ratio |",
             "|---|---|---|---|---|---|"]
    for key, what, limit, unit in TARGETS:
        value = report.get(key)
        target = f"≤ {limit:g} {unit}"
        if value is None:
            lines.append(f"| {what} | not measured | {target} | | | |")
            continue
        dense = report.get(key.replace("total.", "dense.").replace(".fp8_index", "")) \
            if key.startswith("total.") else None
        ratio = f"{dense:.4g} ms | {dense / value:.1f}x" if dense else " | "
        verdict = "met" if value <= limit else "**missed**"
        lines.append(f"| {what} | {value:.4g} {unit} | {target} | {verdict} | {ratio} |")
    gemm = f"bf16 GEMM of 8192^3 {report['gemm_tflops']:.0f} TFLOP/s, " if report["gemm_tflops"] else ""
    note = f" Note: {report['note']}." if report.get("note") else ""
    return ("\n".join(lines) + f"\n\nMedians; {gemm}copies {report['copy_tbytes_per_s']:.2f} TB/s. "
            f"{origin(report)} Data: `{path}`.{note}")


def rows_table(report, path):
    lines = ["| row | kernels | time | spread | TFLOP/s | of tensor ceiling | TB/s | memory beside | distinct "
             "blocks of 2 / 4 / 8 tokens |", "|---|---|---|---|---|---|---|---|---|"]
    for entry in report["rows"]:
        name = entry["case"]
        if entry.get("time_ms") is None:
            lines.append(f"| {name} | {entry.get('note', 'not measured')} | | | | | | | |")
            continue
        spread = (entry["max_ms"] - entry["min_ms"]) / entry["time_ms"]
        share = entry.get("percent_of_tensor_ceiling")
        if share is None and report["ceilings"]["tensor_tflops"]:
            share = 100 * entry["tflops"] / report["ceilings"]["tensor_tflops"]
        overlap = " / ".join(f"{entry[f'overlap{n}']:.2f}" for n in (2, 4, 8)) \
            if entry.get("overlap4") else ""
        memory = f"{entry['extra_memory_gb']:.3g} GB" if "extra_memory_gb" in entry else ""
        lines.append(
            f"| {name} | {entry.get('implementation', 'torch')} | {entry['time_ms']:.4g} ms "
            f"| {100 * spread:.1f}% | {entry['tflops']:.0f} | {share or 0:.0f}% "
            f"| {entry['tbytes_per_s']:.2f} | {memory} | {overlap} |")
    ceilings = report["ceilings"]
    return ("Medians; spread is the slowest run less the fastest, of the median. TFLOP/s and TB/s are of "
            "necessary work ([docs/benchmarking.md](../../../docs/benchmarking.md)).\n\n" + "\n".join(lines) +
            f"\n\nCeilings: wgmma {ceilings['tensor_tflops']:.0f} TFLOP/s bf16, {ceilings['e4m3_tflops']:.0f} "
            f"e4m3, copies "
            f"{ceilings['copy_tbytes_per_s']:.2f} TB/s. {origin(report)} Data: `{path}`.")


def main():
    parser = make_parser(__doc__, "", 240.0)
    parser.add_argument("--skip-1m", action="store_true")
    arguments = parser.parse_args()
    record("prefill", arguments, summary_of, lambda torch: measure_torch(torch, arguments.skip_1m),
           ["decode.", "train.", "1m" if arguments.skip_1m else ""])


if __name__ == "__main__":
    main()
