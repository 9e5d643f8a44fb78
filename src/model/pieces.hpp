// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/thread_pool.hpp"

namespace msa::model {

/// Elements per task such that a task takes some 30 us, about what waking a thread costs.
inline constexpr std::int64_t kElementsOfAdd = 1 << 18;
inline constexpr std::int64_t kElementsOfNorm = 1 << 16;
inline constexpr std::int64_t kElementsOfSwiglu = 1 << 15;
inline constexpr std::int64_t kElementsOfSines = 1 << 11;

/// Calls body(begin, end) on pieces of [0, count), on all threads; a piece has about `elements`
/// elements in rows of `width`.
template <class Body>
void for_each_piece(std::int64_t count, std::int64_t width, std::int64_t elements, Body body) {
  const std::int64_t piece = std::max<std::int64_t>(elements / std::max<std::int64_t>(width, 1), 1);
  core::parallel_for((count + piece - 1) / piece, [&](std::int64_t index, int) {
    body(index * piece, std::min((index + 1) * piece, count));
  });
}

}  // namespace msa::model
