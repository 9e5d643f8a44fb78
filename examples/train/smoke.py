# SPDX-License-Identifier: Apache-2.0
"""The whole recipe at toy size on a CPU, in less than two minutes; what it checks is counted at the end.

    python examples/train/smoke.py                                    # all parts that this machine can do
    python examples/train/smoke.py --msa build/release/tools/msa      # with our runtime's continuation

Data from the standard library; three runs, one of them cut in two and compared bit by bit; DDP and FSDP on two
processes; evaluation; export, read back by transformers and by `msa run`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

import checkpoint
import evaluate
import export
import tasks
import train

HERE = pathlib.Path(__file__).resolve().parent
PACKAGES = "asyncio,email,json,logging,unittest"


class Checks:
    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.passed = self.failed = self.skipped = 0

    def check(self, what: str, good: bool, detail: str = "") -> None:
        self.passed += good
        self.failed += not good
        print(f"[{time.monotonic() - self.begin:5.1f} s] {'ok  ' if good else 'FAIL'} {what} {detail}", flush=True)

    def skip(self, what: str, why: str) -> None:
        self.skipped += 1
        print(f"[{time.monotonic() - self.begin:5.1f} s] skip {what}: {why}", flush=True)


def same_weights(first: pathlib.Path, second: pathlib.Path) -> float:
    """Largest difference."""
    a, b = (checkpoint.load(path)["model"] for path in (first, second))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def common(folder: pathlib.Path, out: str, run: str, attention: str = "torch") -> list[str]:
    return ["--data", str(folder / "data"), "--out", str(folder / out), "--recipe", run, "--preset", "smoke", "--device", "cpu",
            "--attention", attention, "--log-every", "2"]  # fmt: skip


def check_runs(folder: pathlib.Path, checks: Checks) -> None:
    for run in ("gqa", "msa", "converted"):
        complete = train.main(common(folder, "runs", run))
        with open(folder / "runs" / run / "log.csv") as file:
            rows = file.read().splitlines()
        checks.check(f"{run} is trained and logged", complete and len(rows) > 5, f"({len(rows) - 1} lines)")
    for stop in ("5", "12"):  # within the warmup and after it
        train.main([*common(folder, "cut", "msa"), "--stop-step", stop])
    train.main(common(folder, "cut", "msa"))
    difference = same_weights(folder / "runs/msa/latest.pt", folder / "cut/msa/latest.pt")
    checks.check("a run that was cut twice has the same bits", difference == 0.0)
    first, second = ((folder / out / "msa/log.csv").read_text().splitlines() for out in ("runs", "cut"))
    without_times = [[",".join(line.split(",")[:-2]) for line in lines] for lines in (first, second)]
    checks.check("and the same log", without_times[0] == without_times[1])
    train.main([*common(folder, "parts", "msa"), "--accumulate", "2", "--stop-step", "4"])
    train.main([*common(folder, "whole", "msa"), "--stop-step", "4"])
    difference = same_weights(folder / "parts/msa/latest.pt", folder / "whole/msa/latest.pt")
    # Sums in another order differ by f32 rounding; Adam's first steps are lr * sign and amplify it where gradients vanish.
    checks.check("accumulated gradients give nearly the same weights", difference < 1e-2, f"({difference:.1e})")


def check_library(folder: pathlib.Path, checks: Checks) -> None:
    if importlib.util.find_spec("msa_cpp") is None:
        checks.skip("msa_cpp.torch", "not installed")
        return
    for attention in ("torch", "msa"):
        train.main([*common(folder, attention, "msa", attention), "--stop-step", "14"])  # the last steps are sparse
    difference = same_weights(folder / "torch/msa/latest.pt", folder / "msa/msa/latest.pt")
    checks.check("msa_cpp.torch trains nearly the same weights", difference < 1e-2, f"({difference:.1e})")


def check_parallel(folder: pathlib.Path, checks: Checks) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kind in ("ddp", "fsdp"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   str(HERE / "train.py"), *common(folder, kind, "msa"), "--parallel", kind, "--stop-step", "4"]  # fmt: skip
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            checks.check(f"{kind} on 2 processes", False, result.stderr[-2000:])
            continue
        difference = same_weights(folder / kind / "msa/latest.pt", folder / "whole/msa/latest.pt")
        checks.check(f"{kind} on 2 processes gives nearly the weights of one", difference < 1e-2, f"({difference:.1e})")


def check_evaluation(folder: pathlib.Path, checks: Checks) -> None:
    summary = folder / "summary.json"
    evaluate.main(["--data", str(folder / "data"), "--runs", str(folder / "runs"), "--out", str(summary), "--device", "cpu",
                   "--attention", "torch", "--lengths", "256", "512", "--trials", "4", "--loss-length", "512", "--windows", "2",
                   "--recall-length", "512", "--tokens", "1024"])  # fmt: skip
    runs = json.loads(summary.read_text())["runs"]
    good = all({"validation_loss", "pass_key", "pairs"} <= set(runs[run]) for run in ("gqa", "msa", "converted"))
    recalls = [value for run in ("msa", "converted") for values in runs[run]["recall"]["512"].values() for value in values]
    checks.check("evaluation has all its numbers", good and all(0.0 <= value <= 1.0 for value in recalls))


def check_export(folder: pathlib.Path, checks: Checks, msa: pathlib.Path | None) -> None:
    source, out = folder / "runs/msa/latest.pt", folder / "exported"
    size = export.export(source, folder / "data/tokenizer.json", out, torch.float32)
    model = export.load_model(source)
    corpus, planter = tasks.Corpus.open(folder / "data", "heldout"), tasks.Planter(folder / "data")
    text = planter.tokenizer.decode(corpus.tokens[1000:1300].tolist())
    ids = planter.encode(text).tolist()
    logits = export.logits_of(model, ids)
    checks.check("export", size > 0, f"({size / 2**20:.2f} MiB)")
    if importlib.util.find_spec("transformers.models.minimax_m3_vl"):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            other = theirs(torch.tensor([ids])).logits[0]
        error = float((other - logits).abs().max() / logits.abs().max())
        checks.check("transformers gives the same logits", error < 1e-4, f"(relative {error:.1e}, {len(ids)} tokens)")
    else:
        checks.skip("transformers", "it has no MiniMax-M3")
    if msa is None or not msa.exists():
        checks.skip("msa run", f"no program {msa}")
        return
    (folder / "prompt.txt").write_text(text)
    command = [str(msa), "run", "--model", str(out), "--prompt-file", str(folder / "prompt.txt"), "--max-tokens", "24",
               "--quiet", "--json", str(folder / "run.json")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        checks.check("msa run", False, result.stderr[-2000:])
        return
    written = json.loads((folder / "run.json").read_text())["runs"][0]["tokens"]
    expected, margins = export.greedy(model, ids, len(written))
    wrong = [i for i, (a, b) in enumerate(zip(written, expected)) if a != b]
    # Behind a choice between equals up to rounding the texts may differ.
    good = not wrong or margins[wrong[0]] < 1e-4 * float(logits.abs().max())
    checks.check("msa run continues as PyTorch does", good, f"({len(written)} tokens, smallest margin {min(margins):.1e})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--msa", type=pathlib.Path, default=HERE.parents[1] / "build/release/tools/msa", help="our program")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for what is written; default: a temporary one")
    parser.add_argument("--no-parallel", action="store_true", help="without DDP and FSDP")
    args = parser.parse_args()
    checks = Checks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or pathlib.Path(temporary)
        command = [sys.executable, str(HERE / "data.py"), "--out", str(folder / "data"), "--packages", PACKAGES, "--heldout",
                   "asyncio", "--vocab", "640", "--min-tokens", "32768", "--workers", "2"]  # fmt: skip
        checks.check("data", subprocess.run(command).returncode == 0)
        check_runs(folder, checks)
        check_library(folder, checks)
        if args.no_parallel:
            checks.skip("DDP and FSDP", "--no-parallel")
        else:
            check_parallel(folder, checks)
        check_evaluation(folder, checks)
        check_export(folder, checks, args.msa)
    print(f"{checks.passed} passed, {checks.failed} failed, {checks.skipped} skipped in {time.monotonic() - checks.begin:.0f} s")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
