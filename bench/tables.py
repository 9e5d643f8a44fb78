# SPDX-License-Identifier: Apache-2.0
"""Every measured table of the Markdown files, from the newest result files.

    python3 bench/tables.py           # rewrites the tables
    python3 bench/tables.py --check   # changes nothing; exit 1 where a table is not what the files give

A table stands in its document between `<!-- measured: NAME -->` and `<!-- measured: end -->`, where NAME is
the first word of a row of TABLES. To add one: a row here, the two comments in the document, and in the module
that writes the result files a function (report, path) -> Markdown text, where `report` is the parsed file and
`path` its name relative to the repository. It must take its numbers from the report alone, so that the
check gives the same text everywhere. Where no file matches the pattern, the place stays empty.
"""

import difflib
import importlib
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- measured: (\S+) -->\n)(.*?)(<!-- measured: end -->)", re.DOTALL)

# Name, result files under bench/results (the last by name counts), module of this folder, its function.
TABLES = (
    ("prefill", "cpu/prefill-*.json", "prefill", "summary_table"),
    ("prefill-details", "cpu/prefill-*.json", "prefill", "details"),
    ("targets", "cpu/summary.json", "cpu_summary", "targets_table"),
    ("cpu-operations", "cpu/ops-gbench-*.json", "cpu_summary", "rows_table"),
    ("llama-cpp", "cpu/llama_cpp-*.json", "llama_cpp", "summary_table"),
    ("llama-cpp-details", "cpu/llama_cpp-*.json", "llama_cpp", "details"),
    ("long-context", "cpu/long-context-*.json", "long_context", "summary_table"),
    ("h100-prefill", "h100/prefill_summary.json", "gpu_prefill", "targets_table"),
    ("h100-decode", "h100/decode_summary.json", "gpu_decode", "targets_table"),
    ("h100-decode-rows", "h100/decode-*.json", "gpu_decode", "rows_table"),
    ("h100-train", "h100/train_summary.json", "gpu_train", "targets_table"),
    ("h100-train-rows", "h100/train-*.json", "gpu_prefill", "rows_table"),
    ("h100-rows", "h100/prefill-*.json", "gpu_prefill", "rows_table"),
)
DOCUMENTS = ("README.md", "bench/results/cpu/README.md", "bench/results/h100/README.md")


def newest(pattern):
    """The last by name, so the newest date, of the result files that match; None where there is none."""
    return max((ROOT / "bench" / "results").glob(pattern), default=None)


def generate(name):
    """The text of a place, empty where nothing was measured."""
    for known, pattern, module, function in TABLES:
        if known != name:
            continue
        path = newest(pattern)
        if path is None:
            return ""
        report = json.loads(path.read_text())
        text = getattr(importlib.import_module(module), function)(report, path.relative_to(ROOT))
        return text.strip() + "\n"
    raise SystemExit(f"tables: no table is called '{name}'; there are {[row[0] for row in TABLES]}")


def rewritten(text):
    return PLACE.sub(lambda match: match[1] + generate(match[2]) + match[4], text)


def main(check):
    stale = False
    for name in DOCUMENTS:
        document = ROOT / name
        text = document.read_text()
        if text.count("<!-- measured: ") != 2 * len(PLACE.findall(text)):
            raise SystemExit(f"tables: {name}: a measured place is not closed")
        new = rewritten(text)
        if new == text:
            continue
        if check:
            stale = True
            sys.stdout.writelines(difflib.unified_diff(
                text.splitlines(True), new.splitlines(True), name, "what the result files give"))
        else:
            document.write_text(new)
            print(f"rewrote the tables of {name}")
    if stale:
        sys.exit("tables are not what the result files give: python3 bench/tables.py")


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    main(check=sys.argv[1:] == ["--check"])
