// SPDX-License-Identifier: Apache-2.0
//
// What attention and the indexer are made of: KV blocks packed into f32 panels, and register tiles
// that multiply rows with a panel. Included once per SIMD target.
//
// Every element of a product is one chain of fused multiply-adds in ascending order of the summed
// index. It does not depend on the tile that the element is computed in: results are bit-identical
// however queries are divided into tiles, threads and chunks.
#if defined(MSA_CPU_TILE_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_TILE_INL_HPP_
#undef MSA_CPU_TILE_INL_HPP_
#else
#define MSA_CPU_TILE_INL_HPP_
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/exp2-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

// AVX-512 and NEON have 32 vector registers, AVX2 and SSE 16: kTileRows * kTileVectors sums, one
// row of the panel and one broadcast must fit.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
inline constexpr std::int64_t kTileVectors = 2;
#else
inline constexpr std::int64_t kTileVectors = 4;
#endif
inline constexpr std::int64_t kTileRows = 4;

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(FloatTag())); }

/// A panel is a [depth][columns] matrix cut into strips of kTileVectors vectors (the last may be
/// narrower), each strip contiguous: [strip][depth][strip width].
struct Panel {
  const float* data;
  std::int64_t depth;
  std::int64_t num_vectors;  ///< columns / lanes, rounded up

  HWY_INLINE const float* strip(std::int64_t first_vector) const {
    return data + first_vector * lanes() * depth;
  }
};

// ---------------------------------------------------------------------------------------------
// Rows to f32

HWY_INLINE FloatVector load_vector(const float* from) { return hn::LoadU(FloatTag(), from); }
HWY_INLINE FloatVector load_vector(const hwy::bfloat16_t* from) {
  return hn::PromoteTo(FloatTag(), hn::LoadU(hn::Rebind<hwy::bfloat16_t, FloatTag>(), from));
}
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SCALAR
// Without instructions for it, Highway's conversion takes infinities and NaN for numbers.
HWY_INLINE FloatVector load_vector(const hwy::float16_t* from) {
  HWY_ALIGN float converted[kMaxLanes];
  for (std::int64_t i = 0; i < lanes(); ++i) {
    converted[i] = core::f16_to_f32(std::bit_cast<std::uint16_t>(from[i]));
  }
  return hn::Load(FloatTag(), converted);
}
#else
HWY_INLINE FloatVector load_vector(const hwy::float16_t* from) {
  return hn::PromoteTo(FloatTag(), hn::LoadU(hn::Rebind<hwy::float16_t, FloatTag>(), from));
}
#endif

HWY_INLINE float load_scalar(const float* from) { return *from; }
HWY_INLINE float load_scalar(const hwy::bfloat16_t* from) {
  return core::bf16_to_f32(std::bit_cast<std::uint16_t>(*from));
}
HWY_INLINE float load_scalar(const hwy::float16_t* from) {
  return core::f16_to_f32(std::bit_cast<std::uint16_t>(*from));
}

/// to[0, dim) = from[0, dim), zeros up to a multiple of the vector width. Reads nothing else.
template <class T>
HWY_INLINE void convert_row(const T* HWY_RESTRICT from, std::int64_t dim, float* HWY_RESTRICT to) {
  const FloatTag d;
  std::int64_t i = 0;
  for (; i + lanes() <= dim; i += lanes()) hn::StoreU(load_vector(from + i), d, to + i);
  if (i == dim) return;
  hn::StoreU(hn::Zero(d), d, to + i);
  for (; i < dim; ++i) to[i] = load_scalar(from + i);
}

/// Calls visit with a typed pointer to element `offset` of a f32, f16 or bf16 tensor.
template <class Visit>
HWY_INLINE void with_elements(const TensorView& view, std::int64_t offset, Visit visit) {
  const void* address = core::address_at(view, offset);
  switch (view.dtype) {
    case DType::bf16:
      return visit(static_cast<const hwy::bfloat16_t*>(address));
    case DType::f16:
      return visit(static_cast<const hwy::float16_t*>(address));
    default:
      return visit(static_cast<const float*>(address));
  }
}

