# SPDX-License-Identifier: Apache-2.0
"""Writes tests/model/fixtures/trained_smoke: a model of examples/train and what PyTorch makes of it.

    python examples/train/smoke.py --keep work
    python tests/model/make_trained_fixture.py work          # torch 2.11.0, float32, on a CPU

The folder has the files that make_model_fixtures.py describes, but expected.safetensors comes from the model as it
was trained (examples/train/model.py), not from transformers. The prompt is held-out text on which every selection
of blocks and every greedy token is clear of the next candidate.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "train"))

import attention_torch  # noqa: E402
import export  # noqa: E402
import tasks  # noqa: E402

FIXTURE = ROOT / "tests" / "model" / "fixtures" / "trained_smoke"
TOKENS, NUM_GREEDY = 333, 64
# As in make_model_fixtures.py; logits of this model are of size 10.
BLOCK_MARGIN, TOKEN_MARGIN = 1e-4, 5e-3


def run(model, ids):
    """Logits [tokens, vocab], block ids of the sparse layers, smallest margin of a selection."""
    blocks, margins = [], []
    select, indexer = attention_torch.select, attention_torch.indexer

    def watched_select(scores, query, block_size, top_k, num_local_blocks=1):
        local = (query // block_size)[:, None] == torch.arange(scores.shape[-1])
        ordered = scores.masked_fill(local, float("inf")).sort(dim=-1, descending=True).values
        if ordered.shape[-1] > top_k:
            margin = ordered[..., top_k - 1] - ordered[..., top_k]
            margins.append(margin[torch.isfinite(ordered[..., top_k])].min().item())
        return select(scores, query, block_size, top_k, num_local_blocks)

    def watched_indexer(*args, **options):
        blocks.append(indexer(*args, **options))
        return blocks[-1]

    attention_torch.select, attention_torch.indexer = watched_select, watched_indexer
    try:
        logits = export.logits_of(model, ids)
    finally:
        attention_torch.select, attention_torch.indexer = select, indexer
    return logits, blocks, min(margins)


def main():
    work = pathlib.Path(sys.argv[1])
    source = work / "runs/msa/latest.pt"
    model = export.load_model(source)
    corpus = tasks.Corpus.open(work / "data", "heldout")
    first_sparse = model.config.num_dense_layers
    for begin in range(0, len(corpus.tokens) - TOKENS, 1000):
        prompt = corpus.tokens[begin : begin + TOKENS].astype(int).tolist()
        logits, blocks, block_margin = run(model, prompt)
        if block_margin < BLOCK_MARGIN:
            continue
        ids, rows, token_margin = list(prompt), [], float("inf")
        while len(rows) < NUM_GREEDY:
            last, _, margin = run(model, ids)
            best = last[-1].topk(2)
            token_margin = min(token_margin, float(best.values[0] - best.values[1]))
            block_margin = min(block_margin, margin)
            rows.append(last[-1])
            ids.append(int(best.indices[0]))
            if token_margin < TOKEN_MARGIN or block_margin < BLOCK_MARGIN:
                break
        if len(rows) == NUM_GREEDY and token_margin >= TOKEN_MARGIN:
            break
    else:
        sys.exit("no prompt has clear choices")
    print(f"prompt from token {begin}: block margin {block_margin:.1e}, token margin {token_margin:.1e}")
    positions = sorted({*range(0, TOKENS, 16), *range(15, TOKENS, 48), TOKENS - 1})
    expected = {
        "prompt": torch.tensor(prompt, dtype=torch.int32),
        "positions": torch.tensor(positions, dtype=torch.int32),
        "logits": logits[positions].contiguous(),
        "greedy": torch.tensor(ids[TOKENS:], dtype=torch.int32),
        "greedy_logits": torch.stack(rows),
    }
    for layer, block_ids in enumerate(blocks, start=first_sparse):
        expected[f"block_ids.{layer}"] = block_ids[:, positions].contiguous()
    export.export(source, work / "data/tokenizer.json", FIXTURE, torch.float32)
    (FIXTURE / "tokenizer.json").unlink()  # the tests feed ids
    save_file(expected, FIXTURE / "expected.safetensors")
    for file in sorted(FIXTURE.iterdir()):
        print(f"  {file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
