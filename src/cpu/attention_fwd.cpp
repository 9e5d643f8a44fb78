// SPDX-License-Identifier: Apache-2.0
//
// Sparse and dense attention (paper eq. 8): one kernel, since dense is sparse with every visible
// block selected. A work item is a tile of neighbouring queries of one KV head. The blocks that any
// of them selected are visited in ascending order; each is packed once and multiplied with the rows
// (query, head of the group) that selected it, or multiplied where it lies if these are few.
// Softmax is online and in base 2: q is scaled by softmax_scale * log2(e). What a row gets depends
// on its own blocks only, in ascending order.
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/support.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_fwd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/tile-inl.hpp"

#ifndef MSA_CPU_ATTENTION_FWD_ONCE
#define MSA_CPU_ATTENTION_FWD_ONCE
namespace msa::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kNoBlock = std::numeric_limits<std::int32_t>::max();

/// Rows of a tile at most, if a group is not larger. With blocks of 128 x 128, q, o, s and the two
/// panels of 512 rows are 900 KiB. Twice as many gain where neighbours share no blocks, but leave
/// smaller L2 caches behind; half as many lose a quarter there (docs/kernels/cpu.md).
constexpr std::int64_t kMaxRows = 512;

/// Rows at most that multiply keys and values where they lie; more rows pay for packing them first.
constexpr std::int64_t kFewRows = 16;

/// Query heads that a thread takes of a group at least: the rows of a register tile.
constexpr std::int64_t kMinHeads = 4;

/// What both operations are; block_ids is not given for dense attention.
struct AttentionRequest {
  const Problem& problem;
  const Batch& batch;
  TensorView q, k, v, block_ids, out, lse;
  float scale;  ///< of scores in base 2
  const core::Sequences* sequences;
};

template <class Args>
AttentionRequest request_of(const Args& args, const core::Sequences* sequences) {
  TensorView block_ids;
  if constexpr (requires { args.block_ids; }) block_ids = args.block_ids;
  const double scale = args.softmax_scale != 0.0f
                           ? static_cast<double>(args.softmax_scale)
                           : 1.0 / std::sqrt(static_cast<double>(args.problem.head_dim));
  return {.problem = args.problem,
          .batch = args.batch,
          .q = args.q,
          .k = args.k,
          .v = args.v,
          .block_ids = block_ids,
          .out = args.out,
          .lse = args.lse,
          .scale = static_cast<float>(scale * 1.4426950408889634074),
          .sequences = sequences};
}

/// One worker's memory. Rows of a tile are (query, query head), heads fastest.
struct AttentionScratch {
  float* q;              ///< [rows][padded_dim], scaled
  float* o;              ///< [rows][padded_dim], not yet divided by sum
  float* maximum;        ///< [rows], of the scores so far
  float* sum;            ///< [rows], of exp2(score - maximum)
  float* s;              ///< [active rows][block_size], scores and then probabilities
  float* correction;     ///< [active rows], exp2(old maximum - new maximum)
  std::int32_t* row;     ///< [active rows], their rows in the tile
  std::int32_t* limit;   ///< [active rows], tokens of the block that they see
  std::int32_t* ids;     ///< [queries][top_k + 1], ascending, ends with kNoBlock
  std::int32_t* cursor;  ///< [queries], into ids
  float* k_panel;        ///< depth head_dim, block_size columns
  float* v_panel;        ///< depth block_size, padded_dim columns
  float* pack;
};

std::int64_t max_queries_per_tile(const Problem& p) {
  return std::clamp<std::int64_t>(kMaxRows / p.group_size(), 1, 64);
}

