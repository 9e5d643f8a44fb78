// SPDX-License-Identifier: Apache-2.0
#include "msa/kv_cache.hpp"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "core/tensor.hpp"
#include "msa/error.hpp"

namespace msa {
namespace {

std::vector<std::int32_t> pages_of(const PagedKvCache& cache, std::int64_t sequence) {
  const auto pages = cache.pages(sequence);
  return {pages.begin(), pages.end()};
}

template <class Call>
std::string error_text(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(PagedKvCache, TakesOnePagePerStartedBlock) {
  PagedKvCache cache(4, 16);
  const std::int64_t sequence = cache.create();
  EXPECT_EQ(cache.length(sequence), 0);
  EXPECT_FALSE(cache.append(sequence, 1));
  EXPECT_EQ(cache.pages(sequence).size(), 1u);
  EXPECT_FALSE(cache.append(sequence, 15));
  EXPECT_EQ(cache.pages(sequence).size(), 1u);
  EXPECT_FALSE(cache.append(sequence, 17));
  EXPECT_EQ(cache.pages(sequence).size(), 3u);
  EXPECT_EQ(cache.length(sequence), 33);
  EXPECT_EQ(cache.num_free_pages(), 1);
}

TEST(PagedKvCache, ForkSharesPagesAndCopiesAPartialOneOnAppend) {
  PagedKvCache cache(8, 16);
  const std::int64_t parent = cache.create();
  cache.append(parent, 40);
  const std::int64_t child = cache.fork(parent, 20);  // ends inside the second block
  EXPECT_EQ(cache.num_free_pages(), 5);
  EXPECT_EQ(pages_of(cache, child)[0], pages_of(cache, parent)[0]);
  EXPECT_EQ(pages_of(cache, child)[1], pages_of(cache, parent)[1]);

  const auto copy = cache.append(child, 1);
  ASSERT_TRUE(copy);
  EXPECT_EQ(copy->source_page, pages_of(cache, parent)[1]);
  EXPECT_EQ(copy->destination_page, pages_of(cache, child)[1]);
  EXPECT_EQ(copy->num_tokens, 4);
  EXPECT_NE(pages_of(cache, child)[1], pages_of(cache, parent)[1]);
  EXPECT_FALSE(cache.append(child, 1)) << "the page is the child's own now";
  EXPECT_FALSE(cache.append(parent, 1)) << "nobody else holds the parent's last page";
}

TEST(PagedKvCache, ForkAtABlockEdgeCopiesNothing) {
  PagedKvCache cache(4, 16);
  const std::int64_t parent = cache.create();
  cache.append(parent, 32);
  const std::int64_t child = cache.fork(parent, 16);
  EXPECT_FALSE(cache.append(child, 5));
  EXPECT_EQ(cache.length(child), 21);
  EXPECT_NE(pages_of(cache, child)[1], pages_of(cache, parent)[1]);
}

TEST(PagedKvCache, ReleaseFreesOnlyWhatNobodyElseHolds) {
  PagedKvCache cache(4, 16);
  const std::int64_t parent = cache.create();
  cache.append(parent, 32);
  const std::int64_t child = cache.fork(parent, 16);
  cache.release(parent);
  EXPECT_EQ(cache.num_free_pages(), 3);
  cache.release(child);
  EXPECT_EQ(cache.num_free_pages(), 4);
  EXPECT_EQ(error_text([&] { cache.release(child); }),
            "PagedKvCache::release: there is no sequence 1");
}

TEST(PagedKvCache, AppendWithoutRoomChangesNothing) {
  PagedKvCache cache(3, 16);
  const std::int64_t parent = cache.create();
  cache.append(parent, 24);
  const std::int64_t child = cache.fork(parent, 24);
  EXPECT_EQ(error_text([&] { cache.append(child, 9); }),
            "PagedKvCache::append: 9 tokens for sequence 1 need 2 pages, but 1 of 3 are free");
  EXPECT_EQ(cache.length(child), 24);
  EXPECT_EQ(pages_of(cache, child), pages_of(cache, parent));
  EXPECT_EQ(cache.num_free_pages(), 1);
}

TEST(PagedKvCache, TruncateGivesPagesBack) {
  PagedKvCache cache(4, 16);
  const std::int64_t sequence = cache.create();
  cache.append(sequence, 50);
  cache.truncate(sequence, 16);
  EXPECT_EQ(cache.pages(sequence).size(), 1u);
  EXPECT_EQ(cache.num_free_pages(), 3);
  EXPECT_EQ(error_text([&] { cache.truncate(sequence, 17); }),
            "PagedKvCache::truncate: num_tokens is 17, but sequence 0 has 16");
}

TEST(PagedKvCache, FillWritesTheBatch) {
  PagedKvCache cache(8, 16);
  const std::int64_t a = cache.create();
  const std::int64_t b = cache.create();
  cache.append(a, 17);
  cache.append(b, 3);
  core::Tensor page_table(DType::i32, {2, 3});
  core::Tensor seq_lens(DType::i32, {2});
  const std::int64_t batch[] = {b, a};
  cache.fill(batch, page_table, seq_lens);
  const auto table = page_table.span<std::int32_t>();
  EXPECT_EQ(std::vector<std::int32_t>(table.begin(), table.end()),
            (std::vector<std::int32_t>{cache.pages(b)[0], -1, -1, cache.pages(a)[0],
                                       cache.pages(a)[1], -1}));
  EXPECT_EQ(seq_lens.data<std::int32_t>()[0], 3);
  EXPECT_EQ(seq_lens.data<std::int32_t>()[1], 17);
  core::Tensor narrow(DType::i32, {2, 1});
  EXPECT_EQ(error_text([&] { cache.fill(batch, narrow, seq_lens); }),
            "PagedKvCache::fill: sequence 0 has 2 pages, page_table has 1 columns");
}

// A model of what the pages hold: tokens are numbers, pages are vectors. Whatever is forked,
// appended, truncated and released, each sequence must read its own tokens back.
TEST(PagedKvCache, RandomUseNeverMixesSequences) {
  constexpr std::int64_t kBlock = 4;
  PagedKvCache cache(32, kBlock);
  std::vector<std::vector<int>> memory(32, std::vector<int>(kBlock, -1));
  std::map<std::int64_t, std::vector<int>> expected;
  std::mt19937 random(7);
  int next_token = 0;
  for (int step = 0; step < 20000; ++step) {
    const auto pick = [&] {
      auto it = expected.begin();
      std::advance(it, random() % expected.size());
      return it->first;
    };
    const auto action = expected.empty() ? 0 : random() % 6;
    if (action == 0 && expected.size() < 8) {
      expected[cache.create()] = {};
    } else if (action == 1 && expected.size() < 8) {
      const std::int64_t parent = pick();
      const auto length = static_cast<std::int64_t>(random() % (expected[parent].size() + 1));
      const std::int64_t child = cache.fork(parent, length);
      expected[child] = {expected[parent].begin(), expected[parent].begin() + length};
    } else if (action == 2) {
      const std::int64_t sequence = pick();
      const auto length = static_cast<std::int64_t>(random() % (expected[sequence].size() + 1));
      cache.truncate(sequence, length);
      expected[sequence].resize(static_cast<std::size_t>(length));
    } else if (action == 3 && random() % 4 == 0) {
      const std::int64_t sequence = pick();
      cache.release(sequence);
      expected.erase(sequence);
    } else if (!expected.empty()) {
      const std::int64_t sequence = pick();
      const auto count = static_cast<std::int64_t>(random() % 9);
      std::optional<PageCopy> copy;
      try {
        copy = cache.append(sequence, count);
      } catch (const Error& error) {
        ASSERT_EQ(error.code(), ErrorCode::out_of_memory);
        continue;
      }
      if (copy) {
        auto& target = memory[static_cast<std::size_t>(copy->destination_page)];
        std::fill(target.begin(), target.end(), -1);
        std::copy_n(memory[static_cast<std::size_t>(copy->source_page)].begin(), copy->num_tokens,
                    target.begin());
      }
      auto& tokens = expected[sequence];
      for (std::int64_t i = 0; i < count; ++i) {
        const auto position = static_cast<std::int64_t>(tokens.size());
        const auto page = cache.pages(sequence)[static_cast<std::size_t>(position / kBlock)];
        memory[static_cast<std::size_t>(page)][static_cast<std::size_t>(position % kBlock)] =
            next_token;
        tokens.push_back(next_token++);
      }
    }
    std::set<std::int32_t> used;
    for (const auto& [sequence, tokens] : expected) {
      ASSERT_EQ(cache.length(sequence), static_cast<std::int64_t>(tokens.size()));
      const auto pages = cache.pages(sequence);
      used.insert(pages.begin(), pages.end());
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        ASSERT_EQ(memory[static_cast<std::size_t>(pages[i / kBlock])][i % kBlock], tokens[i])
            << "step " << step << ", sequence " << sequence << ", token " << i;
      }
    }
    ASSERT_EQ(cache.num_free_pages(), 32 - static_cast<std::int64_t>(used.size()));
  }
}

}  // namespace
}  // namespace msa
