# SPDX-License-Identifier: Apache-2.0
"""One layer's attention in training on one NVIDIA GPU: our kernels, torch's dense attention and the GPU's
ceilings in one run.

    python3 bench/gpu_train.py --binary build/cuda/bench/cuda/msa_bench_cuda --commit $(git rev-parse HEAD)
    python3 bench/tables.py      # then the tables

Writes train_summary.json, flat, and train-<date>.json with every row to --out (bench/results/h100). Rows are
M3 shape, bf16, one sequence, real-like selections: forward, backward, KL loss with its gradients, and all
three. What was not measured is null, and `note` says why. The dense baseline is forward and backward of
torch's scaled_dot_product_attention, the faster of cuDNN and Flash; with --skip-dense there is none, nor a
GEMM. About one minute; --filter, --skip and --seconds as in msa_bench_cuda.
"""

import argparse
import datetime
import json
import pathlib
import tempfile
import time

from gpu_prefill import DIM, HEADS, KV_HEADS, LENGTHS, RESULTS, ROOT, Timer, git_commit, origin, row, run_binary

PARTS = (("fwd", "forward"), ("bwd", "backward"), ("kl", "kl"), ("fwd_bwd_kl", "total"))
TRAINED = ("8k", "32k", "128k")
DENSE = ("8k", "32k")

# Key, what it is, limit, unit.
TARGETS = (
    ("fwd_bwd_kl.128k_ms", "forward, backward and KL loss, 128K tokens", 100.0, "ms"),
    ("bwd.128k_ms", "backward alone, 128K tokens", 70.0, "ms"),
    ("deterministic_over_default", "deterministic mode over the default, all three", 1.3, "x"),
)