AttentionScratch lay_out(const Problem& p, core::WorkspaceLayout& layout) {
  const std::int64_t queries = max_queries_per_tile(p);
  const std::int64_t rows = queries * p.group_size();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  AttentionScratch scratch;
  scratch.q = layout.take<float>(rows * padded_dim);
  scratch.o = layout.take<float>(rows * padded_dim);
  scratch.maximum = layout.take<float>(rows);
  scratch.sum = layout.take<float>(rows);
  scratch.s = layout.take<float>(rows * p.block_size);
  scratch.correction = layout.take<float>(rows);
  scratch.row = layout.take<std::int32_t>(rows);
  scratch.limit = layout.take<std::int32_t>(rows);
  scratch.ids = layout.take<std::int32_t>(queries * (p.top_k + 1));
  scratch.cursor = layout.take<std::int32_t>(queries);
  scratch.k_panel = layout.take<float>(std::int64_t{p.block_size} * p.head_dim);
  scratch.v_panel = layout.take<float>(p.block_size * padded_dim);
  scratch.pack = layout.take<float>(2 * pack_scratch(p.head_dim));
  return scratch;
}

/// Queries [first, first + count) of a sequence for one KV head and query heads [first_head,
/// first_head + num_heads) of its group.
struct QueryTile {
  core::Sequence sequence;
  std::int64_t head;
  std::int64_t first_head;
  std::int64_t num_heads;
  std::int64_t first;
  std::int64_t count;

  std::int64_t q_head(const Problem& p, std::int64_t row) const {
    return head * p.group_size() + first_head + row % num_heads;
  }
  std::int64_t position(std::int64_t query) const { return sequence.position(first + query); }
};

/// Copies the ids that query `query` of the tile can see, ascending.
void sort_ids(const AttentionRequest& request, const QueryTile& tile, std::int64_t query,
              std::int32_t* ids) {
  const std::int64_t position = tile.position(query);
  std::int64_t count = 0;
  for (std::int64_t slot = 0; slot < request.problem.top_k && position >= 0; ++slot) {
    const std::int32_t id = core::load_i32(request.block_ids, tile.head,
                                           tile.sequence.q_begin + tile.first + query, slot);
    if (id >= 0 && id <= position / request.problem.block_size) ids[count++] = id;
  }
  std::sort(ids, ids + count);
  ids[count] = kNoBlock;
}

/// Lists the rows of queries that attend `block`, with their limits; returns how many.
std::int64_t list_rows(const AttentionRequest& request, const QueryTile& tile, std::int64_t block,
                       const AttentionScratch& scratch) {
  const Problem& p = request.problem;
  std::int64_t count = 0;
  for (std::int64_t query = 0; query < tile.count; ++query) {
    const std::int64_t visible = tile.position(query) + 1 - block * p.block_size;
    if (visible <= 0) continue;
    if (request.block_ids.given()) {
      std::int32_t& cursor = scratch.cursor[query];
      if (scratch.ids[query * (p.top_k + 1) + cursor] != block) continue;
      ++cursor;
    }
    for (std::int64_t h = 0; h < tile.num_heads; ++h, ++count) {
      scratch.row[count] = static_cast<std::int32_t>(query * tile.num_heads + h);
      scratch.limit[count] =
          static_cast<std::int32_t>(std::min<std::int64_t>(visible, p.block_size));
    }
  }
  return count;
}

/// The lowest block above `previous` that a query of the tile attends; kNoBlock: none.
std::int64_t next_block(const AttentionRequest& request, const QueryTile& tile,
                        const AttentionScratch& scratch, std::int64_t previous) {
  if (!request.block_ids.given()) {
    const std::int64_t last = tile.position(tile.count - 1);
    return last >= (previous + 1) * request.problem.block_size ? previous + 1 : kNoBlock;
  }
  std::int64_t lowest = kNoBlock;
  for (std::int64_t query = 0; query < tile.count; ++query) {
    const std::int64_t id =
        scratch.ids[query * (request.problem.top_k + 1) + scratch.cursor[query]];
    lowest = std::min(lowest, id);
  }
  return lowest;
}