// ---------------------------------------------------------------------------------------------
// Packing

/// Dimensions of a token that are loaded and transposed at a time.
template <class T>
inline constexpr std::int64_t kPieceDims = 16 / sizeof(T);

#if HWY_TARGET == HWY_SCALAR

/// columns[i] = dimension i of token j in lane j, for i in [0, kPieceDims) and j in [0, lanes):
/// the tokens' rows are `row` elements apart.
template <class T>
HWY_INLINE void load_columns(const T* from, std::int64_t, FloatVector (&columns)[kPieceDims<T>]) {
  for (std::int64_t i = 0; i < kPieceDims<T>; ++i) {
    columns[i] = hn::Set(FloatTag(), load_scalar(from + i));
  }
}

#else

using WordTag = hn::Repartition<std::uint32_t, FloatTag>;
using WordVector = hn::Vec<WordTag>;

/// 16 bytes each of tokens that are `stride` bytes apart, from `base`, as one vector.
template <class D>
HWY_INLINE hn::Vec<D> load_pieces(D d, const std::byte* base, std::int64_t stride) {
  if constexpr (HWY_MAX_BYTES == 16 || hn::MaxLanes(d) <= 4) {
    return hn::LoadU(d, reinterpret_cast<const std::uint32_t*>(base));
  } else {
    const hn::Half<D> half;
    constexpr auto kPieces = static_cast<std::int64_t>(hn::MaxLanes(half)) / 4;
    return hn::Combine(d, load_pieces(half, base + kPieces * stride, stride),
                       load_pieces(half, base, stride));
  }
}

/// The two dimensions in each 32-bit lane, as f32.
HWY_INLINE void split_pairs(hwy::bfloat16_t, WordVector pairs, FloatVector& even,
                            FloatVector& odd) {
  const FloatTag d;
  even = hn::BitCast(d, hn::ShiftLeft<16>(pairs));
  odd = hn::BitCast(d, hn::And(pairs, hn::Set(WordTag(), 0xffff0000u)));
}
HWY_INLINE void split_pairs(hwy::float16_t, WordVector pairs, FloatVector& even, FloatVector& odd) {
  const hn::Rebind<std::uint16_t, FloatTag> halves;
  const auto low = hn::And(pairs, hn::Set(WordTag(), 0xffffu));
  HWY_ALIGN hwy::float16_t converted[2 * kMaxLanes];
  hn::Store(hn::TruncateTo(halves, low), halves, reinterpret_cast<std::uint16_t*>(converted));
  hn::Store(hn::TruncateTo(halves, hn::ShiftRight<16>(pairs)), halves,
            reinterpret_cast<std::uint16_t*>(converted + kMaxLanes));
  even = load_vector(converted);
  odd = load_vector(converted + kMaxLanes);
}

/// words[i] = bytes [4 i, 4 i + 4) of token j in lane j, for tokens `stride` bytes apart.
HWY_INLINE void load_words(const std::byte* base, std::int64_t stride, WordVector (&words)[4]) {
  const WordTag d;
  const hn::Repartition<std::uint64_t, FloatTag> d64;
  // Lane 4 i + j of row_j is token 4 i + j, so four by four inside each 128-bit piece.
  const auto row0 = load_pieces(d, base, 4 * stride);
  const auto row1 = load_pieces(d, base + stride, 4 * stride);
  const auto row2 = load_pieces(d, base + 2 * stride, 4 * stride);
  const auto row3 = load_pieces(d, base + 3 * stride, 4 * stride);
  const auto low01 = hn::BitCast(d64, hn::InterleaveLower(d, row0, row1));
  const auto low23 = hn::BitCast(d64, hn::InterleaveLower(d, row2, row3));
  const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(d, row0, row1));
  const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(d, row2, row3));
  words[0] = hn::BitCast(d, hn::InterleaveLower(d64, low01, low23));
  words[1] = hn::BitCast(d, hn::InterleaveUpper(d64, low01, low23));
  words[2] = hn::BitCast(d, hn::InterleaveLower(d64, high01, high23));
  words[3] = hn::BitCast(d, hn::InterleaveUpper(d64, high01, high23));
}

