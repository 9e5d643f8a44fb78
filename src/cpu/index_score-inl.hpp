// SPDX-License-Identifier: Apache-2.0
//
// Block scores of a tile. A score is one chain of fused multiply-adds over index_dim, then one
// product with the scale, in every path. Included once per SIMD target.
#if defined(MSA_CPU_INDEX_SCORE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_INDEX_SCORE_INL_HPP_
#undef MSA_CPU_INDEX_SCORE_INL_HPP_
#else
#define MSA_CPU_INDEX_SCORE_INL_HPP_
#endif

#include "cpu/index_tile.hpp"
#include "cpu/tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// Maxima over the tokens of one packed block for rows [first_row, num_rows); `base` is the
/// block's first token.
void block_maxima(const IndexRequest& request, const IndexTile& tile, std::int64_t first_row,
                  std::int64_t num_tokens, std::int64_t base, const IndexScratch& scratch) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const Problem& p = request.problem;
  const std::int64_t heads = p.num_kv_heads;
  const std::int64_t padded_dim = round_up(p.index_dim, kMaxLanes);
  const auto lowest = hn::Set(d, -kInfinity);
  const Panel panel{scratch.panel, p.index_dim, core::ceil_div(num_tokens, n)};
  const std::int64_t num_rows = tile.count * heads;
  for (std::int64_t row = first_row; row < num_rows; ++row) {
    hn::StoreU(lowest, d, scratch.partial + row * kMaxLanes);
  }
  for_each_tile(num_rows - first_row, panel.num_vectors,
                [&](auto rows, auto vectors, std::int64_t first, std::int64_t vector) {
                  const float* a[rows];
                  Sums<rows, vectors> sums;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    a[r] = scratch.q + (first_row + first + r) * padded_dim;
                    for (std::int64_t v = 0; v < vectors; ++v) sums[r][v] = hn::Zero(d);
                  }
                  multiply<rows, vectors>(a, panel.strip(vector), panel.depth, sums);
                  const std::int64_t end = (vector + vectors) * n;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    const std::int64_t row = first_row + first + r;
                    const std::int64_t limit = tile.position(row / heads) + 1 - base;
                    auto highest = hn::LoadU(d, scratch.partial + row * kMaxLanes);
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      // A NaN is greater than nothing, on every target.
                      auto better = hn::Gt(sums[r][v], highest);
                      if (limit < end) {
                        const std::int64_t visible =
                            std::clamp<std::int64_t>(limit - (vector + v) * n, 0, n);
                        better = hn::And(better, hn::FirstN(d, static_cast<std::size_t>(visible)));
                      }
                      highest = hn::IfThenElse(better, sums[r][v], highest);
                    }
                    hn::StoreU(highest, d, scratch.partial + row * kMaxLanes);
                  }
                });
}

/// block_maxima for at most kRows rows from first_row on, from the keys as they lie.
template <std::int64_t kRows, class T>
void few_rows_maxima(const T* block, std::int64_t token_stride, const IndexTile& tile,
                     const Problem& p, std::int64_t first_row, std::int64_t num_tokens,
                     std::int64_t base, const NextRows& next, const IndexScratch& scratch) {
  // A chain of multiply-adds waits for its last step: eight of them keep two ports busy.
  constexpr std::int64_t kVectors = kRows <= 4 && kTileVectors > 2 ? 2 : 1;
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t dim = p.index_dim;
  const std::int64_t padded_dim = round_up(dim, kMaxLanes);
  const std::int64_t num_rows = std::min(kRows, tile.count * p.num_kv_heads - first_row);
  const float* q[kRows];
  std::int64_t limit[kRows];
  FloatVector highest[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    const std::int64_t row = first_row + std::min(r, num_rows - 1);
    q[r] = scratch.q + row * padded_dim;
    limit[r] = std::min(tile.position(row / p.num_kv_heads) + 1 - base, num_tokens);
    highest[r] = hn::Set(d, -kInfinity);
  }
  for (std::int64_t first = 0; first < num_tokens; first += kVectors * n) {
    const std::int64_t end = std::min(first + kVectors * n, num_tokens);
    const std::int64_t row_bytes = dim * static_cast<std::int64_t>(sizeof(T));
    PrefetchStream ahead(next, row_bytes, first);
    if (token_stride == dim) touch_rows(block + first * token_stride, (end - first) * row_bytes);
    const T* tokens[kVectors];
    std::int64_t stride = token_stride;
    if (end - first == kVectors * n && dim % kPieceDims<T> == 0) {
      for (std::int64_t v = 0; v < kVectors; ++v)
        tokens[v] = block + (first + v * n) * token_stride;
    } else {
      stride = round_up(dim, kPieceDims<T>);
      T* const copy = reinterpret_cast<T*>(scratch.pack);
      copy_rows(block + first * token_stride, token_stride, end - first, dim, kVectors * n, copy);
      for (std::int64_t v = 0; v < kVectors; ++v) tokens[v] = copy + v * n * stride;
    }
    Sums<kRows, kVectors> sums;
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t v = 0; v < kVectors; ++v) sums[r][v] = hn::Zero(d);
    }
    with_stride(stride,
                [&](auto row) { multiply_tokens<kRows>(q, tokens, row, dim, ahead, sums); });
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t v = 0; v < kVectors; ++v) {
        const std::int64_t visible = std::clamp<std::int64_t>(limit[r] - first - v * n, 0, n);
        const auto better = hn::And(hn::Gt(sums[r][v], highest[r]),
                                    hn::FirstN(d, static_cast<std::size_t>(visible)));
        highest[r] = hn::IfThenElse(better, sums[r][v], highest[r]);
      }
    }
  }
  for (std::int64_t r = 0; r < num_rows; ++r) {
    hn::StoreU(highest[r], d, scratch.partial + (first_row + r) * kMaxLanes);
  }
}

