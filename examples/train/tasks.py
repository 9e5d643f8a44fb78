# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens: windows of text, and windows with facts planted at many distances.

A planted fact stands twice in a row: a statement and, further on, its repetition or a question. Three
kinds: pass keys (five digits behind a name), pairs of words (multi-query associative recall) and runs of
random tokens. Row r of step s depends on (seed, s, r) only, so the order of the data is the same
for every run, number of processes and way of resuming.

    python examples/train/tasks.py --data data --length 512       # prints rows
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from config import PRESETS, Schedule

# What a target token is; its weight in the loss is WEIGHTS[kind].
TEXT, PLANTED, ANSWER, REPEAT = 0, 1, 2, 3
WEIGHTS = (1.0, 0.1, 3.0, 1.0)  # a statement's content is random: nothing can be learnt from it

COLOURS = (
    "amber azure black blue bronze brown coral crimson cyan golden green grey indigo ivory jade lilac lime "
    "magenta maroon olive orange pearl pink purple red ruby scarlet silver teal violet white yellow"
).split()
ANIMALS = (
    "badger bear beaver bison camel cat cobra crane crow deer dog dolphin eagle falcon ferret finch fox frog "
    "gecko goat goose hare hawk heron horse ibis koala lemur lion lizard lynx mole moose mouse newt otter owl "
    "panda parrot puma rabbit raven robin seal shark sheep snail spider swan tiger toad trout viper walrus "
    "whale wolf wombat zebra"
).split()
# Statement and question; the answer begins behind the {key} of either.
TEMPLATES = (
    ("\n# The pass key of {name} is {key}.\n", "\n# The pass key of {name} is {key}.\n"),
    ("\n\nThe pass key of {name} is {key}. Remember it.\n", "\n\nWhat is the pass key of {name}? The pass key of {name} is {key}.\n"),
    ("\n// The pass key of {name} is {key}.\n", "\n# The pass key of {name} is {key}.\n"),
)
QUESTION = "\n\nWhat is the pass key of {name}? The pass key of {name} is "
NUM_DIGITS = 5

Pieces = tuple[np.ndarray, np.ndarray]  # ids and kinds, one per token


