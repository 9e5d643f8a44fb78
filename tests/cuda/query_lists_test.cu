// SPDX-License-Identifier: Apache-2.0
//
// The lists of queries of each KV block, against a walk over block_ids on the host.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "cuda/common/query_lists.cuh"
#include "tests/cuda/device_array.hpp"

namespace msa::testing {
namespace {

struct Lengths {
  std::int32_t q = 0;
  std::int32_t k = 0;
};

struct Shape {
  std::vector<Lengths> sequences{};
  int num_kv_heads = 2;
  int block_size = 16;
  int top_k = 4;
  int chunk = 0;  ///< of queries; 0: what the layout chooses
};

/// Block ids of all kinds: visible, beyond, negative, twice in a row.
std::vector<std::int32_t> random_ids(const Shape& shape, std::int64_t total_q) {
  std::mt19937 random(7);
  std::vector<std::int32_t> ids;
  for (int head = 0; head < shape.num_kv_heads; ++head) {
    for (const Lengths& lengths : shape.sequences) {
      const int blocks = lengths.k / shape.block_size + 3;
      for (int i = 0; i < lengths.q; ++i) {
        for (int slot = 0; slot < shape.top_k; ++slot) {
          const auto draw = static_cast<int>(random() % 16);
          if (draw == 0) {
            ids.push_back(-1);
          } else if (draw == 1) {
            ids.push_back(random() % 2 == 0 ? INT32_MAX : INT32_MIN);
          } else if (draw == 2 && slot > 0) {
            ids.push_back(ids.back());
          } else if (draw < 8) {
            ids.push_back(0);  // a block that most queries attend
          } else {
            ids.push_back(static_cast<int>(random() % static_cast<unsigned>(blocks)));
          }
        }
      }
    }
  }
  EXPECT_EQ(ids.size(), static_cast<std::size_t>(total_q * shape.num_kv_heads * shape.top_k));
  return ids;
}

struct Found {
  std::int32_t exists, block, k_begin, num_tokens;
  std::int64_t count, first, last;
};

__global__ void find_kernel(const __grid_constant__ cuda::DeviceBatch batch,
                            const __grid_constant__ cuda::QueryLists lists, int num_heads,
                            Found* found) {
  const std::int64_t bin = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  const cuda::KeyBlock key_block = cuda::key_block_of_bin(batch, bin);
  const cuda::QueryList list = cuda::queries(batch, lists, head, bin, key_block);
  Found& to = found[bin * num_heads + head];
  to.exists = key_block.exists ? 1 : 0;
  to.block = static_cast<std::int32_t>(key_block.block);
  to.k_begin = static_cast<std::int32_t>(key_block.sequence.k_begin);
  to.num_tokens = key_block.exists ? key_block.num_tokens(batch.block_size) : 0;
  to.count = list.count;
  to.first = list.count > 0 ? list[0] : -1;
  to.last = list.count > 0 ? list[list.count - 1] : -1;
}

void check(const Shape& shape, bool dense) {
  std::vector<std::int32_t> q_offsets{0};
  std::vector<std::int32_t> k_offsets{0};
  for (const Lengths& lengths : shape.sequences) {
    q_offsets.push_back(q_offsets.back() + lengths.q);
    k_offsets.push_back(k_offsets.back() + lengths.k);
  }
  const std::int64_t total_q = q_offsets.back();
  const std::int64_t total_k = k_offsets.back();
  const auto batch_size = static_cast<std::int64_t>(shape.sequences.size());
  const std::vector<std::int32_t> ids = random_ids(shape, total_q);
  const DeviceArray<std::int32_t> device_ids(ids);
  const DeviceArray<std::int32_t> device_q(q_offsets);
  const DeviceArray<std::int32_t> device_k(k_offsets);
  SparseAttentionBackward args;
  args.problem = {.num_q_heads = shape.num_kv_heads,
                  .num_kv_heads = shape.num_kv_heads,
                  .block_size = shape.block_size,
                  .top_k = shape.top_k};
  const auto view = [](const void* data, DType dtype, std::initializer_list<std::int64_t> extents) {
    return TensorView::contiguous(const_cast<void*>(data), dtype, {DeviceType::cuda, 0}, extents);
  };
  args.batch.cu_seqlens_q = view(device_q.data(), DType::i32, {batch_size + 1});
  args.batch.cu_seqlens_k = view(device_k.data(), DType::i32, {batch_size + 1});
  // Only shapes are looked at.
  args.q = view(device_q.data(), DType::f32, {total_q, shape.num_kv_heads, 1});
  args.k = view(device_q.data(), DType::f32, {total_k, shape.num_kv_heads, 1});
  if (!dense) {
    args.block_ids =
        view(device_ids.data(), DType::i32, {shape.num_kv_heads, total_q, shape.top_k});
  }
  core::WorkspaceLayout counted;
  cuda::lay_out_query_lists(args, counted);
  const DeviceArray<std::uint8_t> memory(std::vector<std::uint8_t>(counted.bytes() + 4096, 0xff));
  core::WorkspaceLayout layout(reinterpret_cast<std::byte*>(memory.data()));
  cuda::QueryListBuild build = cuda::lay_out_query_lists(args, layout);
  if (shape.chunk != 0) {  // longer ones need less memory
    ASSERT_GE(shape.chunk, build.chunk);
    build.chunk = shape.chunk;
    build.num_chunks = cuda::ceil_div(total_q, shape.chunk);
  }
  const DeviceStream stream;
  cuda::build_query_lists(build, static_cast<cudaStream_t>(stream.stream().handle));
  stream.wait();
  const cuda::QueryLists lists = build.lists();
  const int heads = shape.num_kv_heads;
  const DeviceArray<Found> found(
      std::vector<Found>(static_cast<std::size_t>(lists.num_bins * heads) + 1));
  run_kernel(find_kernel,
             {.grid = dim3(static_cast<unsigned>(lists.num_bins), static_cast<unsigned>(heads)),
              .threads = 1},
             build.batch, lists, heads, found.data());
  const std::vector<Found> places = found.values();
  const std::vector<std::uint8_t> bytes = memory.values();
  for (std::size_t i = counted.bytes(); i < bytes.size(); ++i) ASSERT_EQ(bytes[i], 0xff);
  const auto load = [&](const std::int32_t* from, std::int64_t i) {
    std::int32_t value = 0;
    const auto at = reinterpret_cast<const std::uint8_t*>(from + i) - memory.data();
    std::memcpy(&value, bytes.data() + at, sizeof(value));
    return value;
  };

  std::int64_t existing = 0;
  for (std::int64_t b = 0; b < batch_size; ++b) {
    const Lengths& lengths = shape.sequences[static_cast<std::size_t>(b)];
    const std::int32_t k_begin = k_offsets[static_cast<std::size_t>(b)];
    const std::int32_t q_begin = q_offsets[static_cast<std::size_t>(b)];
    for (int block = 0; block * shape.block_size < lengths.k; ++block) {
      const std::int64_t bin = k_begin / shape.block_size + b + block;
      ASSERT_LT(bin, lists.num_bins);
      ++existing;
      for (int head = 0; head < heads; ++head) {
        std::set<std::int64_t> expected;
        for (int i = 0; i < lengths.q; ++i) {
          const int position = lengths.k - lengths.q + i;
          if (position < block * shape.block_size) continue;
          bool attends = dense;
          for (int slot = 0; slot < shape.top_k; ++slot) {
            attends = attends || ids[static_cast<std::size_t>(
                                     (head * total_q + q_begin + i) * shape.top_k + slot)] == block;
          }
          if (attends) expected.insert(q_begin + i);
        }
        SCOPED_TRACE(core::concat("sequence ", b, " block ", block, " head ", head));
        const Found& place = places[static_cast<std::size_t>(bin * heads + head)];
        EXPECT_EQ(place.exists, 1);
        EXPECT_EQ(place.block, block);
        EXPECT_EQ(place.k_begin, k_begin);
        EXPECT_EQ(place.num_tokens,
                  std::min(shape.block_size, lengths.k - block * shape.block_size));
        ASSERT_EQ(place.count, static_cast<std::int64_t>(expected.size()));
        EXPECT_EQ(place.first, expected.empty() ? -1 : *expected.begin());
        EXPECT_EQ(place.last, expected.empty() ? -1 : *expected.rbegin());
        if (dense) continue;
        std::int64_t at = load(lists.begins, head * (lists.num_bins + 1) + bin);
        for (const std::int64_t row : expected) {
          ASSERT_EQ(load(lists.rows, head * lists.rows_per_head + at++), row);
        }
      }
    }
  }
  std::int64_t seen = 0;
  for (const Found& place : places) {
    seen += place.exists;
    if (place.exists == 0) EXPECT_EQ(place.count, 0);
  }
  EXPECT_EQ(seen, existing * heads);
}

TEST(QueryLists, HoldEveryVisiblePairOnceInOrder) {
  const std::vector<Shape> shapes = {
      {.sequences = {{33, 33}, {0, 0}, {0, 20}, {18, 50}, {9, 4}, {3, 0}, {1, 1}}},
      {.sequences = {{1, 1}}, .num_kv_heads = 1, .top_k = 1},
      {.sequences = {{1537, 1600}, {0, 17}, {700, 5000}}, .top_k = 7},
      {.sequences = {{2000, 2000}}, .num_kv_heads = 3, .block_size = 128, .top_k = 16},
      {.sequences = {{0, 100}}},
      // More bins than shared memory has bits for at a time.
      {.sequences = {{600, 40'000}, {40, 16}}, .top_k = 5},
      {.sequences = {{3000, 9000}, {100, 700}}, .num_kv_heads = 1, .top_k = 9, .chunk = 2048},
      {.sequences = {{9000, 9000}}, .num_kv_heads = 1, .top_k = 3, .chunk = 8192}};
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    for (const bool dense : {false, true}) {
      SCOPED_TRACE(core::concat("shape ", i, dense ? ", dense" : ""));
      check(shapes[i], dense);
    }
  }
}

}  // namespace
}  // namespace msa::testing
