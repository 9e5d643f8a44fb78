// SPDX-License-Identifier: Apache-2.0
//
// Bounds on block scores from the int8 codes of the index keys (core/index_code.hpp), for a few
// rows of queries. With q = s m + f (m 16-bit integers) and k = c n + g, ||g|| <= e:
//
//   |<q, k> - s c <m, n>|  <=  ||f|| ||c n|| + ||q|| e,      ||c n|| <= 127 sqrt(dim) c
//
// by Cauchy-Schwarz; <m, n> is exact in int32. The f32 score of the exact kernels is a chain of dim
// multiply-adds, so it is within gamma = dim u / (1 - dim u) of ||q|| ||k||, u = 2^-24; the few
// roundings here, and those of the product with the scale afterwards, are within 16 u of it. So
// with
//
//   slope = 127 sqrt(dim) (||f|| + (gamma + 16 u) (||q|| + ||f||)),  factor = ||q|| (1 + gamma + 16
//   u)
//
// every score lies in s c <m, n> -+ (c slope + e factor + tiny), where tiny covers underflow, and
// scores whose intervals do not touch stay apart when they are scaled and rounded. Included once
// per SIMD target.
#if defined(MSA_CPU_SCREEN_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SCREEN_INL_HPP_
#undef MSA_CPU_SCREEN_INL_HPP_
#else
#define MSA_CPU_SCREEN_INL_HPP_
#endif

#include <cmath>

#include "cpu/index_score-inl.hpp"
#include "cpu/select-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// Codes row `r` of the queries; false where it has an element that is not finite or too large.
HWY_INLINE bool encode_query(const float* q, std::int64_t dim, ScreenRow& row,
                             std::int16_t* pairs) {
  double largest = 0.0;
  double squares = 0.0;
  for (std::int64_t i = 0; i < dim; ++i) {
    const double magnitude = std::fabs(static_cast<double>(q[i]));
    if (!(magnitude <= core::kMaxCodedElement)) return false;
    largest = std::max(largest, magnitude);
    squares += magnitude * magnitude;
  }
  // The sum of dim products with any int8 fits an int32, even if the codes are not what they
  // should.
  const double most =
      std::min(32767.0, std::floor(2147483647.0 / (128.0 * static_cast<double>(dim))));
  const auto scale = static_cast<float>(largest / most);
  double rest = 0.0;
  std::fill_n(pairs, round_up(dim, kCodesPerPiece), std::int16_t{0});
  for (std::int64_t i = 0; i < dim; ++i) {
    double code = 0.0;
    if (scale > 0.0f) {
      code = std::clamp(std::nearbyint(static_cast<double>(q[i]) / static_cast<double>(scale)),
                        -most, most);
    }
    // Bytes 0 and 2 of a 32-bit word of codes are multiplied first, then bytes 1 and 3.
    pairs[i / 4 * 4 + (i % 2) * 2 + i % 4 / 2] = static_cast<std::int16_t>(code);
    const double error = static_cast<double>(q[i]) - static_cast<double>(scale) * code;
    rest += error * error;
  }
  const double u = 0x1p-24;
  const auto n = static_cast<double>(dim);
  const double rounding = n * u / (1.0 - n * u) + 16.0 * u;
  const double norm = std::sqrt(squares);
  const double error_norm = std::sqrt(rest);
  // 1 + 2^-20: the roundings of these lines and of their use in f32.
  const double slope = core::kMaxIndexCode * std::sqrt(n) *
                       (error_norm + rounding * (norm + error_norm)) * (1.0 + 0x1p-20);
  row.scale = scale;
  row.slope = static_cast<float>(slope);
  // Not 0: an error of +inf times it has to be +inf.
  row.factor = static_cast<float>(norm * (1.0 + rounding) * (1.0 + 0x1p-20)) + 0x1p-100f;
  return true;
}

#if HWY_TARGET == HWY_SCALAR

template <std::int64_t kRows>
HWY_INLINE void multiply_codes(const std::int8_t* tokens, std::int64_t, std::int64_t dim,
                               const std::int16_t* const (&pairs)[kRows], PrefetchStream&,
                               FloatVector (&products)[kRows]) {
  for (std::int64_t r = 0; r < kRows; ++r) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      sum += tokens[i] * pairs[r][i / 4 * 4 + (i % 2) * 2 + i % 4 / 2];
    }
    products[r] = hn::Set(FloatTag(), static_cast<float>(sum));
  }
}

#else

