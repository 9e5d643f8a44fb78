// SPDX-License-Identifier: Apache-2.0
//
// 2^x for x <= 0: the only exponential that softmax needs. Included once per SIMD target.
#if defined(MSA_CPU_EXP2_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_EXP2_INL_HPP_
#undef MSA_CPU_EXP2_INL_HPP_
#else
#define MSA_CPU_EXP2_INL_HPP_
#endif

#include <hwy/highway.h>

#include "cpu/support.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::CappedTag<float, kMaxLanes>;
using FloatVector = hn::Vec<FloatTag>;

/// 2^x for x <= 0 and NaN (which stays NaN); 2^0 is exactly 1, -inf and x < -126 give 0. Relative
/// error below 4 * 2^-24 with FMA: x = n + f with |f| <= 1/2 is exact; the polynomial is within
/// 1.6 * 2^-24 of 2^f (a minimax fit that meets 1 at f = 0, in f32 coefficients); Horner's last
/// steps round by at most (1 + |f| * (0.7 + ...)) / 2^f * 2^-24 < 2.2 * 2^-24; scaling is exact.
HWY_INLINE FloatVector exp2_nonpositive(FloatVector x) {
  const FloatTag d;
  const hn::Repartition<std::int32_t, FloatTag> di;
  // In [2^23, 2^24) floats are integers: adding this rounds x to nearest and leaves n + 127, the
  // biased exponent, in the low bits.
  const auto magic = hn::Set(d, 0x1.8p23f + 127.0f);
  const auto shifted = hn::Add(x, magic);
  const auto f = hn::Sub(x, hn::Sub(shifted, magic));
  auto p = hn::Set(d, 0x1.5bda56p-10f);
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.3ce8aep-7f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.c6b6d8p-5f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.ebf9c2p-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 0x1.62e42ap-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto power = hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
  // A product, not an integer addition: whatever bits a NaN gave `power`, NaN times it is NaN.
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::Mul(p, power));
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