void store_row(const TensorView& out, std::int64_t offset, const float* values, std::int64_t dim) {
  void* const address = core::address_at(out, offset);
  switch (out.dtype) {
    case DType::bf16:
      std::transform(values, values + dim, static_cast<std::uint16_t*>(address), core::f32_to_bf16);
      return;
    case DType::f16:
      std::transform(values, values + dim, static_cast<std::uint16_t*>(address), core::f32_to_f16);
      return;
    default:
      std::copy_n(values, dim, static_cast<float*>(address));
  }
}

}  // namespace
}  // namespace msa::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// Scores of the active rows against the K panel.
void score_rows(const AttentionScratch& scratch, const Problem& p, std::int64_t num_rows,
                std::int64_t num_tokens) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const Panel panel{scratch.k_panel, p.head_dim, core::ceil_div(num_tokens, n)};
  for_each_tile(num_rows, panel.num_vectors,
                [&](auto rows, auto vectors, std::int64_t first, std::int64_t vector) {
                  const float* a[rows];
                  Sums<rows, vectors> sums;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    a[r] = scratch.q + scratch.row[first + r] * padded_dim;
                    for (std::int64_t v = 0; v < vectors; ++v) sums[r][v] = hn::Zero(d);
                  }
                  multiply<rows, vectors>(a, panel.strip(vector), panel.depth, sums);
                  for (std::int64_t r = 0; r < rows; ++r) {
                    float* const to = scratch.s + (first + r) * p.block_size + vector * n;
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      hn::StoreU(sums[r][v], d, to + v * n);
                    }
                  }
                });
}

/// Turns the scores of active row i into probabilities relative to the new maximum. A NaN score
/// takes no part in the maximum and makes the sum NaN; rows of -inf alone keep maximum -inf and
/// sum 0.
void softmax_row(const AttentionScratch& scratch, const Problem& p, std::int64_t i) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t row = scratch.row[i];
  const std::int64_t limit = scratch.limit[i];
  float* const s = scratch.s + i * p.block_size;
  const auto lowest = hn::Set(d, -kInfinity);
  const std::int64_t rest = limit % n;
  if (rest != 0) {
    float* const last = s + limit - rest;
    const auto visible = hn::FirstN(d, static_cast<std::size_t>(rest));
    hn::StoreU(hn::IfThenElse(visible, hn::LoadU(d, last), lowest), d, last);
  }
  auto highest = lowest;
  for (std::int64_t j = 0; j < limit; j += n) {
    const auto score = hn::LoadU(d, s + j);
    highest = hn::IfThenElse(hn::Gt(score, highest), score, highest);
  }
  const float old_maximum = scratch.maximum[row];
  const float maximum = std::max(old_maximum, hn::GetLane(hn::MaxOfLanes(d, highest)));
  const auto origin = hn::Set(d, maximum == -kInfinity ? 0.0f : maximum);
  auto sum = hn::Zero(d);
  for (std::int64_t j = 0; j < limit; j += n) {
    const auto probability = exp2_nonpositive(hn::Sub(hn::LoadU(d, s + j), origin));
    hn::StoreU(probability, d, s + j);
    sum = hn::Add(sum, probability);
  }
  const float correction = hn::GetLane(exp2_nonpositive(hn::Sub(hn::Set(d, old_maximum), origin)));
  scratch.correction[i] = correction;
  scratch.maximum[row] = maximum;
  scratch.sum[row] = scratch.sum[row] * correction + hn::GetLane(hn::SumOfLanes(d, sum));
}