void load_queries(const IndexRequest& request, const IndexTile& tile, const IndexScratch& scratch) {
  const FloatTag d;
  const Problem& p = request.problem;
  const std::int64_t padded_dim = round_up(p.index_dim, kMaxLanes);
  for (std::int64_t row = 0; row < tile.count * p.num_kv_heads; ++row) {
    const std::int64_t offset =
        core::offset_of(request.index_q, tile.sequence.q_begin + tile.first + row / p.num_kv_heads,
                        row % p.num_kv_heads);
    float* const to = scratch.q + row * padded_dim;
    with_elements(request.index_q, offset,
                  [&](const auto* from) { convert_row(from, p.index_dim, to); });
    if (request.scale >= 0.0f) continue;
    // The maximum is taken before the scale, which then has to be positive.
    for (std::int64_t i = 0; i < p.index_dim; i += lanes()) {
      hn::StoreU(hn::Neg(hn::LoadU(d, to + i)), d, to + i);
    }
  }
}

/// Scores blocks [block_begin, block_end) of every row into scratch.target; -inf where a block has
/// no visible token. Of a screened tile only the blocks that open_blocks() left open.
void score_tile(const IndexRequest& request, const IndexTile& tile, const IndexScratch& scratch) {
  const FloatTag d;
  const Problem& p = request.problem;
  const std::int64_t heads = p.num_kv_heads;
  const std::int64_t num_rows = tile.count * heads;
  const float scale = std::fabs(request.scale);
  load_queries(request, tile, scratch);
  const std::int64_t end =
      std::min(tile.block_end, core::ceil_div(tile.position(tile.count - 1) + 1, p.block_size));
  const auto rows_of = [&](std::int64_t block) {
    return block < end ? core::block_rows(request.index_k, request.batch, p.block_size,
                                          tile.sequence, 0, block)
                       : core::BlockRows{};
  };
  const auto next_open = [&](std::int64_t block) {
    while (tile.screened && block < tile.block_end && scratch.lower[0][block] == 0.0f) ++block;
    return block;
  };
  const auto score_block = [&](std::int64_t block, std::int64_t following) HWY_ATTR {
    const std::int64_t base = block * p.block_size;
    const std::int64_t num_tokens =
        std::min<std::int64_t>(tile.position(tile.count - 1) + 1 - base, p.block_size);
    const std::int64_t first_query =
        std::clamp<std::int64_t>(base - tile.position(0), 0, tile.count);
    std::int64_t first_row = first_query * heads;
    const core::BlockRows keys = rows_of(block);
    if (keys.num_tokens == 0) first_row = num_rows;  // invisible, or a page id out of range
    for (std::int64_t row = 0; row < first_row; ++row) scratch.target[row][block] = -kInfinity;
    if (first_row == num_rows) return;
    const NextRows next = next_rows(request.index_k, rows_of(following));
    with_elements(request.index_k, keys.offset, [&](const auto* from) {
      const std::int64_t rows = num_rows - first_row;
      const auto few_rows = [&](auto count) {
        few_rows_maxima<count>(from, keys.token_stride, tile, p, first_row, num_tokens, base, next,
                               scratch);
      };
      if (rows <= 2) return few_rows(Constant<2>());
      if (rows <= 4) return few_rows(Constant<4>());
      if (rows <= kFewRows) return few_rows(Constant<kFewRows>());
      pack_keys(from, keys.token_stride, num_tokens, p.index_dim, next, scratch.pack,
                scratch.panel);
      block_maxima(request, tile, first_row, num_tokens, base, scratch);
    });
    for (std::int64_t row = first_row; row < num_rows; ++row) {
      const auto partial = hn::LoadU(d, scratch.partial + row * kMaxLanes);
      const float score = hn::GetLane(hn::MaxOfLanes(d, partial)) * scale;
      scratch.target[row][block] = std::isnan(score) ? -kInfinity : score;
    }
  };
  for (std::int64_t block = next_open(tile.block_begin); block < tile.block_end;) {
    const std::int64_t following = next_open(block + 1);
    score_block(block, following);
    block = following;
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
