// SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "msa/backend.hpp"
#include "msa/error.hpp"

namespace msa::core {
namespace {

class ThreadPool : public ::testing::Test {
 protected:
  void TearDown() override { set_num_threads(initial_); }
  int initial_ = num_threads();
};

TEST_F(ThreadPool, RunsEveryIndexOnce) {
  for (const int threads : {1, 2, 5}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    for (const std::int64_t count : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(count));
      std::atomic<bool> worker_in_range = true;
      parallel_for(count, [&](std::int64_t index, int worker) {
        ++visits[static_cast<std::size_t>(index)];
        if (worker < 0 || worker >= threads) worker_in_range = false;
      });
      for (const auto& visit : visits) EXPECT_EQ(visit, 1);
      EXPECT_TRUE(worker_in_range);
    }
  }
}

TEST_F(ThreadPool, OneWorkerIdIsNeverUsedByTwoThreadsAtOnce) {
  set_num_threads(4);
  std::vector<std::atomic<int>> inside(4);
  std::atomic<bool> overlap = false;
  parallel_for(2000, [&](std::int64_t, int worker) {
    if (++inside[static_cast<std::size_t>(worker)] != 1) overlap = true;
    --inside[static_cast<std::size_t>(worker)];
  });
  EXPECT_FALSE(overlap);
}

TEST_F(ThreadPool, OneThreadKeepsTheOrder) {
  set_num_threads(1);
  std::vector<std::int64_t> order;
  parallel_for(5, [&](std::int64_t index, int) { order.push_back(index); });
  EXPECT_EQ(order, (std::vector<std::int64_t>{0, 1, 2, 3, 4}));
}

TEST_F(ThreadPool, ManyShortRegionsInARow) {
  set_num_threads(3);
  std::atomic<std::int64_t> sum = 0;
  for (int i = 0; i < 500; ++i) {
    parallel_for(3, [&](std::int64_t index, int) { sum += index; });
  }
  EXPECT_EQ(sum, 500 * 3);
}

TEST_F(ThreadPool, TwoCallersTakeTurns) {
  set_num_threads(2);
  std::atomic<std::int64_t> sum = 0;
  const auto caller = [&sum] {
    for (int i = 0; i < 50; ++i) parallel_for(100, [&](std::int64_t, int) { ++sum; });
  };
  std::thread other(caller);
  caller();
  other.join();
  EXPECT_EQ(sum, 2 * 50 * 100);
}

TEST_F(ThreadPool, RefusesNonsense) {
  for (const int count : {0, -3, 1025}) {
    try {
      set_num_threads(count);
      FAIL() << count;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_EQ(std::string(error.what()), "set_num_threads: num_threads is " +
                                               std::to_string(count) + ", expected 1 to 1024");
    }
  }
  EXPECT_EQ(num_threads(), initial_);
}

}  // namespace
}  // namespace msa::core