/// columns[i] = dimension i of token j in lane j, for i in [0, kPieceDims) and j in [0, lanes):
/// the tokens' rows are `row` elements apart. 16-bit elements are transposed as pairs, so that half
/// as much is moved, and converted last.
template <class T>
HWY_INLINE void load_columns(const T* from, std::int64_t row,
                             FloatVector (&columns)[kPieceDims<T>]) {
  WordVector words[4];
  load_words(reinterpret_cast<const std::byte*>(from), row * static_cast<std::int64_t>(sizeof(T)),
             words);
  for (std::int64_t i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      columns[i] = hn::BitCast(FloatTag(), words[i]);
    } else {
      split_pairs(T(), words[i], columns[2 * i], columns[2 * i + 1]);
    }
  }
}

#endif

/// Copies `count` rows for load_columns, which reads whole pieces of whole vectors of tokens: zeros
/// up to kPieceDims and up to `rows` rows.
template <class T>
HWY_INLINE void copy_rows(const T* from, std::int64_t stride, std::int64_t count, std::int64_t dim,
                          std::int64_t rows, T* to) {
  const std::int64_t row = round_up(dim, kPieceDims<T>);
  std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(rows * row) * sizeof(T));
  for (std::int64_t j = 0; j < count; ++j) std::copy_n(from + j * stride, dim, to + j * row);
}

/// Calls visit(stride), with a constant where it is the usual one: the addresses of 16 rows are
/// then displacements, not registers.
template <class Visit>
HWY_INLINE void with_stride(std::int64_t stride, Visit visit) {
  constexpr std::int64_t kUsual = 128;
  if (stride == kUsual) {
    visit(std::integral_constant<std::int64_t, kUsual>());
  } else {
    visit(stride);
  }
}

/// Rows that will be packed next. Blocks lie anywhere in memory, so hardware prefetchers start
/// anew at each: packing asks for rows kPrefetchRows ahead, into the next block at the end.
struct NextRows {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;  ///< bytes
};
inline constexpr std::int64_t kPrefetchRows = 32;

inline NextRows next_rows(const TensorView& keys, const core::BlockRows& rows) {
  if (rows.num_tokens == 0) return {};
  return {core::address_at(keys, rows.offset),
          rows.token_stride * static_cast<std::int64_t>(size_of(keys.dtype))};
}

template <class T>
HWY_INLINE void prefetch_row(const T* block, std::int64_t token_stride, std::int64_t num_tokens,
                             std::int64_t dim, std::int64_t token, const NextRows& next) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t ahead = token + kPrefetchRows;
  const auto* row = reinterpret_cast<const std::byte*>(block + ahead * token_stride);
  if (ahead >= num_tokens) {
    if (next.data == nullptr) return;
    row = next.data + (ahead - num_tokens) * next.stride;
  }
  for (std::int64_t byte = 0; byte < dim * static_cast<std::int64_t>(sizeof(T)); byte += kLine) {
    hwy::Prefetch(row + byte);
  }
}

/// The part of the next block that lies where `first` tokens of this one are, to be asked for in
/// even pieces while those are multiplied: a page lies anywhere, so no hardware prefetcher knows
/// it, and a burst of requests would stop the arithmetic. Into the L2 cache, a whole block ahead.
struct PrefetchStream {
  const std::byte* data = nullptr;

  PrefetchStream(const NextRows& next, std::int64_t row_bytes, std::int64_t first) {
    if (next.data != nullptr && next.stride == row_bytes) data = next.data + first * row_bytes;
  }
  HWY_INLINE void advance(std::int64_t bytes) {
    constexpr std::int64_t kLine = 64;
    if (data == nullptr) return;
    for (std::int64_t byte = 0; byte < bytes; byte += kLine) {
      __builtin_prefetch(data + byte, 0, 2);
    }
    data += bytes;
  }
};

