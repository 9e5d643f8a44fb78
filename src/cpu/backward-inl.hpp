// SPDX-License-Identifier: Apache-2.0
//
// What both backward operations do with rows of scores. Included once per SIMD target.
#if defined(MSA_CPU_BACKWARD_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_BACKWARD_INL_HPP_
#undef MSA_CPU_BACKWARD_INL_HPP_
#else
#define MSA_CPU_BACKWARD_INL_HPP_
#endif

#include "cpu/tile-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// to(r)[column] = sum over i < depth of a(r)[i] * panel[i][column], or that much more where `add`.
template <class From, class To>
void multiply_rows(std::int64_t num_rows, const Panel& panel, bool add, From a, To to) {
  const FloatTag d;
  const std::int64_t n = lanes();
  for_each_tile(num_rows, panel.num_vectors,
                [&](auto rows, auto vectors, std::int64_t first, std::int64_t vector) {
                  const float* from[rows];
                  Sums<rows, vectors> sums;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    from[r] = a(first + r);
                    const float* const old = to(first + r) + vector * n;
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      sums[r][v] = add ? hn::LoadU(d, old + v * n) : hn::Zero(d);
                    }
                  }
                  multiply<rows, vectors>(from, panel.strip(vector), panel.depth, sums);
                  for (std::int64_t r = 0; r < rows; ++r) {
                    float* const sum = to(first + r) + vector * n;
                    for (std::int64_t v = 0; v < vectors; ++v)
                      hn::StoreU(sums[r][v], d, sum + v * n);
                  }
                });
}

/// Row (query, head) of a tensor to f32, times `factor`; zeros up to the vector width.
inline void load_row(const TensorView& from, std::int64_t query, std::int64_t head, float factor,
                     float* to) {
  const FloatTag d;
  const std::int64_t dim = from.shape[2];
  with_elements(from, core::offset_of(from, query, head),
                [&](const auto* elements) { convert_row(elements, dim, to); });
  const auto scale = hn::Set(d, factor);
  for (std::int64_t i = 0; i < dim; i += lanes()) {
    hn::StoreU(hn::Mul(hn::LoadU(d, to + i), scale), d, to + i);
  }
}

/// The statistics of a softmax in base 2 while its scores arrive.
struct SoftmaxRow {
  float maximum;  ///< of the scores that are no NaN
  float sum;      ///< of 2^(score - maximum)
};

/// Vector i of row[0, limit): `filler` in lanes from limit on.
HWY_INLINE FloatVector load_visible(const float* row, std::int64_t i, std::int64_t limit,
                                    FloatVector filler) {
  const FloatTag d;
  const auto values = hn::LoadU(d, row + i);
  if (i + lanes() <= limit) return values;
  return hn::IfThenElse(hn::FirstN(d, static_cast<std::size_t>(limit - i)), values, filler);
}

/// Takes in scores[0, limit) and returns what sums over earlier scores are to be multiplied by.
/// visit(i, powers): 2^(score - maximum) of scores i and on, 0 from limit on.
template <class Visit>
HWY_INLINE float take_scores(SoftmaxRow& row, const float* scores, std::int64_t limit,
                             Visit visit) {
  const FloatTag d;
  const float infinity = std::numeric_limits<float>::infinity();
  const auto lowest = hn::Set(d, -infinity);
  auto highest = lowest;
  for (std::int64_t i = 0; i < limit; i += lanes()) {
    const auto score = load_visible(scores, i, limit, lowest);
    highest = hn::IfThenElse(hn::Gt(score, highest), score, highest);
  }
  const float maximum = std::max(row.maximum, hn::GetLane(hn::MaxOfLanes(d, highest)));
  const auto origin = hn::Set(d, maximum == -infinity ? 0.0f : maximum);
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < limit; i += lanes()) {
    const auto power = exp2_nonpositive(hn::Sub(load_visible(scores, i, limit, lowest), origin));
    sum = hn::Add(sum, power);
    visit(i, power);
  }
  const float correction = hn::GetLane(exp2_nonpositive(hn::Sub(hn::Set(d, row.maximum), origin)));
  row.maximum = maximum;
  row.sum = row.sum * correction + hn::GetLane(hn::SumOfLanes(d, sum));
  return correction;
}

/// The probability of scores, once the row's statistics are complete: 0 where nothing weighs
/// anything.
HWY_INLINE FloatVector probability_of(FloatVector scores, float maximum, float reciprocal) {
  const FloatTag d;
  const bool empty = maximum == -std::numeric_limits<float>::infinity();
  const auto origin = hn::Set(d, empty ? 0.0f : maximum);
  return hn::Mul(exp2_nonpositive(hn::Sub(scores, origin)), hn::Set(d, reciprocal));
}

inline float reciprocal_of(const SoftmaxRow& row) {
  return row.sum == 0.0f ? 0.0f : 1.0f / row.sum;
}

/// to[j][r] = from[r][j] for j < columns; rows of `to` are `to_stride` floats apart.
inline void transpose(const float* from, std::int64_t stride, std::int64_t num_rows,
                      std::int64_t columns, float* to, std::int64_t to_stride) {
  constexpr std::int64_t kTile = 16;  // a cache line of either
  for (std::int64_t row = 0; row < num_rows; row += kTile) {
    for (std::int64_t column = 0; column < columns; column += kTile) {
      for (std::int64_t j = column; j < std::min(column + kTile, columns); ++j) {
        for (std::int64_t r = row; r < std::min(row + kTile, num_rows); ++r) {
          to[j * to_stride + r] = from[r * stride + j];
        }
      }
    }
  }
}

/// Row (token, head) of a gradient, times `factor`.
inline void store_gradient(const TensorView& to, std::int64_t token, std::int64_t head,
                           const float* from, float factor) {
  void* const address = core::address_at(to, core::offset_of(to, token, head));
  for (std::int64_t i = 0; i < to.shape[2]; ++i) {
    const float value = from[i] * factor;
    switch (to.dtype) {
      case DType::bf16:
        static_cast<std::uint16_t*>(address)[i] = core::f32_to_bf16(value);
        break;
      case DType::f16:
        static_cast<std::uint16_t*>(address)[i] = core::f32_to_f16(value);
        break;
      default:
        static_cast<float*>(address)[i] = value;
    }
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
