# SPDX-License-Identifier: Apache-2.0
"""Writes the golden files: small cases of every operation in float64, computed from the paper's
definitions with whole-matrix masks. Shares nothing with the C++ code but the file format below.

    python3 tests/golden/make_golden.py      # needs numpy; rewrites tests/golden/*.bin

Format, little endian: 8 bytes "MSAGOLD\\0", u32 version, u32 number of tensors; then per tensor
u32 name length, name, u32 dtype (0: f64, 1: i32), u32 rank, i64 dims, row-major data.
"""

import pathlib
import struct

import numpy as np

VERSION = 1
FOLDER = pathlib.Path(__file__).parent


def write(name, tensors):
    with open(FOLDER / f"{name}.bin", "wb") as file:
        file.write(b"MSAGOLD\0" + struct.pack("<II", VERSION, len(tensors)))
        for key, value in tensors.items():
            value = np.asarray(value)
            kind = 1 if value.dtype.kind == "i" else 0
            data = np.ascontiguousarray(value, "<i4" if kind else "<f8")
            file.write(struct.pack("<I", len(key)) + key.encode())
            file.write(struct.pack("<II", kind, data.ndim))
            file.write(struct.pack(f"<{data.ndim}q", *data.shape) + data.tobytes())


def softmax(scores, mask):
    """Rows of masked scores; a row with an empty mask is all zeros."""
    top = np.max(np.where(mask, scores, -np.inf), axis=-1, keepdims=True)
    e = np.where(mask, np.exp(scores - np.where(np.isfinite(top), top, 0.0)), 0.0)
    total = e.sum(-1, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total > 0)