/// Reads every cache line of contiguous rows once, in order: the transposition that follows jumps
/// from row to row and would wait for each.
HWY_INLINE void touch_rows(const void* rows, std::int64_t bytes) {
  constexpr std::int64_t kLine = 64;
  const auto* const lines = static_cast<const volatile char*>(rows);
  for (std::int64_t byte = 0; byte < bytes; byte += kLine) static_cast<void>(lines[byte]);
}

/// Tokens [0, num_tokens) of a KV block become the columns of a panel of depth `dim`; columns up to
/// the vector width are zero.
template <class T>
void pack_keys(const T* block, std::int64_t token_stride, std::int64_t num_tokens, std::int64_t dim,
               const NextRows& next, float* HWY_RESTRICT scratch, float* HWY_RESTRICT panel) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t num_vectors = core::ceil_div(num_tokens, n);
  for (std::int64_t vector = 0; vector < num_vectors; ++vector) {
    for (std::int64_t token = vector * n; token < std::min((vector + 1) * n, num_tokens); ++token) {
      prefetch_row(block, token_stride, num_tokens, dim, token, next);
    }
    const std::int64_t count = std::min(n, num_tokens - vector * n);
    const T* tokens = block + vector * n * token_stride;
    std::int64_t row = token_stride;
    if (count < n || dim % kPieceDims<T> != 0) {
      copy_rows(tokens, row, count, dim, n, reinterpret_cast<T*>(scratch));
      tokens = reinterpret_cast<T*>(scratch);
      row = round_up(dim, kPieceDims<T>);
    }
    const std::int64_t strip = vector / kTileVectors * kTileVectors;
    const std::int64_t width = std::min(kTileVectors, num_vectors - strip) * n;
    float* to = panel + strip * n * dim + (vector - strip) * n;
    with_stride(row, [&](auto stride) {
      FloatVector columns[kPieceDims<T>];
      std::int64_t k = 0;
      for (; k + kPieceDims<T> <= dim; k += kPieceDims<T>) {
        load_columns(tokens + k, stride, columns);
        for (std::int64_t i = 0; i < kPieceDims<T>; ++i, to += width) hn::StoreU(columns[i], d, to);
      }
      if (k == dim) return;
      load_columns(tokens + k, stride, columns);
      for (std::int64_t i = 0; i < dim - k; ++i, to += width) hn::StoreU(columns[i], d, to);
    });
  }
}

