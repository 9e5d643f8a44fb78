# SPDX-License-Identifier: Apache-2.0
"""How often the question of `make run` is answered with other words, at other places, in other text.

    sh cmake/document.sh build/release/document.txt
    python examples/train/hit_rate.py --trials 32

A trial draws a key and a value (words of one token, as tasks.py does), the line of the repository's text where the
document begins and the line behind which the fact stands; cmake/planted_fact.sh makes the prompt, with at least --tokens
tokens between statement and question. A hit is an answer that begins with the value. Every trial counts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
import subprocess
import tempfile

from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
OTHERS = set("token label color layout child kernel host link".split())  # the pairs that planted_fact.sh adds


def make_prompt(folder: pathlib.Path, tokenizer: Tokenizer, tokens: int, key: str, value: str, line: int) -> tuple[str, int]:
    """The prompt and the tokens from the fact's end to the question's end."""
    wanted = tokens
    while True:
        command = ["sh", str(ROOT / "cmake/planted_fact.sh"), str(folder / "document.txt"), str(wanted), key, value,
                   str(folder / "prompt.txt"), str(line)]  # fmt: skip
        subprocess.run(command, check=True)
        prompt = (folder / "prompt.txt").read_text()
        distance = len(tokenizer.encode(prompt.split(f" {key} {value},", 1)[1]).ids)
        if distance >= tokens:
            return prompt, distance
        wanted += tokens - distance + tokens // 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "examples/mini_m3")
    parser.add_argument("--msa", type=pathlib.Path, default=ROOT / "build/release/tools/msa", help="our program")
    parser.add_argument("--document", type=pathlib.Path, default=ROOT / "build/release/document.txt")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--attention", choices=("msa", "dense"), default="msa")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    # Ġ stands for a space: words with one in front of them.
    words = sorted(word[1:] for word in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]{2,10}", word))
    lines = args.document.read_text().splitlines(keepends=True)
    rng = random.Random(args.seed)
    hits = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for number in range(args.trials):
            key, value = rng.sample([word for word in words if word not in OTHERS], 2)
            begin, line = rng.randrange(len(lines)), rng.randrange(1, 200)
            (folder / "document.txt").write_text("".join(lines[begin:] + lines[:begin]))
            prompt, distance = make_prompt(folder, tokenizer, args.tokens, key, value, line)
            command = [str(args.msa), "run", "--model", str(args.model), "--prompt-file", str(folder / "prompt.txt"),
                       "--max-tokens", "2", "--attention", args.attention, "--quiet", "--json",
                       str(folder / "run.json")]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
            text = json.loads((folder / "run.json").read_text())["runs"][0]["text"]
            hit = re.match(rf" {value}\b", text) is not None
            hits += hit
            print(f"{number}: {'hit ' if hit else 'miss'} {key} -> {value}, answered {text!r}, {distance} tokens back, "
                  f"document from line {begin}, fact behind line {line} of it", flush=True)  # fmt: skip
    print(f"{hits} of {args.trials} found with {args.attention} attention")


if __name__ == "__main__":
    main()