/// products[r] = <m_r, n_j> in lane j, for a vector of tokens whose codes are `stride` apart.
template <std::int64_t kRows, class Stride>
HWY_INLINE void multiply_codes(const std::int8_t* tokens, Stride stride, std::int64_t dim,
                               const std::int16_t* const (&pairs)[kRows], PrefetchStream& ahead,
                               FloatVector (&products)[kRows]) {
  const hn::Repartition<std::int32_t, FloatTag> d32;
  const hn::Repartition<std::int16_t, FloatTag> d16;
  hn::Vec<decltype(d32)> sums[kRows], high_sums[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) sums[r] = high_sums[r] = hn::Zero(d32);
  for (std::int64_t k = 0; k < dim; k += kCodesPerPiece) {
    ahead.advance(lanes() * kCodesPerPiece);
    WordVector words[4];
    load_words(reinterpret_cast<const std::byte*>(tokens + k), stride, words);
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < 4; ++i) {
      const auto codes = hn::BitCast(d16, words[i]);
      const auto even = hn::ShiftRight<8>(hn::ShiftLeft<8>(codes));  // bytes 0 and 2
      const auto odd = hn::ShiftRight<8>(codes);                     // bytes 1 and 3
#pragma GCC unroll 8
      for (std::int64_t r = 0; r < kRows; ++r) {
        std::int32_t factors[2];
        std::memcpy(factors, pairs[r] + k + 4 * i, sizeof(factors));
        sums[r] = hn::ReorderWidenMulAccumulate(
            d32, even, hn::BitCast(d16, hn::Set(d32, factors[0])), sums[r], high_sums[r]);
        sums[r] = hn::ReorderWidenMulAccumulate(
            d32, odd, hn::BitCast(d16, hn::Set(d32, factors[1])), sums[r], high_sums[r]);
      }
    }
  }
  for (std::int64_t r = 0; r < kRows; ++r) {
    products[r] = hn::ConvertTo(FloatTag(), hn::RearrangeToOddPlusEven(sums[r], high_sums[r]));
  }
}

#endif

/// Bounds on the maximum over the visible tokens of a block, for kRows rows: `limit[r]` tokens are
/// visible to row r. `scratch` holds a vector of tokens of codes.
template <std::int64_t kRows>
void screen_block(const CodedBlock& block, std::int64_t dim, const ScreenRow* const (&rows)[kRows],
                  const std::int16_t* const (&pairs)[kRows], const std::int64_t (&limit)[kRows],
                  const NextRows& next, const NextRows& next_scales, std::int8_t* scratch,
                  float (&lower)[kRows], float (&upper)[kRows]) {
  const FloatTag d;
  const hn::Repartition<std::uint32_t, FloatTag> words;
  const std::int64_t n = lanes();
  const auto lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  FloatVector least[kRows], most[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) least[r] = most[r] = lowest;
  for (std::int64_t first = 0; first < block.num_tokens; first += n) {
    const std::int64_t count = std::min(n, block.num_tokens - first);
    PrefetchStream ahead(next, dim, first);
    if (block.code_stride == dim) {
      touch_rows(block.codes + first * block.code_stride, count * dim);
    }
    if (next_scales.data != nullptr) hwy::Prefetch(next_scales.data + first * next_scales.stride);
    const std::int8_t* tokens = block.codes + first * block.code_stride;
    std::int64_t stride = block.code_stride;
    if (count < n || dim % kCodesPerPiece != 0) {
      copy_rows(tokens, stride, count, dim, n, scratch);
      tokens = scratch;
      stride = round_up(dim, kCodesPerPiece);
    }
    FloatVector products[kRows];
    with_stride(stride, [&](auto row)
                            HWY_ATTR { multiply_codes(tokens, row, dim, pairs, ahead, products); });
    HWY_ALIGN std::uint32_t pair[kMaxLanes] = {};
    const std::uint16_t* scales = block.scales + first * block.scale_stride;
    for (std::int64_t j = 0; j < count; ++j, scales += block.scale_stride) {
      std::memcpy(pair + j, scales, sizeof(*pair));
    }
    const auto pairs_of_scales = hn::Load(words, pair);
    const auto scale = hn::BitCast(d, hn::ShiftLeft<16>(pairs_of_scales));
    const auto error = hn::BitCast(d, hn::And(pairs_of_scales, hn::Set(words, 0xffff0000u)));
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t visible = std::clamp<std::int64_t>(limit[r] - first, 0, n);
      const auto seen = hn::FirstN(d, static_cast<std::size_t>(visible));
      const auto product = hn::Mul(products[r], hn::Mul(scale, hn::Set(d, rows[r]->scale)));
      const auto radius =
          hn::MulAdd(scale, hn::Set(d, rows[r]->slope),
                     hn::MulAdd(error, hn::Set(d, rows[r]->factor), hn::Set(d, kTinyScore)));
      least[r] = hn::Max(least[r], hn::IfThenElse(seen, hn::Sub(product, radius), lowest));
      most[r] = hn::Max(most[r], hn::IfThenElse(seen, hn::Add(product, radius), lowest));
    }
  }
  for (std::int64_t r = 0; r < kRows; ++r) {
    lower[r] = hn::GetLane(hn::MaxOfLanes(d, least[r]));
    upper[r] = hn::GetLane(hn::MaxOfLanes(d, most[r]));
  }
}

