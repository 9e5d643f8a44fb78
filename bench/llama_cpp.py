# SPDX-License-Identifier: Apache-2.0
"""The same MiniMax-M3 weights in msa.cpp and in llama.cpp, on this machine's CPU.

    python3 bench/llama_cpp.py run   # measures, writes bench/results/cpu/llama_cpp-<date>.json
    python3 bench/tables.py          # the tables of all result files

Needs build/release (with bench/run_tokens) and, the first time, a network: llama-cpp-python is
compiled for this machine into a virtual environment under --work-dir (6 minutes on 2 cores). What is
done, in this order:

  check   both programs on short and long prompts, f32 throughout: the same logits
  probe   llama.cpp with several settings; the fastest that computes the model are measured
  time    the programs in turn, REPEATS times. One pass over the longest prompt gives the time of the
          shorter ones too, because causal prefill of a prompt begins with prefill of its beginning;
          then DECODE tokens are fed one at a time
"""

import argparse
import array
import datetime
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys

import prefill

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDE = ROOT / "bench" / "llama_cpp_side.py"
PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"]
# Everything that makes llama.cpp fast on a CPU is on by default; the rest is not needed.
FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF",
         "-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TESTS=OFF",
         "-DLLAMA_BUILD_SERVER=OFF"]
SETTINGS = [
    {"mode": "msa", "cache": "f16", "ubatch": 512},
    {"mode": "msa", "cache": "bf16", "ubatch": 512},
    {"mode": "msa", "cache": "f32", "ubatch": 512},
    {"mode": "msa", "cache": "f16", "ubatch": 2048},
    {"mode": "dense", "cache": "f16", "ubatch": 512},
    {"mode": "dense_no_flash", "cache": "f16", "ubatch": 512},
]
VOCABULARY = 2048
# A wrong norm, rotation or selection changes logits by about their own size; f32 rounding, and angles
# of the rotation that two programs round differently, by less than 1% of it (0.4% seen).
LARGEST_DIFFERENCE = 0.05


def setup(work):
    """Makes what is missing of the virtual environment, the weights and the token ids."""
    python = work / "venv" / "bin" / "python"
    if subprocess.run([python, "-I", "-c", "import llama_cpp, gguf, numpy"], capture_output=True,
                      check=False).returncode if python.exists() else True:
        print("building llama-cpp-python, once: about 12 minutes of one core", flush=True)
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-binary",
                        "llama-cpp-python", *PACKAGES], check=True,
                       env=os.environ | {"CMAKE_ARGS": " ".join(FLAGS)})
    subprocess.run([python, "-I", SIDE, "model", work / "model"], check=True)


def write_ids(path, count):
    generator = random.Random(20260602)
    path.write_bytes(array.array("i", [generator.randrange(VOCABULARY) for _ in range(count)]).tobytes())


def read_logits(path):
    values = array.array("f")
    values.frombytes(path.read_bytes())
    return [values[i:i + VOCABULARY] for i in range(0, len(values), VOCABULARY)]


def run_ours(work, options, prompt, decode, cache):
    write_ids(work / "ids.bin", prompt + decode)
    output = subprocess.run(
        [options.build / "bench" / "run_tokens", "--model", work / "model" / "hf", "--ids",
         work / "ids.bin", "--prefill", str(prompt), "--cache-dtype", cache, "--logits",
         work / "ours.f32"], check=True, capture_output=True, text=True,
        env=os.environ | {"MSA_NUM_THREADS": str(options.threads)}).stdout
    return json.loads(output) | {"logits": read_logits(work / "ours.f32")}


def run_theirs(work, options, prompt, decode, setting, weights="f16"):
    write_ids(work / "ids.bin", prompt + decode)
    request = setting | {
        "gguf": str(work / "model" / f"{weights}.gguf"), "ids": str(work / "ids.bin"),
        "prefill": prompt, "threads": options.threads, "logits": str(work / "theirs.f32")}
    output = subprocess.run([work / "venv" / "bin" / "python", "-I", SIDE, "time", json.dumps(request)],
                            check=True, capture_output=True, text=True).stdout
    return json.loads(output) | {"logits": read_logits(work / "theirs.f32")}


def compare(ours, theirs):
    """Rows are the prompt's last token and the decoded ones."""
    rows = list(zip(ours["logits"], theirs["logits"], strict=True))
    size = math.sqrt(statistics.fmean(x * x for a, _ in rows for x in a))
    return {
        "rows": len(rows),
        "rms_of_logits": size,
        "max_difference_over_rms": max(abs(x - y) for a, b in rows for x, y in zip(a, b)) / size,
        "same_likeliest_token": sum(max(range(VOCABULARY), key=a.__getitem__)
                                    == max(range(VOCABULARY), key=b.__getitem__) for a, b in rows),
    }