/// o = o * correction + probabilities * V for the active rows. Tokens beyond a row's limit are not
/// multiplied even with 0: their values may be NaN.
void accumulate_rows(const AttentionScratch& scratch, const Problem& p, std::int64_t num_rows,
                     std::int64_t num_tokens) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const Panel panel{scratch.v_panel, num_tokens, core::ceil_div(p.head_dim, n)};
  for_each_tile(num_rows, panel.num_vectors,
                [&](auto rows, auto vectors, std::int64_t first, std::int64_t vector) {
                  const float* a[rows];
                  float* o[rows];
                  Sums<rows, vectors> sums;
                  std::int64_t common = num_tokens;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    a[r] = scratch.s + (first + r) * p.block_size;
                    o[r] = scratch.o + scratch.row[first + r] * padded_dim + vector * n;
                    common = std::min<std::int64_t>(common, scratch.limit[first + r]);
                    const auto correction = hn::Set(d, scratch.correction[first + r]);
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      sums[r][v] = hn::Mul(hn::LoadU(d, o[r] + v * n), correction);
                    }
                  }
                  const float* const strip = panel.strip(vector);
                  multiply<rows, vectors>(a, strip, common, sums);
                  for (std::int64_t r = 0; r < rows; ++r) {
                    for (std::int64_t v = 0; v < vectors; ++v)
                      hn::StoreU(sums[r][v], d, o[r] + v * n);
                  }
                  for (std::int64_t r = 0; r < rows; ++r) {
                    const std::int64_t rest = scratch.limit[first + r] - common;
                    if (rest == 0) continue;
                    const float* const tail[1] = {a[r] + common};
                    Sums<1, vectors> tail_sums;
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      tail_sums[0][v] = hn::LoadU(d, o[r] + v * n);
                    }
                    multiply<1, vectors>(tail, strip + common * vectors * n, rest, tail_sums);
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      hn::StoreU(tail_sums[0][v], d, o[r] + v * n);
                    }
                  }
                });
}

/// score_rows for active rows [first_row, first_row + kRows), from the keys as they lie.
template <std::int64_t kRows, class T>
void score_few_rows(const T* block, std::int64_t token_stride, const AttentionScratch& scratch,
                    const Problem& p, std::int64_t first_row, std::int64_t num_rows,
                    std::int64_t num_tokens, const NextRows& next) {
  // A chain of multiply-adds waits for its last step: eight of them keep two ports busy.
  constexpr std::int64_t kVectors = kRows <= 4 && kTileVectors > 2 ? 2 : 1;
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t dim = p.head_dim;
  const std::int64_t padded_dim = round_up(dim, kMaxLanes);
  const std::int64_t row_bytes = dim * static_cast<std::int64_t>(sizeof(T));
  const float* q[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    q[r] = scratch.q + scratch.row[std::min(first_row + r, num_rows - 1)] * padded_dim;
  }
  for (std::int64_t first = 0; first < num_tokens; first += kVectors * n) {
    const std::int64_t count = std::min(kVectors * n, num_tokens - first);
    const T* const from = block + first * token_stride;
    PrefetchStream ahead(next, row_bytes, first);
    if (token_stride == dim) touch_rows(from, count * row_bytes);
    const T* tokens[kVectors];
    std::int64_t stride = token_stride;
    if (count == kVectors * n && dim % kPieceDims<T> == 0) {
      for (std::int64_t v = 0; v < kVectors; ++v) tokens[v] = from + v * n * token_stride;
    } else {
      stride = round_up(dim, kPieceDims<T>);
      T* const copy = reinterpret_cast<T*>(scratch.pack);
      copy_rows(from, token_stride, count, dim, kVectors * n, copy);
      for (std::int64_t v = 0; v < kVectors; ++v) tokens[v] = copy + v * n * stride;
    }
    Sums<kRows, kVectors> sums;
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t v = 0; v < kVectors; ++v) sums[r][v] = hn::Zero(d);
    }
    with_stride(stride,
                [&](auto row) { multiply_tokens<kRows>(q, tokens, row, dim, ahead, sums); });
    for (std::int64_t r = 0; r < std::min(kRows, num_rows - first_row); ++r) {
      float* const to = scratch.s + (first_row + r) * p.block_size + first;
      for (std::int64_t v = 0; v * n < count; ++v) hn::StoreU(sums[r][v], d, to + v * n);
    }
  }
}