def measure_torch(torch):
    """GEMM, copy and dense rows; a row that fails has time_ms None and a note."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    timer = Timer(torch)
    attend = torch.nn.functional.scaled_dot_product_attention

    def normal(*shape, grad=False):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)

    def gemm():
        n = 8192
        a, b, out = normal(n, n), normal(n, n), torch.empty(n, n, device="cuda", dtype=torch.bfloat16)
        return row("torch.gemm.8192", timer.milliseconds(lambda: torch.matmul(a, b, out=out), 20, 5),
                   work_flops=2.0 * n**3)

    def copy():
        a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        return row("torch.copy", timer.milliseconds(lambda: b.copy_(a), 20, 3), moved_bytes=2.0 * a.numel())

    def dense(name):
        """Grouped heads where a backend has a backward pass for them, else k and v repeated beforehand."""
        length = LENGTHS[name]
        # Two products forward, five backward, of what causality leaves.
        flops = 7 * 2.0 * DIM * HEADS * length * (length + 1) / 2
        best = {"case": f"dense.{name}", "time_ms": None, "note": ""}
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            for grouped in (True, False):
                q = normal(1, HEADS, length, DIM, grad=True)
                k, v = (normal(1, KV_HEADS if grouped else HEADS, length, DIM, grad=True) for _ in range(2))
                dout = normal(1, HEADS, length, DIM)

                def step():
                    out = attend(q, k, v, is_causal=True, enable_gqa=grouped)
                    torch.autograd.grad(out, (q, k, v), dout)

                name_of = backend.name + ("" if grouped else ", k and v repeated")
                try:
                    with sdpa_kernel(backend):
                        times = timer.milliseconds(step, 7 if length < 1 << 15 else 3, 2)
                except RuntimeError as error:
                    best["note"] += f"{name_of}: {str(error).splitlines()[0]}. "
                    continue
                measured = row(best["case"], times, work_flops=flops, implementation=name_of)
                if best["time_ms"] is None or measured["time_ms"] < best["time_ms"]:
                    best = {**measured, "note": best["note"]}
                break
        return best

    rows = []
    for case, measure in (("torch.gemm.8192", gemm), ("torch.copy", copy),
                          *((f"dense.{name}", lambda name=name: dense(name)) for name in DENSE)):
        try:
            rows.append(measure())
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            rows.append({"case": case, "time_ms": None, "note": str(error).splitlines()[0]})
        torch.cuda.empty_cache()
        print(json.dumps(rows[-1]), flush=True)
    return rows


def summary_of(report):
    rows = {entry["case"]: entry for entry in report["rows"]}
    missing = []

    def take(key, case, field="time_ms"):
        entry = rows.get(case, {})
        if entry.get(field) is None:
            missing.append(f"{key}: {entry.get('note') or 'not measured'}")
        return entry.get(field)

    summary = {"gemm_tflops": take("gemm_tflops", "torch.gemm.8192", "tflops")}
    copies = [entry["tbytes_per_s"] for entry in report["rows"]
              if entry["case"] == "torch.copy" and entry.get("time_ms")]
    summary["copy_tbytes_per_s"] = max([report["ceilings"]["copy_tbytes_per_s"], *copies])
    for length in TRAINED:
        for short, part in PARTS:
            summary[f"{short}.{length}_ms"] = take(f"{short}.{length}_ms", f"train.{length}.{part}")
    for length in DENSE:
        summary[f"dense_fwd_bwd.{length}_ms"] = take(f"dense_fwd_bwd.{length}_ms", f"dense.{length}")
    default = take("deterministic_over_default", "train.128k.total.default")
    all_three = summary["fwd_bwd_kl.128k_ms"]
    summary["deterministic_over_default"] = all_three / default if all_three and default else None
    summary.update({key: report[key] for key in ("commit", "date", "device")})
    if missing or report.get("note"):
        summary["note"] = "; ".join(([report["note"]] if report.get("note") else []) + missing)
    return summary


def targets_table(report, path):
    """train_summary.json against the targets, then each part, with what dense attention takes."""
    lines = ["| one layer, M3 shape, bf16 | measured | target | |", "|---|---|---|---|"]
    for key, what, limit, unit in TARGETS:
        value = report.get(key)
        target = f"≤ {limit:g} {unit}"
        if value is None:
            lines.append(f"| {what} | not measured | {target} | |")
        else:
            verdict = "met" if value <= limit else "**missed**"
            lines.append(f"| {what} | {value:.4g} {unit} | {target} | {verdict} |")
    lines += ["", "| tokens | forward | backward | KL loss | all three | dense forward and backward |",
              "|---|---|---|---|---|---|"]
    for length in TRAINED:
        keys = [f"{short}.{length}_ms" for short, _ in PARTS] + [f"dense_fwd_bwd.{length}_ms"]
        cells = [f"{report[key]:.4g} ms" if report.get(key) else "" for key in keys]
        lines.append(f"| {length.upper()} | " + " | ".join(cells) + " |")
    gemm = f"bf16 GEMM of 8192^3 {report['gemm_tflops']:.0f} TFLOP/s, " if report["gemm_tflops"] else ""
    note = f" Note: {report['note']}." if report.get("note") else ""
    return ("\n".join(lines) + f"\n\nMedians; {gemm}copies {report['copy_tbytes_per_s']:.2f} TB/s. "
            f"{origin(report)} Data: `{path}`.{note}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build/cuda/bench/cuda/msa_bench_cuda"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="of the binary, where this is no git checkout")
    parser.add_argument("--filter", default="train.")
    parser.add_argument("--skip", default="")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--skip-dense", action="store_true")
    arguments = parser.parse_args()

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = run_binary(arguments, folder, [])
    report["commit"] = arguments.commit or git_commit()
    report["date"] = datetime.date.today().isoformat()

    def write():
        report["seconds"] = round(time.monotonic() - begin, 1)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"train-{report['date']}.json").write_text(json.dumps(report, indent=1) + "\n")
        summary = summary_of(report)
        (arguments.out / "train_summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    write()  # a run that is cut short later keeps this
    if not arguments.skip_dense:
        try:
            import torch
        except ImportError as error:
            report["note"] = f"no torch: {error}"
        else:
            report["torch"] = torch.__version__
            report["rows"] += measure_torch(torch)
    print(json.dumps(write(), indent=1))
    print(f"{report['seconds']} s")


if __name__ == "__main__":
    main()