/// Codes the queries of a tile of few rows; false where one has an element that is not finite.
bool encode_queries(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  load_queries(index_request_of(args), tile, scratch);
  bool coded = true;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    coded = coded && encode_query(scratch.q + row * round_up(p.index_dim, kMaxLanes), p.index_dim,
                                  scratch.coded[row],
                                  scratch.pairs + row * round_up(p.index_dim, kCodesPerPiece));
  }
  return coded;
}

/// Bounds the scores of blocks [block_begin, block_end) for coded queries: from below into
/// scratch.lower, from above into scratch.target.
void screen_tile(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  const std::int64_t num_tokens = tile.position(tile.count - 1) + 1;
  const std::int64_t end = std::min(tile.block_end, core::ceil_div(num_tokens, p.block_size));
  const auto rows_of = [&](const TensorView& view, std::int64_t block) {
    return block < end ? core::block_rows(view, args.batch, p.block_size, tile.sequence, 0, block)
                       : core::BlockRows{};
  };
  const auto screen = [&](auto count, std::int64_t block) HWY_ATTR {
    constexpr std::int64_t kRows = count;
    const ScreenRow* coded[kRows];
    const std::int16_t* pairs[kRows];
    std::int64_t limit[kRows];
    float lower[kRows];
    float upper[kRows];
    const std::int64_t base = block * p.block_size;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = std::min(r, num_rows - 1);
      coded[r] = scratch.coded + row;
      pairs[r] = scratch.pairs + row * round_up(p.index_dim, kCodesPerPiece);
      limit[r] = tile.position(row / p.num_kv_heads) + 1 - base;
    }
    const core::BlockRows codes = rows_of(args.index_k_codes, block);
    const core::BlockRows scales = rows_of(args.index_k_scales, block);
    screen_block({.codes = reinterpret_cast<const std::int8_t*>(
                      core::address_at(args.index_k_codes, codes.offset)),
                  .code_stride = codes.token_stride,
                  .scales = reinterpret_cast<const std::uint16_t*>(
                      core::address_at(args.index_k_scales, scales.offset)),
                  .scale_stride = scales.token_stride,
                  .num_tokens = std::min(num_tokens - base, codes.num_tokens)},
                 p.index_dim, coded, pairs, limit,
                 next_rows(args.index_k_codes, rows_of(args.index_k_codes, block + 1)),
                 next_rows(args.index_k_scales, rows_of(args.index_k_scales, block + 1)),
                 reinterpret_cast<std::int8_t*>(scratch.pack), lower, upper);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      scratch.lower[row][block] = lower[row];
      scratch.target[row][block] = upper[row];
    }
  };
  for (std::int64_t block = tile.block_begin; block < end; ++block) {
    if (num_rows <= 2) {
      screen(Constant<2>(), block);
    } else if (num_rows <= 4) {
      screen(Constant<4>(), block);
    } else {
      screen(Constant<kFewRows>(), block);
    }
  }
}

/// From the bounds of whole rows to what is left open: scratch.lower[0][block] becomes 1 where a
/// row might select the block for its score, else 0; all scores become -inf. A block is out when as
/// many blocks as a row selects have lower bounds above its upper bound.
void open_blocks(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  const std::int64_t count = p.top_k - p.num_init_blocks - p.num_local_blocks;
  std::int64_t limits[kFewRows];  // blocks [num_init_blocks, limit) compete
  float thresholds[kFewRows];
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t position = tile.position(row / p.num_kv_heads);
    const std::int64_t visible = position < 0 ? 0 : position / p.block_size + 1;
    limits[row] = visible > p.top_k && count > 0 ? visible - p.num_local_blocks : 0;
    if (limits[row] == 0) continue;
    scan_best(scratch.lower[row], p.num_init_blocks, limits[row], count, scratch.best);
    thresholds[row] = scratch.lower[row][block_of(scratch.best[0])];
  }
  for (std::int64_t block = 0; block < tile.block_end; ++block) {
    bool open = false;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      float& score = scratch.target[row][block];
      if (block >= p.num_init_blocks && block < limits[row]) {
        open = open || score >= thresholds[row];
      }
      score = -kInfinity;
    }
    scratch.lower[0][block] = open ? 1.0f : 0.0f;
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
