# SPDX-License-Identifier: Apache-2.0
"""Long real text without a download: the source of the Python packages that are installed.

    python examples/train/data.py --out data                      # all packages, up to --max-mb
    python examples/train/data.py --out data --packages json,email --vocab 640

Every package becomes one document, its files one behind the other (small packages share one, so that
documents reach --min-tokens). Whole packages are held out. Written to --out:

    tokenizer.json          byte-level BPE trained on the text, digits one by one
    train.bin, heldout.bin  token ids, uint16; memory-mapped by tasks.py
    meta.json               where each document begins and ends, sizes, times
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import site
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".cuh", ".cpp", ".cu", ".md", ".rst"}
# Copies of other packages would carry held-out text into the training set; headers of drivers are tables.
SKIPPED_FOLDERS = {"__pycache__", "_vendor", "vendored", "node_modules", "site-packages", "dist-packages", "nvidia"}
MAX_FILE = 400_000  # bytes; larger ones are tables
MAX_LINE = 160  # mean bytes of a line; longer ones are data
SPECIAL_TOKENS = ["]~!b[", "[e~["]  # begin and end of text, MiniMax's names
# Words with one leading sign or space, digits one by one, signs, ends of lines, other white space.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Files = list[tuple[str, pathlib.Path, int]]  # name to print, path, bytes


def package_files() -> dict[str, Files]:
    """Source files by package, sorted; single modules of the standard library are one package."""
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    roots = [pathlib.Path(path) for path in {*site.getsitepackages(), *sys.path} if path.endswith("-packages")]
    packages: dict[str, Files] = {}
    for root in sorted({*(r for r in roots if r.is_dir()), stdlib}):
        for top in sorted(root.iterdir()):
            if top.name in SKIPPED_FOLDERS or top.name.endswith(("-info", ".egg")):
                continue
            if top.is_file():
                paths, name = [top], "stdlib" if root == stdlib else "modules"
            else:
                paths, name = sorted(walk(top)), top.name
            for path in paths:
                if path.suffix in SUFFIXES and 64 < path.stat().st_size <= MAX_FILE:
                    entry = (str(path.relative_to(root)), path, path.stat().st_size)
                    packages.setdefault(name, []).append(entry)
    return packages


def walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for directory, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS]
        yield from (pathlib.Path(directory, file) for file in files)


def read_texts(files: Files, seen: set[bytes], max_bytes: int) -> list[str]:
    """Texts with a heading each; what is no UTF-8, no prose or code, or met before is left out."""
    texts, total = [], 0
    for name, path, _ in files:
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha1(data).digest()
        if digest in seen or len(data) > MAX_LINE * (1 + data.count(b"\n")):
            continue
        seen.add(digest)
        texts.append(f"\n==== {name}\n\n{text}")
        total += len(data)
        if total > max_bytes:
            break
    return texts


def choose_heldout(sizes: dict[str, int], share: float, smallest: int) -> list[str]:
    """Middle-sized packages in the order of their names' hashes, until they are `share` of all bytes."""
    total, chosen, size = sum(sizes.values()), [], 0
    for name in sorted(sizes, key=lambda n: hashlib.sha1(n.encode()).hexdigest()):
        if size < share * total and smallest <= sizes[name] <= 0.03 * total:
            chosen.append(name)
            size += sizes[name]
    return chosen


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def encode_texts(job: tuple[str, list[str]]) -> np.ndarray:
    """Runs in a worker process."""
    path, texts = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(path)
    ids = [np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts]
    return np.concatenate(ids) if ids else np.zeros(0, np.uint16)


def jobs_of(texts: list[str], path: str, size: int = 1 << 18) -> Iterator[tuple[str, list[str]]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= size:
            yield path, batch
            batch = []
    if batch:
        yield path, batch


def write_split(
    out: pathlib.Path, split: str, packages: dict[str, list[str]], min_tokens: int, pool: ProcessPoolExecutor
) -> list[dict[str, object]]:
    """Writes `split`.bin and returns its documents; small packages in a row share one."""
    path = str(out / "tokenizer.json")
    documents: list[dict[str, object]] = []
    position, begin, names = 0, 0, []
    pending = [(name, pool.map(encode_texts, jobs_of(texts, path))) for name, texts in packages.items()]
    with open(out / f"{split}.bin", "wb") as file:
        for name, parts in pending:
            for ids in parts:
                file.write(ids.tobytes())
                position += len(ids)
            names.append(name)
            if position - begin >= min_tokens:
                documents.append({"packages": names, "begin": begin, "end": position})
                begin, names = position, []
    if position > begin:
        if documents:
            documents[-1]["packages"] += names  # type: ignore[operator]
            documents[-1]["end"] = position
        else:
            documents.append({"packages": names, "begin": begin, "end": position})
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens of the vocabulary (default 4096)")
    parser.add_argument("--packages", default="", help="take these only, comma separated")
    parser.add_argument("--heldout", default="", help="hold these out; default: chosen by hash and size")
    parser.add_argument("--heldout-share", type=float, default=0.02)
    parser.add_argument("--max-mb", type=float, default=120, help="megabytes of text in all")
    parser.add_argument("--max-package-mb", type=float, default=32)
    parser.add_argument("--tokenizer-mb", type=float, default=24, help="megabytes that train the tokenizer")
    parser.add_argument("--min-tokens", type=int, default=131072, help="per document")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    start = time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {text}", flush=True)

    packages = package_files()
    if args.packages:
        packages = {name: packages[name] for name in args.packages.split(",")}
    sizes = {name: sum(size for _, _, size in files) for name, files in packages.items()}
    heldout = args.heldout.split(",") if args.heldout else choose_heldout(sizes, args.heldout_share, 300_000)
    log(f"{len(packages)} packages, {sum(sizes.values()) / 1e6:.1f} MB; held out: {', '.join(heldout)}")

    seen: set[bytes] = set()
    texts: dict[str, dict[str, list[str]]] = {"heldout": {}, "train": {}}
    left = args.max_mb * 1e6
    for name in [*heldout, *(n for n in sorted(sizes, key=lambda n: sizes[n]) if n not in heldout)]:
        texts_of = read_texts(packages[name], seen, int(min(left, args.max_package_mb * 1e6)))
        left -= sum(map(len, texts_of))
        if texts_of:
            texts["heldout" if name in heldout else "train"][name] = texts_of
    num_bytes = {split: sum(len(t) for ts in of.values() for t in ts) for split, of in texts.items()}
    log(f"read {num_bytes['train'] / 1e6:.1f} MB to train on, {num_bytes['heldout'] / 1e6:.1f} MB held out")

    args.out.mkdir(parents=True, exist_ok=True)
    everything = [text for ts in texts["train"].values() for text in ts]
    stride = max(1, int(num_bytes["train"] / (args.tokenizer_mb * 1e6)))
    tokenizer = train_tokenizer(everything[::stride], args.vocab)
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    log(f"tokenizer of {tokenizer.get_vocab_size()} tokens")

    meta: dict[str, object] = {"vocab_size": tokenizer.get_vocab_size(), "bytes": num_bytes}
    with ProcessPoolExecutor(args.workers) as pool:
        for split, of in texts.items():
            documents = write_split(args.out, split, of, args.min_tokens, pool)
            tokens = documents[-1]["end"] if documents else 0
            meta[split] = documents
            log(f"{split}: {len(documents)} documents, {int(tokens) / 1e6:.2f} M tokens")
    meta["seconds"] = round(time.monotonic() - start, 1)
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
