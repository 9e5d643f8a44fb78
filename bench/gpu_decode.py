# SPDX-License-Identifier: Apache-2.0
"""Decode steps on one NVIDIA GPU: our kernels, torch's dense attention and the copy ceiling in one run.

    python3 bench/gpu_decode.py --binary build/cuda/bench/cuda/msa_bench_cuda --commit $(git rev-parse HEAD)
    python3 bench/tables.py      # then the tables

Writes decode_summary.json, flat, and decode-<date>.json with every row to --out (bench/results/h100). A step is
the indexer with its selection and attention on it, for one layer of M3 shape. What was not measured is null,
and `note` says why. Dense attention and a second copy ceiling need torch with CUDA; --skip-dense does without.
About one minute; --filter, --skip and --seconds as in msa_bench_cuda.
"""

from gpu_run import DIM, HEADS, KV_HEADS, TorchRows, add_note, copy_ceiling, make_parser, origin, record, row

# Key of decode_summary.json without "_us", its target, and the requests and tokens of each.
STEPS = (
    ("b1.32k", 8.5, 1, 32 << 10),
    ("b1.512k", 52, 1, 512 << 10),
    ("b1.512k.screened", 34, 1, 512 << 10),
    ("b1.1m", 100, 1, 1 << 20),
    ("b1.1m.screened", 58, 1, 1 << 20),
    ("b32.128k", 430, 32, 128 << 10),
    ("b32.128k.screened", 270, 32, 128 << 10),
    ("b32.512k", 1530, 32, 512 << 10),
    ("b32.512k.screened", 850, 32, 512 << 10),
)
FP8_KEY, FP8_TARGET = "b64.fp8_kv.fraction_of_copy", 0.85
MTP_KEY, MTP_TARGET = "mtp4.b8.128k_ratio", 1.25
TURN_BYTES = 500 * 10**6  # what is read before a cache has its next turn; ten times the L2 cache
# Indexers that take int8 codes but read the keys alone: their time is none of a screened step.
READ_NO_CODES = ("cuda_sm90", "cuda_sm90_decode", "cuda_generic")


