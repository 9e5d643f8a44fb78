// SPDX-License-Identifier: Apache-2.0
//
// The top-k blocks of one row of scores. Included once per SIMD target.
#if defined(MSA_CPU_SELECT_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef MSA_CPU_SELECT_INL_HPP_
#undef MSA_CPU_SELECT_INL_HPP_
#else
#define MSA_CPU_SELECT_INL_HPP_
#endif

#include <hwy/highway.h>

#include <functional>

#include "cpu/support.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using ScoreTag = hn::CappedTag<float, kMaxLanes>;
using KeyTag = hn::Repartition<std::int32_t, ScoreTag>;

/// Integers in the order of the scores: NaN lowest, then -inf; -0 equals +0.
HWY_INLINE hn::Vec<KeyTag> keys_of(hn::Vec<ScoreTag> scores) {
  const ScoreTag d;
  const KeyTag di;
  const auto bits = hn::BitCast(di, hn::Add(scores, hn::Zero(d)));
  const auto flipped = hn::And(hn::ShiftRight<31>(bits), hn::Set(di, 0x7fffffff));
  const auto lowest = hn::Set(di, std::numeric_limits<std::int32_t>::min());
  return hn::IfThenElse(hn::RebindMask(di, hn::IsNaN(scores)), lowest, hn::Xor(bits, flipped));
}

/// One number that is greater for the better block: by key, then by the lower id.
HWY_INLINE std::uint64_t rank_of(std::int32_t key, std::int64_t block) {
  const std::uint32_t ordered = static_cast<std::uint32_t>(key) ^ 0x80000000u;
  return static_cast<std::uint64_t>(ordered) << 32 |
         (0xffffffffu - static_cast<std::uint32_t>(block));
}
HWY_INLINE std::int32_t key_of(std::uint64_t rank) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(rank >> 32) ^ 0x80000000u);
}
HWY_INLINE std::int32_t block_of(std::uint64_t rank) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(rank));
}

/// The `count` best blocks of [begin, end), which has more, as a heap in `best` whose front is the
/// worst of them. One scan that compares whole vectors with that front: O(end - begin) while few
/// blocks beat it, which is k * ln(n / k) of n in random order.
HWY_INLINE void scan_best(const float* HWY_RESTRICT scores, std::int64_t begin, std::int64_t end,
                          std::int64_t count, std::uint64_t* HWY_RESTRICT best) {
  const ScoreTag d;
  const KeyTag di;
  const auto n = static_cast<std::int64_t>(hn::Lanes(d));
  const std::greater<> worst_first;
  HWY_ALIGN float partial[kMaxLanes];
  HWY_ALIGN std::int32_t keys[kMaxLanes];
  std::int64_t filled = 0;
  for (std::int64_t block = begin; block < end; block += n) {
    const std::int64_t valid = std::min(n, end - block);
    const float* from = scores + block;
    if (valid < n) {
      std::copy_n(from, valid, partial);
      std::fill_n(partial + valid, n - valid, 0.0f);
      from = partial;
    }
    const auto key = keys_of(hn::LoadU(d, from));
    if (filled == count && hn::AllFalse(di, hn::Gt(key, hn::Set(di, key_of(best[0]))))) continue;
    hn::Store(key, di, keys);
    for (std::int64_t i = 0; i < valid; ++i) {
      if (filled < count) {
        best[filled++] = rank_of(keys[i], block + i);
        if (filled == count) std::make_heap(best, best + count, worst_first);
      } else if (keys[i] > key_of(best[0])) {  // an equal key has the higher id and loses
        std::pop_heap(best, best + count, worst_first);
        best[count - 1] = rank_of(keys[i], block + i);
        std::push_heap(best, best + count, worst_first);
      }
    }
  }
}

/// Writes the selection of a query that sees `visible` blocks into ids[0, top_k), ascending, then
/// -1. `best` holds top_k numbers.
HWY_INLINE void select_row(const float* scores, std::int64_t visible, const Problem& p,
                           std::uint64_t* best, std::int32_t* ids) {
  std::int64_t filled = 0;
  const auto take_range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      ids[filled++] = static_cast<std::int32_t>(block);
    }
  };
  if (visible <= p.top_k) {
    take_range(0, visible);
    std::fill(ids + filled, ids + p.top_k, -1);
    return;
  }
  // More blocks than slots, and slots for all forced ones: init and local blocks don't overlap.
  const std::int64_t local = visible - p.num_local_blocks;
  const std::int64_t count = p.top_k - p.num_init_blocks - p.num_local_blocks;
  take_range(0, p.num_init_blocks);
  if (count > 0) {
    scan_best(scores, p.num_init_blocks, local, count, best);
    for (std::int64_t i = 0; i < count; ++i) ids[filled + i] = block_of(best[i]);
    std::sort(ids + filled, ids + filled + count);
    filled += count;
  }
  take_range(local, visible);
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