/// accumulate_rows for active rows [first_row, first_row + kRows), from the values as they lie.
template <std::int64_t kRows, class T>
void accumulate_few_rows(const T* block, std::int64_t token_stride, const AttentionScratch& scratch,
                         const Problem& p, std::int64_t first_row, std::int64_t num_rows,
                         const NextRows& next) {
  // Sums, values and a broadcast in 32 or 16 registers.
  constexpr std::int64_t kVectors = std::clamp<std::int64_t>(4 * kTileVectors / kRows, 1, 4);
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t live = std::min(kRows, num_rows - first_row);
  const auto row_of = [&](std::int64_t r) { return first_row + std::min(r, live - 1); };
  std::int64_t common = p.block_size;
  const float* a[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    a[r] = scratch.s + row_of(r) * p.block_size;
    common = std::min<std::int64_t>(common, scratch.limit[row_of(r)]);
  }
  const auto strip = [&](auto vectors, std::int64_t vector) HWY_ATTR {
    Sums<kRows, vectors> sums;
    const T* const from = block + vector * n;
    // Each strip asks for its share of the next rows.
    PrefetchStream ahead(next, p.head_dim * static_cast<std::int64_t>(sizeof(T)), 0);
    if (ahead.data != nullptr) {
      ahead.data += vector * n * static_cast<std::int64_t>(sizeof(T)) * common;
    }
    for (std::int64_t r = 0; r < kRows; ++r) {
      const float* const o = scratch.o + scratch.row[row_of(r)] * padded_dim + vector * n;
      const auto correction = hn::Set(d, scratch.correction[row_of(r)]);
      for (std::int64_t v = 0; v < vectors; ++v) {
        sums[r][v] = hn::Mul(hn::LoadU(d, o + v * n), correction);
      }
    }
    multiply_values<kRows, vectors>(a, from, token_stride, common, ahead, sums);
    PrefetchStream none({}, 0, 0);
    for (std::int64_t r = 0; r < live; ++r) {
      const std::int64_t rest = scratch.limit[row_of(r)] - common;
      float* const o = scratch.o + scratch.row[row_of(r)] * padded_dim + vector * n;
      const float* const tail[1] = {a[r] + common};
      Sums<1, vectors> tail_sums;
      for (std::int64_t v = 0; v < vectors; ++v) tail_sums[0][v] = sums[r][v];
      multiply_values<1, vectors>(tail, from + common * token_stride, token_stride, rest, none,
                                  tail_sums);
      for (std::int64_t v = 0; v < vectors; ++v) hn::StoreU(tail_sums[0][v], d, o + v * n);
    }
  };
  const std::int64_t num_vectors = p.head_dim / n;
  std::int64_t vector = 0;
  for (; vector + kVectors <= num_vectors; vector += kVectors) {
    strip(Constant<kVectors>(), vector);
  }
  for (; vector < num_vectors; ++vector) strip(Constant<1>(), vector);
}

/// Calls visit(rows, first_row) for groups of rows, the first as a constant. The last group's rows
/// may be more than are left. Groups of 16 take twice as long as two of 8: their sums and pointers
/// do not fit the registers.
template <class Visit>
HWY_INLINE void for_each_few_rows(std::int64_t num_rows, Visit visit) {
  constexpr std::int64_t kMost = 8;
  for (std::int64_t row = 0; row < num_rows; row += kMost) {
    const std::int64_t rest = num_rows - row;
    if (rest <= 2) {
      visit(Constant<2>(), row);
    } else if (rest <= 4) {
      visit(Constant<4>(), row);
    } else {
      visit(Constant<kMost>(), row);
    }
  }
}

core::BlockRows rows_of(const AttentionRequest& request, const TensorView& keys,
                        const QueryTile& tile, std::int64_t block) {
  if (block == kNoBlock) return {};
  return core::block_rows(keys, request.batch, request.problem.block_size, tile.sequence, tile.head,
                          block);
}

