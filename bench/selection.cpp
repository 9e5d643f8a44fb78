// SPDX-License-Identifier: Apache-2.0
#include "bench/selection.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

namespace msa::bench {

Selection make_selection(const SelectionFamily& family, const Problem& problem,
                         std::int64_t seq_len_q, std::int64_t seq_len_k, std::uint64_t seed) {
  const std::int64_t num_blocks = (seq_len_k + problem.block_size - 1) / problem.block_size;
  const auto blocks = static_cast<std::size_t>(num_blocks);
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Selection selection;
  selection.block_ids.assign(
      static_cast<std::size_t>(problem.num_kv_heads * seq_len_q * problem.top_k), -1);
  const auto a = static_cast<float>(family.a);
  const auto b = static_cast<float>(std::sqrt(1.0 - family.a * family.a));
  const auto rho = static_cast<float>(family.rho);
  const auto fresh = static_cast<float>(std::sqrt(1.0 - family.rho * family.rho));
  std::int64_t distinct_of_4 = 0;
  std::int64_t counted_of_4 = 0;
  std::vector<float> u(blocks), w(blocks), score(blocks);
  std::vector<std::int32_t> order(blocks);
  std::set<std::int32_t> window;
  std::int32_t* row = selection.block_ids.data();
  for (int head = 0; head < problem.num_kv_heads; ++head) {
    for (std::size_t i = 0; i < blocks; ++i) {
      u[i] = normal(random);
      w[i] = normal(random);
    }
    for (std::int64_t t = 0; t < seq_len_q; ++t, row += problem.top_k) {
      for (std::size_t i = 0; i < blocks; ++i) {
        w[i] = rho * w[i] + fresh * normal(random);
        score[i] = a * u[i] + b * w[i];
      }
      const std::int64_t local = (seq_len_k - seq_len_q + t) / problem.block_size;
      const std::int64_t history = std::min<std::int64_t>(problem.top_k - 1, local);
      std::iota(order.begin(), order.begin() + local, 0);
      std::nth_element(order.begin(), order.begin() + history, order.begin() + local,
                       [&](std::int32_t x, std::int32_t y) {
                         return score[static_cast<std::size_t>(x)] >
                                score[static_cast<std::size_t>(y)];
                       });
      std::copy_n(order.begin(), history, row);
      std::sort(row, row + history);
      row[history] = static_cast<std::int32_t>(local);
      window.insert(row, row + history + 1);
      counted_of_4 += history + 1;
      if (t % 4 == 3) {
        distinct_of_4 += static_cast<std::int64_t>(window.size());
        window.clear();
      }
    }
    window.clear();
  }
  if (seq_len_q >= 4) {
    selection.overlap4 =
        4.0 * static_cast<double>(distinct_of_4) / static_cast<double>(counted_of_4);
  }
  return selection;
}

}  // namespace msa::bench