def check(work, options):
    checks = []
    for prompt in (300, 4096):
        setting = {"mode": "msa", "cache": "f32", "ubatch": 512}
        ours = run_ours(work, options, prompt, 16, "f32")
        theirs = run_theirs(work, options, prompt, 16, setting, "f32")
        row = {"prompt_tokens": prompt, "dtype": "f32"} | compare(ours, theirs)
        print(f"check, {prompt} tokens: largest difference of logits "
              f"{row['max_difference_over_rms']:.1e} of their rms, same likeliest token in "
              f"{row['same_likeliest_token']} of {row['rows']} rows", flush=True)
        if row["max_difference_over_rms"] > LARGEST_DIFFERENCE:
            sys.exit("the programs do not compute the same model")
        checks.append(row)
    return checks


def seconds_at(report, tokens):
    return next(p["seconds"] for p in report["prefill"] if p["tokens"] == tokens)


def name_of(setting):
    return f"{setting['mode']}, {setting['cache']} cache, ubatch {setting['ubatch']}"


def probe(work, options):
    rows = []
    for setting in SETTINGS:
        report = run_theirs(work, options, options.probe_tokens, 16, setting)
        rows.append(setting | {
            "prompt_tokens": options.probe_tokens, "prefill_seconds": report["prefill"][-1]["seconds"],
            "decode_seconds": statistics.median(report["decode"])})
        print(f"llama.cpp with {name_of(setting)}: {options.probe_tokens} tokens in "
              f"{rows[-1]['prefill_seconds']:.2f} s, {1e3 * rows[-1]['decode_seconds']:.2f} ms/token",
              flush=True)
    return rows


def settings_to_measure(probes):
    """The fastest of those that compute the model, by prefill; by decode too where that is another."""
    able = [p for p in probes if p["mode"] == "msa" and p["ubatch"] == 512]
    first = min(able, key=lambda p: p["prefill_seconds"])
    second = min(able, key=lambda p: p["decode_seconds"])
    chosen = [first] if second["decode_seconds"] > 0.95 * first["decode_seconds"] else [first, second]
    return [{key: p[key] for key in ("mode", "cache", "ubatch")} for p in chosen]


def time_programs(work, options, settings):
    longest = max(options.lengths)
    programs = {"msa.cpp": lambda: run_ours(work, options, longest, options.decode, "bf16")}
    for setting in settings:
        programs[f"llama.cpp, {name_of(setting)}"] = (
            lambda setting=setting: run_theirs(work, options, longest, options.decode, setting))
    reports, logits = {name: [] for name in programs}, {}
    for repeat in range(options.repeats):
        for name, run in programs.items():
            report = run()
            logits[name] = {"logits": report.pop("logits")}
            reports[name].append(report)
            print(f"run {repeat + 1} of {options.repeats}, {name}: {longest} tokens in "
                  f"{seconds_at(report, longest):.2f} s, "
                  f"{1e3 * statistics.median(report['decode']):.2f} ms/token", flush=True)
    ours, *others = logits
    differences = {name: compare(logits[ours], logits[name]) for name in others}
    return reports, differences


def summary_of(reports, lengths):
    """Medians over the repeats; a repeat's decode time is the median over its tokens."""
    return {
        "prefill": [{"tokens": n} | prefill.median_and_spread([seconds_at(r, n) for r in reports])
                    for n in lengths],
        "decode": prefill.median_and_spread([statistics.median(r["decode"]) for r in reports]),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in reports),
    } | ({"parts": reports[-1]["parts"]} if "parts" in reports[-1] else {})


def measure(options):
    work = options.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options.build = options.build.resolve()
    setup(work)
    checks = check(work, options)
    probes = probe(work, options)
    reports, differences = time_programs(work, options, settings_to_measure(probes))
    programs = {name: summary_of(rows, options.lengths) for name, rows in reports.items()}
    theirs = [p for name, p in programs.items() if name != "msa.cpp"]
    longest = max(options.lengths)

    def ratio(phase):
        """Our tokens/s over llama.cpp's, at its fastest setting."""
        return min(phase(p) for p in theirs) / phase(programs["msa.cpp"])

    prefill_ratios = {
        n: ratio(lambda p, n=n: next(r["median"] for r in p["prefill"] if r["tokens"] == n))
        for n in options.lengths}
    git = subprocess.run(["git", "rev-parse", "HEAD"], check=True, cwd=ROOT, capture_output=True,
                         text=True).stdout.strip()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    shorten = {8192: "8k", 16384: "16k", 32768: "32k"}
    report = {
        "schema": "msa.llama_cpp/1", "date": date, "commit": git,
        "device": device(work, options), "threads": options.threads,
        "command": " ".join(["python3 bench/llama_cpp.py run", *options.recorded]),
        "llama_cpp": {"packages": PACKAGES, "cmake": FLAGS, "version": version_of(work),
                      "system": next(r[0]["system"] for n, r in reports.items() if n != "msa.cpp")},
        "model": "hidden 256, 4 layers (1 dense, 3 sparse), 16 query / 4 KV heads of 128, 4 experts "
                 "top 2, random weights that bf16, f16 and f32 hold exactly; random tokens",
        "weights": {"msa.cpp": "bf16, bf16 cache", "llama.cpp": "f16, cache as named"},
        "repeats": options.repeats, "decode_tokens": options.decode,
        "checks": checks, "differences_when_timed": differences, "tried": probes,
        "programs": programs,
        "decode_context": longest,
    } | {f"prefill_{shorten.get(n, n)}_ratio": r for n, r in prefill_ratios.items()} | {
        f"decode_{shorten.get(longest, longest)}_ratio": ratio(lambda p: p["decode"]["median"])}
    path = options.output or prefill.RESULTS / f"llama_cpp-{date}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def device(work, options):
    subprocess.run([options.build / "tools" / "msa", "info", "--json", work / "info.json"], check=True,
                   stdout=subprocess.DEVNULL, env=os.environ | {"MSA_NUM_THREADS": str(options.threads)})
    return json.loads((work / "info.json").read_text())["device"]