def measure_torch(torch):
    """The copy, and dense attention of one query token per request; the faster of torch's backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = TorchRows(torch)
    rows.add_copy()
    attend = torch.nn.functional.scaled_dot_product_attention

    def dense(name, batch, length):
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        kv_bytes = 4 * batch * KV_HEADS * length * DIM
        # Several caches in turn within one graph, as in bench/cuda/decode.cpp.
        caches = [[torch.empty(batch, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16).normal_()
                   for _ in range(2)] for _ in range(min(TURN_BYTES // kv_bytes + 1, 32))]

        def attend_to_all():
            for k, v in caches:
                attend(q, k, v, enable_gqa=True)

        best = {"case": f"dense.{name}", "time_ms": None, "note": ""}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                with torch.no_grad(), sdpa_kernel(backend):
                    attend_to_all()
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        attend_to_all()
                    times = [t / len(caches) for t in rows.timer.milliseconds(graph.replay, 11, 2)]
            except RuntimeError as error:
                best["note"] += f"{backend.name}: {str(error).splitlines()[0]}. "
                continue
            measured = row(best["case"], times, moved_bytes=float(kv_bytes),
                           work_flops=4.0 * DIM * HEADS * batch * length, implementation=backend.name)
            if best["time_ms"] is None or measured["time_ms"] < best["time_ms"]:
                best = {**measured, "note": best["note"]}
        return best

    for name, _, batch, length in STEPS:
        if name.endswith(".screened"):
            continue
        rows.add(f"dense.{name}", lambda: dense(name, batch, length))
    return rows.rows


def summary_of(report):
    rows = {entry["case"]: entry for entry in report["rows"]}
    missing = []

    def take(key, case, field="time_ms", factor=1.0):
        entry = rows.get(case, {})
        why = entry.get("note", "") if entry.get(field) is None else ""
        if ".screened" in case and entry.get("implementation", "").split(" + ")[0] in READ_NO_CODES:
            why = f"{entry['implementation']} reads no codes; it takes {1e3 * entry['time_ms']:.4g} us"
        if why or entry.get(field) is None:
            missing.append(f"{key}: {why or 'not measured'}")
            return None
        return factor * entry[field]

    summary = {f"{name}_us": take(f"{name}_us", f"decode.{name}", factor=1e3) for name, *_ in STEPS}
    copy = copy_ceiling(report)
    summary["copy_tbytes_per_s"] = copy
    summary[FP8_KEY] = take(FP8_KEY, "decode.b64.attention.fp8_kv", "tbytes_per_s", 1.0 / copy)
    one, four = (take(MTP_KEY, f"decode.b8.128k{suffix}") for suffix in ("", ".mtp4"))
    summary[MTP_KEY] = four / one if one and four else None
    for name, *_ in STEPS:
        if not name.endswith(".screened"):
            summary[f"dense.{name}_us"] = take(f"dense.{name}_us", f"dense.{name}", factor=1e3)
    summary.update({key: report[key] for key in ("commit", "date", "device")})
    add_note(summary, report, missing)
    return summary


def targets_table(report, path):
    """decode_summary.json against the targets, with what dense attention takes."""
    lines = ["| one layer's decode step | measured | target | | dense attention | ratio |", "|---|---|---|---|---|---|"]

    def add(what, value, unit, target, met, rest=" | "):
        if value is None:
            lines.append(f"| {what} | not measured | {target} | | | |")
        else:
            lines.append(f"| {what} | {value:.4g}{unit} | {target} | {'met' if met else '**missed**'} | {rest} |")

    for name, limit, batch, length in STEPS:
        value = report.get(f"{name}_us")
        dense = report.get(f"dense.{name.removesuffix('.screened')}_us")
        tokens = "1M" if length == 1 << 20 else f"{length >> 10}K"
        what = f"{batch} request{'s' if batch > 1 else ''}, {tokens} tokens" + \
            (", int8 screening" if name.endswith(".screened") else "")
        rest = f"{dense:.4g} us | {dense / value:.1f}x" if dense and value else " | "
        add(what, value, " us", f"≤ {limit:g} us", value is not None and value <= limit, rest)
    value = report.get(FP8_KEY)
    add("attention alone, 64 requests, FP8 K and V: of the copy bandwidth", value and 100 * value, "%",
        f"≥ {100 * FP8_TARGET:g}%", value is not None and value >= FP8_TARGET)
    value = report.get(MTP_KEY)
    add("8 requests, 128K tokens: 4 query tokens over 1", value, "x", f"≤ {MTP_TARGET:g}x",
        value is not None and value <= MTP_TARGET)
    note = f" Note: {report['note']}." if report.get("note") else ""
    return ("\n".join(lines) + f"\n\nMedians of graph replays with a cold L2 cache; copies "
            f"{report['copy_tbytes_per_s']:.2f} TB/s. {origin(report)} Data: `{path}`.{note}")


def rows_table(report, path):
    lines = ["| row | kernels | time | spread | TB/s | of copies |", "|---|---|---|---|---|---|"]
    for entry in report["rows"]:
        if entry.get("time_ms") is None:
            lines.append(f"| {entry['case']} | {entry.get('note', 'not measured')} | | | | |")
            continue
        spread = 100 * (entry["max_ms"] - entry["min_ms"]) / entry["time_ms"]
        share = 100 * entry["tbytes_per_s"] / report["ceilings"]["copy_tbytes_per_s"]
        lines.append(f"| {entry['case']} | {entry.get('implementation', 'torch')} | {1e3 * entry['time_ms']:.4g} us "
                     f"| {spread:.1f}% | {entry['tbytes_per_s']:.2f} | {share:.0f}% |")
    return ("\n".join(lines) + f"\n\nTB/s are of necessary bytes. Copies of the benchmark itself: "
            f"{report['ceilings']['copy_tbytes_per_s']:.2f} TB/s. {origin(report)} Data: `{path}`.")


def main():
    record("decode", make_parser(__doc__, "decode.", 120.0).parse_args(), summary_of, measure_torch)


if __name__ == "__main__":
    main()