class Sequence:
    """One sequence: queries [n, heads, dim], keys [m, heads, dim]."""

    def __init__(self, problem, tensors):
        self.p = problem
        self.__dict__.update(tensors)
        n, m = len(self.q), len(self.k)
        self.position = m - n + np.arange(n)
        self.causal = np.arange(m)[None, :] <= self.position[:, None]  # [n, m]
        self.blocks = -(-m // problem["block_size"])
        self.block_of = np.arange(m) // problem["block_size"]

    def index_logits(self, index_q=None, index_k=None):
        """[kv heads, n, m], eq 5"""
        index_q = self.index_q if index_q is None else index_q
        index_k = self.index_k if index_k is None else index_k
        return np.einsum("nrd,md->rnm", index_q, index_k[:, 0]) / np.sqrt(self.p["index_dim"])

    def block_scores(self, columns):
        """[kv heads, n, columns], eq 6"""
        logits = np.where(self.causal, self.index_logits(), -np.inf)
        scores = np.full((*logits.shape[:2], columns), -np.inf)
        for b in range(self.blocks):
            scores[..., b] = logits[..., self.block_of == b].max(-1)
        return scores

    def select(self, scores):
        """[kv heads, n, top_k], eq 7: one sort by (forced, score, -id) per row."""
        p = self.p
        ids = np.full((*scores.shape[:2], p["top_k"]), -1, np.int32)
        for r, n in np.ndindex(scores.shape[:2]):
            if self.position[n] < 0:
                continue
            count = self.position[n] // p["block_size"] + 1
            b = np.arange(count)
            forced = (b >= count - p["num_local_blocks"]) | (b < p["num_init_blocks"])
            order = np.lexsort((b, -scores[r, n, :count], ~forced))[: p["top_k"]]
            ids[r, n, : len(order)] = np.sort(order)
        return ids

    def mask_of(self, ids):
        """Support [kv heads, n, m] of a selection."""
        chosen = (ids[..., None] == np.arange(self.blocks)).any(-2)  # [r, n, blocks]
        return chosen[..., self.block_of] & self.causal

    def mask_dense(self):
        return np.broadcast_to(self.causal, (self.p["num_kv_heads"], *self.causal.shape))

    def per_head(self, mask):
        return np.repeat(mask, self.p["num_q_heads"] // self.p["num_kv_heads"], axis=0)

    def logits(self, q, k):
        group = self.p["num_q_heads"] // self.p["num_kv_heads"]
        return np.einsum("nhd,mhd->hnm", q, np.repeat(k, group, axis=1)) / np.sqrt(
            self.p["head_dim"])

    def attention(self, mask, q=None, k=None, v=None):
        """out [n, heads, dim] and lse [n, heads], eq 8"""
        q = self.q if q is None else q
        k = self.k if k is None else k
        v = self.v if v is None else v
        mask = self.per_head(mask)
        logits = self.logits(q, k)
        group = self.p["num_q_heads"] // self.p["num_kv_heads"]
        out = np.einsum("hnm,mhd->nhd", softmax(logits, mask), np.repeat(v, group, axis=1))
        with np.errstate(divide="ignore"):
            lse = np.log(np.where(mask, np.exp(logits), 0.0).sum(-1)).T
        return out, lse

    def attention_gradients(self, mask):
        """dq, dk, dv of sum(out * dout)."""
        group = self.p["num_q_heads"] // self.p["num_kv_heads"]
        probability = softmax(self.logits(self.q, self.k), self.per_head(mask))
        k = np.repeat(self.k, group, axis=1)
        v = np.repeat(self.v, group, axis=1)
        dp = np.einsum("nhd,mhd->hnm", self.dout, v)
        ds = probability * (dp - (probability * dp).sum(-1, keepdims=True))
        ds /= np.sqrt(self.p["head_dim"])
        fold = lambda g: g.reshape(len(g), self.p["num_kv_heads"], group, g.shape[-1]).sum(2)
        return (np.einsum("hnm,mhd->nhd", ds, k),
                fold(np.einsum("hnm,nhd->mhd", ds, self.q)),
                fold(np.einsum("hnm,nhd->mhd", probability, self.dout)))

    def kl(self, mask, index_q=None, index_k=None):
        """Sum over rows of KL(teacher || student), eqs 9-10, not yet divided."""
        heads = softmax(self.logits(self.q, self.k), self.per_head(mask))
        group = self.p["num_q_heads"] // self.p["num_kv_heads"]
        teacher = heads.reshape(self.p["num_kv_heads"], group, *heads.shape[1:]).mean(1)
        student = softmax(self.index_logits(index_q, index_k), mask)
        ratio = np.divide(teacher, student, out=np.ones_like(teacher), where=mask)
        return (teacher * np.log(ratio)).sum(), student - teacher

    def kl_gradients(self, mask):
        scale = 1 / np.sqrt(self.p["index_dim"])
        difference = self.kl(mask)[1]
        return (scale * np.einsum("rnm,md->nrd", difference, self.index_k[:, 0]),
                scale * np.einsum("rnm,nrd->md", difference, self.index_q)[:, None])


def central_difference(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        gradient[index] = (function(high) - function(low)) / (2 * step)
    return gradient


def check_gradients(s, mask):
    """The analytic formulas against central differences: error step^2 * f''' + eps / step."""
    loss = lambda **x: (s.attention(mask, **x)[0] * s.dout).sum()
    pairs = [(s.attention_gradients(mask)[i],
              central_difference(lambda x, n=name: loss(**{n: x}), getattr(s, name)))
             for i, name in enumerate(["q", "k", "v"])]
    pairs += [(s.kl_gradients(mask)[i],
               central_difference(lambda x, n=name: s.kl(mask, **{n: x})[0], getattr(s, name)))
              for i, name in enumerate(["index_q", "index_k"])]
    for analytic, numeric in pairs:
        assert np.abs(analytic - numeric).max(initial=0) < 1e-8, np.abs(analytic - numeric).max()


PROBLEM_FIELDS = ["num_q_heads", "num_kv_heads", "head_dim", "index_dim", "block_size", "top_k",
                  "num_init_blocks", "num_local_blocks"]


def make(name, seed, lengths, coefficient, paged=False, **problem):
    random = np.random.default_rng(seed)
    p = {"num_init_blocks": 0, "num_local_blocks": 1, **problem}
    sequences = []
    for n, m in lengths:
        normal = random.standard_normal
        s = Sequence(p, {
            "q": normal((n, p["num_q_heads"], p["head_dim"])),
            "dout": normal((n, p["num_q_heads"], p["head_dim"])),
            "k": normal((m, p["num_kv_heads"], p["head_dim"])),
            "v": normal((m, p["num_kv_heads"], p["head_dim"])),
            "index_q": normal((n, p["num_kv_heads"], p["index_dim"])),
            "index_k": normal((m, 1, p["index_dim"])),
        })
        sequences.append(s)
    columns = max(s.blocks for s in sequences)
    total_q = sum(n for n, _ in lengths)
    result = {key: [] for key in ["block_scores", "block_ids", "out", "lse", "dense_out",
                                  "dense_lse"]}
    gradients = {}
    for s in sequences:
        scores = s.block_scores(columns)
        ids = s.select(scores)
        sparse, dense = s.mask_of(ids), s.mask_dense()
        for key, value in zip(result, [scores, ids, *s.attention(sparse), *s.attention(dense)]):
            result[key].append(value)
        for prefix, mask in [("", sparse), ("dense_", dense)]:
            check_gradients(s, mask)
            weight = coefficient / (total_q * p["num_kv_heads"])
            gradients.setdefault(prefix + "loss", []).append(weight * s.kl(mask)[0])
            values = [*s.attention_gradients(mask), *(weight * g for g in s.kl_gradients(mask))]
            for key, value in zip(["dq", "dk", "dv", "dindex_q", "dindex_k"], values):
                gradients.setdefault(prefix + key, []).append(value)

    tensors = {"problem": np.array([p[field] for field in PROBLEM_FIELDS], np.int32),
               "loss_coefficient": np.array([coefficient])}
    for key in ["q", "dout", "index_q"]:
        tensors[key] = np.concatenate([getattr(s, key) for s in sequences])
    tensors["cu_seqlens_q"] = np.cumsum([0] + [n for n, _ in lengths]).astype(np.int32)
    if paged:
        pages = random.permutation(sum(s.blocks for s in sequences) + 1)
        table = np.full((len(lengths), columns), 1 << 30, np.int32)
        for key in ["k", "v", "index_k"]:
            heads, dim = getattr(sequences[0], key).shape[1:]
            cache = np.full((len(pages), heads, p["block_size"], dim), np.nan)
            page = 0
            for i, s in enumerate(sequences):
                for b in range(s.blocks):
                    rows = getattr(s, key)[s.block_of == b]
                    cache[pages[page], :, : len(rows)] = rows.swapaxes(0, 1)
                    table[i, b] = pages[page]
                    page += 1
            tensors[key] = cache
            # The pages before the queries' own tokens were appended, and what is appended.
            before = cache.copy()
            for i, (s, (n, m)) in enumerate(zip(sequences, lengths)):
                for j in range(max(m - n, 0), m):
                    before[table[i, j // p["block_size"]], :, j % p["block_size"]] = -7.0
            tensors[key + "_before"] = before
            new = [getattr(s, key)[m - n:] for s, (n, m) in zip(sequences, lengths)]
            tensors[key + "_new"] = np.concatenate(new)
        tensors["page_table"] = table
        tensors["seq_lens_k"] = np.array([m for _, m in lengths], np.int32)
    else:
        for key in ["k", "v", "index_k"]:
            tensors[key] = np.concatenate([getattr(s, key) for s in sequences])
        tensors["cu_seqlens_k"] = np.cumsum([0] + [m for _, m in lengths]).astype(np.int32)
        for key, values in gradients.items():
            tensors[key] = np.array([sum(values)]) if key.endswith("loss") else np.concatenate(
                values)
    for key, values in result.items():
        tensors[key] = np.concatenate(values, axis=1 if key.startswith("block") else 0)
    write(name, tensors)


if __name__ == "__main__":
    make("ragged", 1, [(5, 40), (18, 18), (0, 3), (3, 50)], 1.0, num_q_heads=4, num_kv_heads=2,
         head_dim=6, index_dim=5, block_size=16, top_k=2)
    make("init_local", 2, [(4, 120), (20, 17)], 0.25, num_q_heads=3, num_kv_heads=1, head_dim=4,
         index_dim=4, block_size=16, top_k=4, num_init_blocks=1, num_local_blocks=2)
    make("paged", 3, [(6, 70), (1, 33), (2, 2)], 1.0, paged=True, num_q_heads=4, num_kv_heads=2,
         head_dim=6, index_dim=5, block_size=16, top_k=3)