@dataclass(frozen=True)
class Corpus:
    """One split of data.py's folder, memory-mapped."""

    tokens: np.ndarray  # uint16 [tokens]
    documents: np.ndarray  # int64 [documents, 2]: begin and end

    @classmethod
    def open(cls, folder: pathlib.Path, split: str) -> Corpus:
        meta = json.loads((folder / "meta.json").read_text())
        documents = np.array([[d["begin"], d["end"]] for d in meta[split]], dtype=np.int64)
        return cls(np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r"), documents)

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` tokens in a row of one document, each window of the corpus equally likely."""
        sizes = np.maximum(self.documents[:, 1] - self.documents[:, 0] - length + 1, 0)
        if not sizes.sum():
            raise ValueError(f"no document has {length} tokens; the longest has {self.longest()}")
        place = int(rng.integers(sizes.sum()))
        document = int(np.searchsorted(sizes.cumsum(), place, side="right"))
        begin = int(self.documents[document, 0]) + place - int(sizes[:document].sum())
        return np.asarray(self.tokens[begin : begin + length])

    def longest(self) -> int:
        return int((self.documents[:, 1] - self.documents[:, 0]).max())


class Planter:
    """Makes statements and their repetitions."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocab = self.tokenizer.get_vocab()
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.is_digit = np.zeros(self.vocab_size, dtype=bool)
        self.is_digit[[vocab[str(digit)] for digit in range(10)]] = True
        # Ġ stands for a space: words with one in front of them.
        self.words = np.array(sorted(i for word, i in vocab.items() if re.fullmatch("Ġ[a-z]{2,10}", word)))
        self.map_begin, self.comma, self.line = (self.encode(text) for text in ("\n# map:", ",", "\n"))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text).ids, dtype=np.uint16)

    def name(self, rng: np.random.Generator) -> str:
        return f"{COLOURS[rng.integers(len(COLOURS))]} {ANIMALS[rng.integers(len(ANIMALS))]}"

    def pass_key(self, rng: np.random.Generator, used: set[str]) -> tuple[Pieces, Pieces]:
        name = self.name(rng)
        while name in used:
            name = f"{self.name(rng)} {rng.integers(1000)}"
        used.add(name)
        key = "".join(map(str, rng.integers(10, size=NUM_DIGITS)))
        statement, question = TEMPLATES[rng.integers(len(TEMPLATES))]
        first = self.encode(statement.format(name=name, key=key))
        second = self.encode(question.format(name=name, key=key))
        kinds = np.full(len(second), PLANTED, dtype=np.uint8)
        kinds[np.flatnonzero(self.is_digit[second])[-NUM_DIGITS:]] = ANSWER
        return (first, np.full(len(first), PLANTED, dtype=np.uint8)), (second, kinds)

    def pairs(self, rng: np.random.Generator, used: set[int]) -> tuple[Pieces, Pieces]:
        """Up to 8 pairs of words, asked for in another order."""
        keys = [k for k in rng.choice(self.words, 8, replace=False).tolist() if k not in used]
        used.update(keys)
        values = rng.choice(self.words, len(keys)).tolist()
        order = rng.permutation(len(keys))
        first = self.pair_list(keys, values, PLANTED)
        return first, self.pair_list([keys[i] for i in order], [values[i] for i in order], ANSWER)

    def pair_list(self, keys: list[int], values: list[int], kind: int) -> Pieces:
        ids, kinds = [*self.map_begin], [PLANTED] * len(self.map_begin)
        for key, value in zip(keys, values):
            ids += [key, value, *self.comma]
            kinds += [PLANTED, kind, PLANTED]
        ids += [*self.line]
        kinds += [PLANTED] * len(self.line)
        return np.array(ids, dtype=np.uint16), np.array(kinds, dtype=np.uint8)

    def run(self, rng: np.random.Generator, longest: int) -> tuple[Pieces, Pieces]:
        ids = rng.integers(self.vocab_size, size=rng.integers(6, longest + 1)).astype(np.uint16)
        kinds = np.full(len(ids), REPEAT, dtype=np.uint8)
        kinds[:2] = PLANTED  # nothing tells that the repetition begins
        return (ids, np.full(len(ids), PLANTED, dtype=np.uint8)), (ids, kinds)


def planted_row(
    corpus: Corpus, planter: Planter, rng: np.random.Generator, length: int, planted: float
) -> Pieces:
    """`length` tokens of which a share of about `planted` belongs to facts."""
    facts: list[tuple[Pieces, Pieces]] = []
    names: set[str] = set()
    keys: set[int] = set()
    total = 0
    while True:
        draw = rng.random()
        if draw < 0.35:
            fact = planter.pass_key(rng, names)
        elif draw < 0.7 and len(keys) < len(planter.words) // 2:
            fact = planter.pairs(rng, keys)
        else:
            fact = planter.run(rng, max(6, min(96, length // 8)))
        size = len(fact[0][0]) + len(fact[1][0])
        if total + size > max(planted * length, 160) or total + size > length:
            break
        facts.append(fact)
        total += size
    space = length - total
    places: list[tuple[int, int, Pieces]] = []  # position in the text, order of equals, piece
    for number, (first, second) in enumerate(facts):
        # Half the distances spread over all scales, half over the whole row.
        far = space ** rng.random() if rng.random() < 0.5 else rng.random() * space
        begin = int(rng.random() * max(space - far, 1))
        places.append((begin, 2 * number, first))
        places.append((min(begin + int(far), space), 2 * number + 1, second))
    places.sort(key=lambda place: place[:2])
    text = corpus.window(rng, max(space, 1))
    ids, kinds, position = [], [], 0
    for place, _, (piece, kind) in places:
        ids += [text[position:place], piece]
        kinds += [np.zeros(place - position, dtype=np.uint8), kind]
        position = place
    ids.append(text[position:space])
    kinds.append(np.zeros(space - position, dtype=np.uint8))
    return np.concatenate(ids), np.concatenate(kinds)


class StepDataset(Dataset[dict[str, Tensor]]):
    """Item s is step s's part of one process: ids int64 [rows, length + 1], kinds uint8 [rows, length]."""

    def __init__(self, folder: pathlib.Path, schedule: Schedule, rank: int = 0, world: int = 1) -> None:
        self.folder, self.schedule, self.rank, self.world = folder, schedule, rank, world
        self.parts: tuple[Corpus, Planter] | None = None  # opened in the process that reads

    def __len__(self) -> int:
        return self.schedule.steps

    def row(self, step: int, number: int, length: int, recall: float, planted: float) -> Pieces:
        if self.parts is None:
            self.parts = Corpus.open(self.folder, "train"), Planter(self.folder)
        corpus, planter = self.parts
        rng = np.random.default_rng((self.schedule.seed, step, number))
        if rng.random() < recall:
            return planted_row(corpus, planter, rng, length + 1, planted)
        return corpus.window(rng, length + 1), np.zeros(length + 1, dtype=np.uint8)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        phase = self.schedule.phase_of(step)
        rows = phase.tokens // phase.length
        if rows % self.world:
            raise ValueError(f"{rows} rows of {phase.length} tokens do not divide among {self.world} processes")
        mine = [
            self.row(step, number, phase.length, phase.recall_rows, phase.planted)
            for number in range(self.rank, rows, self.world)
        ]
        ids = torch.from_numpy(np.stack([ids for ids, _ in mine]).astype(np.int64))
        kinds = torch.from_numpy(np.stack([kinds for _, kinds in mine])[:, 1:].copy())
        return {"ids": ids, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of data.py")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=2)
    args = parser.parse_args()
    dataset = StepDataset(args.data, PRESETS["mini"].schedule)
    for number in range(args.rows):
        ids, kinds = dataset.row(0, number, args.length, 1.0, 0.5)
        assert dataset.parts is not None
        print(dataset.parts[1].tokenizer.decode(ids.tolist()))
        print(f"---- {len(ids)} tokens, of each kind: {np.bincount(kinds, minlength=4).tolist()}")


if __name__ == "__main__":
    main()
