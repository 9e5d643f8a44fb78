# SPDX-License-Identifier: Apache-2.0
"""Writes tests/model/fixtures/mini_m3: what transformers makes of examples/mini_m3.

    pip install torch==2.11.0 transformers==5.23.0
    python tests/model/make_mini_m3_fixture.py          # float32, eager attention, on a CPU

expected.safetensors is as make_model_fixtures.py describes, with fewer positions and NUM_GREEDY tokens; the
checkpoint is the one that `make run` uses. The prompt is text of this repository: the first piece of it on which
every selection of blocks and every greedy token is clear of the next candidate. Selection matters beyond 1,024
tokens.
"""

import pathlib

import safetensors.torch
import torch
from tokenizers import Tokenizer
from transformers import MiniMaxM3VLForCausalLM

import make_model_fixtures as fixtures

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "mini_m3"
TOKENS = 1153
NUM_GREEDY = 16
POSITIONS = [0, 127, 128, 1023, 1024, 1100, TOKENS - 1]


def main():
    model = MiniMaxM3VLForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    text = "".join(path.read_text() for path in sorted((ROOT / "src" / "core").glob("*.cpp")))
    tokens = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    fixtures.NUM_GREEDY = NUM_GREEDY
    for begin in range(0, len(tokens) - TOKENS, 97):
        prompt = torch.tensor(tokens[begin : begin + TOKENS])
        logits, blocks, greedy, greedy_logits, margins, token_margin = fixtures.evaluate(model, prompt)
        print(f"  from token {begin}: block {margins.block:.1e}, token {token_margin:.1e}", flush=True)
        if margins.block > fixtures.BLOCK_MARGIN and token_margin > fixtures.TOKEN_MARGIN:
            break
    else:
        raise SystemExit("no prompt has clear choices")
    moved = fixtures.dense_difference(model, prompt, logits)
    print(f"logits up to {logits.abs().max().item():.1f}; dense attention moves the last ones by {moved:.2e}")
    expected = {
        "prompt": prompt.to(torch.int32),
        "positions": torch.tensor(POSITIONS, dtype=torch.int32),
        "logits": logits[POSITIONS].contiguous(),
        "greedy": torch.tensor(greedy, dtype=torch.int32),
        "greedy_logits": greedy_logits.contiguous(),
    }
    for layer, ids in blocks.items():
        ids = (ids[0] if ids.ndim == 4 else ids)[:, POSITIONS]
        expected[f"block_ids.{layer}"] = fixtures.ascending(ids, model.config.index_topk_blocks)
    folder = fixtures.FIXTURES / "mini_m3"
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