/// Attends `block`; `next` is the block after it, to be prefetched.
void attend_block(const AttentionRequest& request, const QueryTile& tile, std::int64_t block,
                  std::int64_t next, std::int64_t num_rows, const AttentionScratch& scratch) {
  const Problem& p = request.problem;
  const core::BlockRows keys = rows_of(request, request.k, tile, block);
  const core::BlockRows values = rows_of(request, request.v, tile, block);
  if (num_rows == 0 || keys.num_tokens == 0) return;  // a page id out of range
  const std::int64_t num_tokens = *std::max_element(scratch.limit, scratch.limit + num_rows);
  const NextRows next_keys = next_rows(request.k, rows_of(request, request.k, tile, next));
  if (num_rows <= kFewRows && p.head_dim % lanes() == 0) {
    with_elements(request.k, keys.offset, [&](const auto* from) {
      for_each_few_rows(num_rows, [&](auto count, std::int64_t row) {
        score_few_rows<count>(from, keys.token_stride, scratch, p, row, num_rows, num_tokens,
                              row == 0 ? next_rows(request.v, values) : NextRows{});
      });
    });
    for (std::int64_t i = 0; i < num_rows; ++i) softmax_row(scratch, p, i);
    with_elements(request.v, values.offset, [&](const auto* from) {
      for_each_few_rows(num_rows, [&](auto count, std::int64_t row) {
        accumulate_few_rows<count>(from, values.token_stride, scratch, p, row, num_rows,
                                   row == 0 ? next_keys : NextRows{});
      });
    });
    return;
  }
  with_elements(request.k, keys.offset, [&](const auto* from) {
    pack_keys(from, keys.token_stride, num_tokens, p.head_dim, next_rows(request.v, values),
              scratch.pack, scratch.k_panel);
  });
  with_elements(request.v, values.offset, [&](const auto* from) {
    pack_values(from, values.token_stride, num_tokens, p.head_dim, next_keys, scratch.v_panel);
  });
  score_rows(scratch, p, num_rows, num_tokens);
  for (std::int64_t i = 0; i < num_rows; ++i) softmax_row(scratch, p, i);
  accumulate_rows(scratch, p, num_rows, num_tokens);
}

void load_queries(const AttentionRequest& request, const QueryTile& tile,
                  const AttentionScratch& scratch) {
  const FloatTag d;
  const Problem& p = request.problem;
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const auto scale = hn::Set(d, request.scale);
  for (std::int64_t row = 0; row < tile.count * tile.num_heads; ++row) {
    const std::int64_t query = tile.sequence.q_begin + tile.first + row / tile.num_heads;
    const std::int64_t offset = core::offset_of(request.q, query, tile.q_head(p, row));
    float* const to = scratch.q + row * padded_dim;
    with_elements(request.q, offset, [&](const auto* from) { convert_row(from, p.head_dim, to); });
    for (std::int64_t i = 0; i < p.head_dim; i += lanes()) {
      hn::StoreU(hn::Mul(hn::LoadU(d, to + i), scale), d, to + i);
    }
    scratch.maximum[row] = -kInfinity;
    scratch.sum[row] = 0.0f;
  }
  std::fill_n(scratch.o, tile.count * tile.num_heads * padded_dim, 0.0f);
}

void store_results(const AttentionRequest& request, const QueryTile& tile,
                   const AttentionScratch& scratch) {
  constexpr double kLn2 = 0.69314718055994530942;
  const Problem& p = request.problem;
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  for (std::int64_t row = 0; row < tile.count * tile.num_heads; ++row) {
    const std::int64_t query = tile.sequence.q_begin + tile.first + row / tile.num_heads;
    const std::int64_t head = tile.q_head(p, row);
    const float sum = scratch.sum[row];
    float* const o = scratch.o + row * padded_dim;
    if (sum == 0.0f) {
      std::fill_n(o, p.head_dim, 0.0f);  // nothing attended, or scores of -inf alone
    } else {
      const float reciprocal = 1.0f / sum;
      for (std::int64_t i = 0; i < p.head_dim; ++i) o[i] *= reciprocal;
    }
    store_row(request.out, core::offset_of(request.out, query, head), o, p.head_dim);
    if (!request.lse.given()) continue;
    const double lse =
        sum == 0.0f
            ? -static_cast<double>(kInfinity)
            : (static_cast<double>(scratch.maximum[row]) + std::log2(static_cast<double>(sum))) *
                  kLn2;
    core::store(request.lse, lse, query, head);
  }
}