def version_of(work):
    code = "import llama_cpp; print(llama_cpp.__version__)"
    return subprocess.run([work / "venv" / "bin" / "python", "-I", "-c", code], check=True,
                          capture_output=True, text=True).stdout.strip()


def comparison_table(report):
    ours = report["programs"]["msa.cpp"]
    theirs = {n: p for n, p in report["programs"].items() if n != "msa.cpp"}

    def fastest(phase):
        return min(theirs.values(), key=phase)

    lines = ["| | msa.cpp | llama.cpp | ratio |", "|---|---|---|---|"]
    for index, row in enumerate(ours["prefill"]):
        other = fastest(lambda p, i=index: p["prefill"][i]["median"])["prefill"][index]
        lines.append(f"| prefill of {row['tokens']:,} tokens | {row['median']:.2f} s "
                     f"| {other['median']:.1f} s | {other['median'] / row['median']:.1f}x |")
    a, b = ours["decode"]["median"], fastest(lambda p: p["decode"]["median"])["decode"]["median"]
    lines.append(f"| decode at {report['decode_context']:,} tokens | {1e3 * a:.2f} ms/token "
                 f"| {1e3 * b:.2f} ms/token | {b / a:.1f}x |")
    return "\n".join(lines)


def caption(report, path):
    theirs = [name for name in report["programs"] if name != "msa.cpp"]
    spread = max(100 * x["mad"] / x["median"] for p in report["programs"].values()
                 for x in [*p["prefill"], p["decode"]])
    return (
        f"{report['device']}, {report['threads']} threads each, {report['date']}; `{report['command']}` at commit "
        f"`{report['commit'][:12]}`; medians of {report['repeats']}, median absolute deviation up to {spread:.0f}%. "
        f"llama.cpp as in llama-cpp-python {report['llama_cpp']['version']}, compiled for this CPU, "
        f"{' and '.join(name.removeprefix('llama.cpp, ') for name in theirs)}, f16 weights; msa.cpp with bf16 "
        f"weights and cache. Model: {report['model']}. Data: `{path}`.")


def summary_table(report, path):
    return f"The same MiniMax-M3 weights in llama.cpp:\n\n{comparison_table(report)}\n\n{caption(report, path)}"


def details(report, path):
    tried = [f"| {name_of(t)} | {t['prefill_seconds']:.2f} s | {1e3 * t['decode_seconds']:.2f} ms |"
             for t in report["tried"]]
    largest = max(c["max_difference_over_rms"] for c in report["checks"])
    seen = sum(c["same_likeliest_token"] for c in report["checks"])
    rows = sum(c["rows"] for c in report["checks"])
    parts = report["programs"]["msa.cpp"]["parts"]
    shares = "; ".join(
        phase + " " + ", ".join(f"{part} {100 * parts[phase][part] / parts[phase]['seconds']:.0f}%"
                                for part in ("indexer", "selection", "attention", "rest"))
        for phase in ("prefill", "decode"))
    return "\n".join([
        comparison_table(report), "", caption(report, path), "",
        f"Both compute the same model: in f32 the logits of {rows} tokens differ by at most "
        f"{100 * largest:.1g}% of their root mean square, and {seen} of {rows} likeliest tokens agree. "
        f"Our time: {shares}.", "",
        f"Settings of llama.cpp tried on {report['tried'][0]['prompt_tokens']:,} tokens. `dense` is "
        "another model: every layer attends everything, with and without flash attention.", "",
        "| setting | prefill | decode |", "|---|---|---|", *tried])


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["setup", "check", "run"])
    parser.add_argument("--work-dir", type=pathlib.Path, default=ROOT / "build" / "llama_cpp",
                        help="virtual environment, weights and logits")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "release")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768],
                        help="multiples of 2048")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after the longest prompt")
    parser.add_argument("--probe-tokens", type=int, default=8192)
    parser.add_argument("--output", type=pathlib.Path, help="instead of a file under bench/results")
    options = parser.parse_args(arguments)
    private = ("--work-dir", "--build", "--output")
    options.recorded = [a for i, a in enumerate(arguments[1:], 1)
                        if a not in private and arguments[i - 1] not in private]
    return options


def main():
    options = parse(sys.argv[1:])
    if options.action == "setup":
        options.work_dir.mkdir(parents=True, exist_ok=True)
        setup(options.work_dir.resolve())
    elif options.action == "check":
        check(options.work_dir.resolve(), options)
    elif options.action == "run":
        measure(options)


if __name__ == "__main__":
    main()
