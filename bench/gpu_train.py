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

from gpu_run import DIM, HEADS, KV_HEADS, LENGTHS, TorchRows, add_note, copy_ceiling, make_parser, origin, record, row

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

    rows = TorchRows(torch)
    attend = torch.nn.functional.scaled_dot_product_attention

    def normal(*shape, grad=False):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)

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
                        times = rows.timer.milliseconds(step, 7 if length < 1 << 15 else 3, 2)
                except RuntimeError as error:
                    best["note"] += f"{name_of}: {str(error).splitlines()[0]}. "
                    continue
                measured = row(best["case"], times, work_flops=flops, implementation=name_of)
                if best["time_ms"] is None or measured["time_ms"] < best["time_ms"]:
                    best = {**measured, "note": best["note"]}
                break
        return best

    rows.add_gemm()
    rows.add_copy()
    for name in DENSE:
        rows.add(f"dense.{name}", lambda name=name: dense(name))
    return rows.rows


def summary_of(report):
    rows = {entry["case"]: entry for entry in report["rows"]}
    missing = []

    def take(key, case, field="time_ms"):
        entry = rows.get(case, {})
        if entry.get(field) is None:
            missing.append(f"{key}: {entry.get('note') or 'not measured'}")
        return entry.get(field)

    summary = {"gemm_tflops": take("gemm_tflops", "torch.gemm.8192", "tflops")}
    summary["copy_tbytes_per_s"] = copy_ceiling(report)
    for length in TRAINED:
        for short, part in PARTS:
            summary[f"{short}.{length}_ms"] = take(f"{short}.{length}_ms", f"train.{length}.{part}")
    for length in DENSE:
        summary[f"dense_fwd_bwd.{length}_ms"] = take(f"dense_fwd_bwd.{length}_ms", f"dense.{length}")
    default = take("deterministic_over_default", "train.128k.total.default")
    all_three = summary["fwd_bwd_kl.128k_ms"]
    summary["deterministic_over_default"] = all_three / default if all_three and default else None
    summary.update({key: report[key] for key in ("commit", "date", "device")})
    add_note(summary, report, missing)
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
    record("train", make_parser(__doc__, "train.", 120.0).parse_args(), summary_of, measure_torch)


if __name__ == "__main__":
    main()