void attend_tile(const AttentionRequest& request, const QueryTile& tile, std::byte* memory) {
  core::WorkspaceLayout layout(memory);
  const AttentionScratch scratch = lay_out(request.problem, layout);
  load_queries(request, tile, scratch);
  if (request.block_ids.given()) {
    for (std::int64_t query = 0; query < tile.count; ++query) {
      sort_ids(request, tile, query, scratch.ids + query * (request.problem.top_k + 1));
      scratch.cursor[query] = 0;
    }
  }
  for (std::int64_t block = next_block(request, tile, scratch, -1); block != kNoBlock;) {
    const std::int64_t num_rows = list_rows(request, tile, block, scratch);
    const std::int64_t next = next_block(request, tile, scratch, block);
    attend_block(request, tile, block, next, num_rows, scratch);
    block = next;
  }
  store_results(request, tile, scratch);
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(attend_tile);

namespace {

template <class Args>
std::size_t slice_bytes(const Args& args) {
  core::WorkspaceLayout layout;
  lay_out(args.problem, layout);
  return layout.bytes();
}

template <class Args>
void run(const Args& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  const AttentionRequest request = request_of(args, &sequences);
  const std::int64_t total_q = args.q.shape[0];
  const std::int64_t heads = args.problem.num_kv_heads;
  // Large tiles share packed blocks; but every thread should get several.
  const std::int64_t queries = std::clamp<std::int64_t>(
      total_q * heads / (4 * std::int64_t{num_threads()}), 1, max_queries_per_tile(args.problem));
  const std::int64_t num_tiles = core::ceil_div(total_q, queries);
  // Few queries (decode): threads also divide the query heads of a group. Each packs the blocks for
  // itself, but no row's result depends on how many there are.
  const std::int64_t group = args.problem.group_size();
  const std::int64_t parts =
      std::clamp<std::int64_t>(num_threads() / std::max<std::int64_t>(num_tiles * heads, 1), 1,
                               core::ceil_div(group, kMinHeads));
  const std::int64_t part_heads =
      parts == 1 ? group : round_up(core::ceil_div(group, parts), kMinHeads);
  const std::int64_t num_parts = core::ceil_div(group, part_heads);
  for_each_item(num_tiles * heads * num_parts, workspace, slice_bytes(args),
                [&](std::int64_t item, std::byte* memory) {
                  // The last queries see most keys: heavy items first.
                  const std::int64_t head = item / num_parts % heads;
                  const std::int64_t first_head = item % num_parts * part_heads;
                  const std::int64_t begin = (num_tiles - 1 - item / (heads * num_parts)) * queries;
                  const std::int64_t end = std::min(begin + queries, total_q);
                  for (std::int64_t row = begin; row < end;) {
                    const core::Sequence sequence = sequences.of_query(row);
                    const std::int64_t first = row - sequence.q_begin;
                    const std::int64_t count = std::min(end - row, sequence.q_len - first);
                    HWY_DYNAMIC_DISPATCH(attend_tile)
                    (request,
                     {.sequence = sequence,
                      .head = head,
                      .first_head = first_head,
                      .num_heads = std::min(part_heads, group - first_head),
                      .first = first,
                      .count = count},
                     memory);
                    row += count;
                  }
                });
}

template <class Args>
constexpr detail::Implementation<Args> kImplementation = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<Args>,
    .workspace_bytes = [](const Args& args) { return workspace_of_slices(slice_bytes(args)); },
    .run = run<Args>};

}  // namespace

const detail::Implementation<SparseAttentionForward> kSparseAttentionForward =
    kImplementation<SparseAttentionForward>;
const detail::Implementation<DenseAttentionForward> kDenseAttentionForward =
    kImplementation<DenseAttentionForward>;

}  // namespace msa::cpu
#endif
