# SPDX-License-Identifier: Apache-2.0
"""What gpu_prefill.py, gpu_decode.py and gpu_train.py share: a run of msa_bench_cuda, torch's part in the same
run, and their files."""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "h100"
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072, "1m": 1048576}
HEADS, KV_HEADS, DIM = 64, 4, 128


def run_binary(arguments, folder, skip):
    """The report of msa_bench_cuda; `skip` has texts of cases that are left out besides --skip."""
    path = pathlib.Path(folder) / "rows.json"
    command = [arguments.binary, "--json", str(path), "--seconds", str(arguments.seconds)]
    if arguments.filter:
        command += ["--filter", arguments.filter]
    skipped = [text for text in (arguments.skip, *skip) if text]
    if skipped:
        command += ["--skip", ",".join(skipped)]
    status = subprocess.run(command).returncode
    if not path.exists():
        sys.exit(f"{arguments.binary} wrote no rows (exit status {status})")
    report = json.loads(path.read_text())
    if status != 0:
        report["note"] = f"msa_bench_cuda ended with exit status {status}"
    return report


class Timer:
    """Times between events, each call after a write of 256 MiB that empties the L2 cache."""

    def __init__(self, torch):
        self.torch = torch
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def milliseconds(self, call, runs, warm_up):
        times = []
        for i in range(warm_up + runs):
            begin = self.torch.cuda.Event(enable_timing=True)
            end = self.torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            begin.record()
            call()
            end.record()
            self.torch.cuda.synchronize()
            if i >= warm_up:
                times.append(begin.elapsed_time(end))
        return times


def row(case, times, work_flops=0.0, moved_bytes=0.0, **more):
    median = statistics.median(times)
    return {"case": case, "time_ms": median, "min_ms": min(times), "max_ms": max(times),
            "num_runs": len(times), "tflops": work_flops / median * 1e-9,
            "tbytes_per_s": moved_bytes / median * 1e-9, **more}


class TorchRows:
    """torch's rows of a report; one that fails has time_ms None and a note."""

    def __init__(self, torch):
        self.torch = torch
        self.timer = Timer(torch)
        self.rows = []

    def add(self, case, measure):
        try:
            self.rows.append(measure())
        except (RuntimeError, self.torch.cuda.OutOfMemoryError) as error:
            self.rows.append({"case": case, "time_ms": None, "note": str(error).splitlines()[0]})
        self.torch.cuda.empty_cache()
        print(json.dumps(self.rows[-1]), flush=True)

    def add_gemm(self):
        def measure():
            n = 8192
            a, b = (self.torch.randn(n, n, device="cuda", dtype=self.torch.bfloat16) for _ in range(2))
            out = self.torch.empty(n, n, device="cuda", dtype=self.torch.bfloat16)
            times = self.timer.milliseconds(lambda: self.torch.matmul(a, b, out=out), 20, 5)
            return row("torch.gemm.8192", times, work_flops=2.0 * n**3)
        self.add("torch.gemm.8192", measure)

    def add_copy(self):
        def measure():
            a = self.torch.empty(1 << 30, dtype=self.torch.uint8, device="cuda")
            b = self.torch.empty_like(a)
            times = self.timer.milliseconds(lambda: b.copy_(a), 20, 3)
            return row("torch.copy", times, moved_bytes=2.0 * a.numel())
        self.add("torch.copy", measure)


def copy_ceiling(report):
    """TB/s: torch's copy or the runtime's own, the faster."""
    copies = [entry["tbytes_per_s"] for entry in report["rows"]
              if entry["case"] == "torch.copy" and entry.get("time_ms")]
    return max([report["ceilings"]["copy_tbytes_per_s"], *copies])


def add_note(summary, report, missing):
    """Why a key is null, and what the run itself has to say."""
    if missing or report.get("note"):
        summary["note"] = "; ".join(([report["note"]] if report.get("note") else []) + missing)


def origin(report):
    return f"{report['device']}, {report['date']}, commit `{report['commit'][:12]}`."


def git_commit():
    result = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def make_parser(description, cases, seconds):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build/cuda/bench/cuda/msa_bench_cuda"))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="of the binary, where this is no git checkout")
    parser.add_argument("--filter", default=cases)
    parser.add_argument("--skip", default="")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--skip-dense", action="store_true")
    return parser


def record(name, arguments, summary_of, measure_torch, skip=()):
    """Runs the binary and torch; writes <name>-<date>.json and <name>_summary.json."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = run_binary(arguments, folder, skip)
    report["commit"] = arguments.commit or git_commit()
    report["date"] = datetime.date.today().isoformat()

    def write():
        report["seconds"] = round(time.monotonic() - begin, 1)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}-{report['date']}.json").write_text(json.dumps(report, indent=1) + "\n")
        summary = summary_of(report)
        (arguments.out / f"{name}_summary.json").write_text(json.dumps(summary, indent=1) + "\n")
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