/// Tokens [0, num_tokens) become the rows of a panel of depth num_tokens; columns beyond dim are
/// zero.
template <class T>
void pack_values(const T* block, std::int64_t token_stride, std::int64_t num_tokens,
                 std::int64_t dim, const NextRows& next, float* HWY_RESTRICT panel) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t num_vectors = core::ceil_div(dim, n);
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    prefetch_row(block, token_stride, num_tokens, dim, token, next);
    const T* const from = block + token * token_stride;
    for (std::int64_t strip = 0; strip < num_vectors; strip += kTileVectors) {
      const std::int64_t vectors = std::min(kTileVectors, num_vectors - strip);
      float* to = panel + strip * n * num_tokens + token * vectors * n;
      for (std::int64_t vector = strip; vector < strip + vectors; ++vector, to += n) {
        const std::int64_t first = vector * n;
        if (first + n <= dim) {
          hn::StoreU(load_vector(from + first), d, to);
        } else {
          convert_row(from + first, dim - first, to);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Products

template <std::int64_t kRows, std::int64_t kVectors>
using Sums = FloatVector[kRows][kVectors];

/// sums[r][v] += sum over i in [0, depth) of a[r][i] * strip[i][v]
template <std::int64_t kRows, std::int64_t kVectors>
HWY_INLINE void multiply(const float* const* HWY_RESTRICT a, const float* HWY_RESTRICT strip,
                         std::int64_t depth, Sums<kRows, kVectors>& sums) {
  const FloatTag d;
  const std::int64_t n = lanes();
  for (std::int64_t i = 0; i < depth; ++i, strip += kVectors * n) {
    FloatVector b[kVectors];
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectors; ++v) b[v] = hn::LoadU(d, strip + v * n);
#pragma GCC unroll 8
    for (std::int64_t r = 0; r < kRows; ++r) {
      const auto factor = hn::Set(d, a[r][i]);
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = hn::MulAdd(factor, b[v], sums[r][v]);
      }
    }
  }
}

/// kVectors * lanes tokens, where they lie, times kRows rows of q: the same chain of multiply-adds
/// per score as in a panel. Packing a block pays for many rows only.
template <std::int64_t kRows, std::int64_t kVectors, class T, class Stride>
HWY_INLINE void multiply_tokens(const float* const (&q)[kRows], const T* const (&tokens)[kVectors],
                                Stride stride, std::int64_t dim, PrefetchStream& ahead,
                                Sums<kRows, kVectors>& sums) {
  const FloatTag d;
  const auto step = [&](std::int64_t k, std::int64_t count) HWY_ATTR {
    ahead.advance(kVectors * lanes() * 16);
    FloatVector columns[kVectors][kPieceDims<T>];
#pragma GCC unroll 2
    for (std::int64_t v = 0; v < kVectors; ++v) load_columns(tokens[v] + k, stride, columns[v]);
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (std::int64_t r = 0; r < kRows; ++r) {
        const auto factor = hn::Set(d, q[r][k + i]);
#pragma GCC unroll 2
        for (std::int64_t v = 0; v < kVectors; ++v) {
          sums[r][v] = hn::MulAdd(factor, columns[v][i], sums[r][v]);
        }
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kPieceDims<T> <= dim; k += kPieceDims<T>) step(k, kPieceDims<T>);
  if (k < dim) step(k, dim - k);
}

/// sums[r][v] += sum over i in [0, count) of a[r][i] * vector v of row i, where the rows lie.
template <std::int64_t kRows, std::int64_t kVectors, class T>
HWY_INLINE void multiply_values(const float* const (&a)[kRows], const T* rows, std::int64_t stride,
                                std::int64_t count, PrefetchStream& ahead,
                                Sums<kRows, kVectors>& sums) {
  const FloatTag d;
  const std::int64_t n = lanes();
  for (std::int64_t i = 0; i < count; ++i, rows += stride) {
    ahead.advance(kVectors * n * static_cast<std::int64_t>(sizeof(T)));
    FloatVector b[kVectors];
#pragma GCC unroll 8
    for (std::int64_t v = 0; v < kVectors; ++v) b[v] = load_vector(rows + v * n);
#pragma GCC unroll 16
    for (std::int64_t r = 0; r < kRows; ++r) {
      const auto factor = hn::Set(d, a[r][i]);
#pragma GCC unroll 8
      for (std::int64_t v = 0; v < kVectors; ++v) {
        sums[r][v] = hn::MulAdd(factor, b[v], sums[r][v]);
      }
    }
  }
}

template <std::int64_t kValue>
using Constant = std::integral_constant<std::int64_t, kValue>;

/// Calls visit(Constant<value>) for a value in [1, kMax].
template <std::int64_t kMax, class Visit>
HWY_INLINE void with_constant(std::int64_t value, Visit visit) {
  if constexpr (kMax > 1) {
    if (value < kMax) return with_constant<kMax - 1>(value, visit);
  }
  visit(Constant<kMax>());
}

/// Calls visit(rows, vectors, first_row, first_vector) for the register tiles of a product, the
/// first two as constants. Strips run outermost, so that one stays in the L1 cache.
template <class Visit>
HWY_INLINE void for_each_tile(std::int64_t num_rows, std::int64_t num_vectors, Visit visit) {
  for (std::int64_t vector = 0; vector < num_vectors; vector += kTileVectors) {
    with_constant<kTileVectors>(std::min(kTileVectors, num_vectors - vector), [&](auto vectors) {
      std::int64_t row = 0;
      for (; row + kTileRows <= num_rows; row += kTileRows) {
        visit(Constant<kTileRows>(), vectors, row, vector);
      }
      if (row < num_rows) {
        with_constant<kTileRows - 1>(num_rows - row,
                                     [&](auto rows) { visit(rows, vectors, row, vector); });
      }
    });
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
