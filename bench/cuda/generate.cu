// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "bench/cuda/generate.hpp"
#include "cuda/common/launch.hpp"

namespace msa::bench {
namespace {

// Streams of random numbers that must not meet.
enum Stream : std::uint32_t { kValues, kFixed, kStart, kStep, kMean };

__device__ std::uint32_t mixed(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/// N(0, 1) number (i, j) of a stream.
__device__ float normal(std::uint64_t seed, Stream stream, std::uint64_t i, std::uint32_t j) {
  std::uint32_t x = mixed(static_cast<std::uint32_t>(seed) + 0x9e3779b9u * stream);
  x = mixed(x ^ static_cast<std::uint32_t>(i >> 32));
  x = mixed(x + static_cast<std::uint32_t>(i));
  x = mixed(x ^ (j * 0x85ebca6bu + 0xc2b2ae35u));
  const std::uint32_t y = mixed(x + 0x68bc21ebu);
  const float radius = sqrtf(-2.0f * __logf((static_cast<float>(x >> 8) + 0.5f) * 0x1p-24f));
  return radius * __cosf(6.2831853f * static_cast<float>(y >> 8) * 0x1p-24f);
}

template <class T>
__global__ void normal_kernel(T* values, std::int64_t count, std::uint64_t seed) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    values[i] = static_cast<T>(normal(seed, kValues, static_cast<std::uint64_t>(i), 0));
  }
}

/// What a family is made of, in f32.
struct Walk {
  float a, b, rho, fresh;
};

Walk walk_of(const SelectionFamily& family) {
  return {.a = static_cast<float>(family.a),
          .b = static_cast<float>(std::sqrt(1.0 - family.a * family.a)),
          .rho = static_cast<float>(family.rho),
          .fresh = static_cast<float>(std::sqrt(1.0 - family.rho * family.rho))};
}

/// A CTA makes one run, a thread one element of every token's row.
template <class T>
__global__ void index_query_kernel(T* index_q, std::int64_t tokens, int width, Walk walk,
                                   std::uint64_t seed) {
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kRunTokens;
  const std::int64_t end = begin + kRunTokens < tokens ? begin + kRunTokens : tokens;
  for (std::uint32_t i = threadIdx.x; i < static_cast<std::uint32_t>(width); i += blockDim.x) {
    const float u = normal(seed, kFixed, 0, i);
    float w = normal(seed, kStart, blockIdx.x, i);
    for (std::int64_t t = begin; t < end; ++t) {
      w = walk.rho * w + walk.fresh * normal(seed, kStep, static_cast<std::uint64_t>(t), i);
      index_q[t * width + i] = static_cast<T>(walk.a * u + walk.b * w);
    }
  }
}

template <class T>
__global__ void index_key_kernel(T* index_k, std::int64_t count, int page_elements, int dim,
                                 float c, std::uint64_t seed) {
  const float noise = sqrtf(1.0f - c * c);
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const float mean = normal(seed, kMean, static_cast<std::uint64_t>(i / page_elements),
                              static_cast<std::uint32_t>(i % dim));
    index_k[i] =
        static_cast<T>(c * mean + noise * normal(seed, kValues, static_cast<std::uint64_t>(i), 1));
  }
}

/// Calls run(T{}) with the element type of a dtype.
template <class Run>
void with_type(DType dtype, Run run) {
  if (dtype == DType::bf16) return run(__nv_bfloat16{});
  MSA_CHECK(dtype == DType::e4m3, "bench inputs of ", name_of(dtype));
  run(__nv_fp8_e4m3{});
}

constexpr int kThreads = 256;
constexpr unsigned kFillCtas = 132 * 16;

constexpr int kSelectThreads = 256;
constexpr int kMaxPerThread = 32;  ///< blocks of one thread: a bit each
constexpr int kMaxTopK = 64;

/// Order-preserving bits of a score, above the bits that prefer the lower block.
__device__ unsigned long long key_of(float score, int block) {
  const std::uint32_t bits = __float_as_uint(score);
  const std::uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - block);
}

/// A CTA makes one run of one head: thread i has the blocks i, i + kSelectThreads, ...
__global__ void __launch_bounds__(kSelectThreads)
    selection_kernel(std::int32_t* block_ids, std::int64_t seq_len_q, std::int64_t seq_len_k,
                     int block_size, int top_k, Walk walk, std::uint64_t seed) {
  extern __shared__ float scores[];  // u, then w
  __shared__ unsigned long long warp_best[kSelectThreads / 32];
  __shared__ std::int32_t chosen[kMaxTopK];
  const auto thread = static_cast<int>(threadIdx.x);
  const std::uint64_t head = blockIdx.y;
  const std::int64_t num_blocks = (seq_len_k + block_size - 1) / block_size;
  float* const u = scores;
  float* const w = scores + num_blocks;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kRunTokens;
  const std::int64_t end = begin + kRunTokens < seq_len_q ? begin + kRunTokens : seq_len_q;
  const std::int64_t first = seq_len_k - seq_len_q;
  const auto last_local = static_cast<int>((first + end - 1) / block_size);
  for (int i = thread; i < last_local; i += kSelectThreads) {
    u[i] = normal(seed, kFixed, head, static_cast<std::uint32_t>(i));
    w[i] = normal(seed, kStart, head << 32 | blockIdx.x, static_cast<std::uint32_t>(i));
  }
  for (std::int64_t t = begin; t < end; ++t) {
    const auto local = static_cast<int>((first + t) / block_size);
    const int history = local < top_k - 1 ? local : top_k - 1;
    for (int i = thread; i < last_local; i += kSelectThreads) {
      w[i] = walk.rho * w[i] + walk.fresh * normal(seed, kStep,
                                                   head << 40 | static_cast<std::uint64_t>(t),
                                                   static_cast<std::uint32_t>(i));
    }
    std::uint32_t taken = 0;
    const auto best_of_thread = [&] {
      unsigned long long best = 0;
      for (int i = thread, bit = 0; i < local; i += kSelectThreads, ++bit) {
        if (taken >> bit & 1) continue;
        const unsigned long long key = key_of(walk.a * u[i] + walk.b * w[i], i);
        best = key > best ? key : best;
      }
      return best;
    };
    unsigned long long mine = best_of_thread();
    for (int slot = 0; slot < history; ++slot) {
      unsigned long long best = mine;
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, lanes);
        best = other > best ? other : best;
      }
      __syncthreads();  // the last slot's readers are through
      if (thread % 32 == 0) warp_best[thread / 32] = best;
      __syncthreads();
      for (const unsigned long long other : warp_best) best = other > best ? other : best;
      if (best == mine) {
        const auto block = static_cast<int>(0xffffffffu - static_cast<std::uint32_t>(best));
        chosen[slot] = block;
        taken |= 1u << (block / kSelectThreads);
        mine = best_of_thread();
      }
    }
    __syncthreads();
    // Ascending: each id's place is the number of smaller ones.
    std::int32_t* const row = block_ids + (static_cast<std::int64_t>(head) * seq_len_q + t) * top_k;
    if (thread < top_k) {
      if (thread < history) {
        int place = 0;
        for (int i = 0; i < history; ++i) place += chosen[i] < chosen[thread] ? 1 : 0;
        row[place] = chosen[thread];
      } else {
        row[thread] = thread == history ? local : -1;
      }
    }
    __syncthreads();
  }
}

/// sums[0]: attended tokens; sums[1 + 2 n], [2 + 2 n]: distinct ids of windows of 2 << n tokens,
/// and ids of all their tokens.
__global__ void facts_kernel(const std::int32_t* block_ids, std::int64_t seq_len_q,
                             std::int64_t first, int block_size, int top_k,
                             unsigned long long* sums) {
  const std::int64_t rows = seq_len_q;
  const std::int64_t window = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (window >= (rows + 7) / 8) return;
  const std::int32_t* const ids =
      block_ids + (static_cast<std::int64_t>(blockIdx.y) * rows + window * 8) * top_k;
  const auto count = static_cast<int>(rows - window * 8 < 8 ? rows - window * 8 : 8);
  unsigned long long attended = 0;
  unsigned long long distinct[3] = {};
  unsigned long long all[3] = {};
  for (int t = 0; t < count; ++t) {
    const std::int64_t position = first + window * 8 + t;
    for (int slot = 0; slot < top_k; ++slot) {
      const std::int32_t id = ids[t * top_k + slot];
      if (id < 0) continue;
      const std::int64_t tokens = position + 1 - static_cast<std::int64_t>(id) * block_size;
      attended += static_cast<unsigned long long>(tokens < block_size ? tokens : block_size);
      for (int n = 0; n < 3; ++n) {
        const int size = 2 << n;
        if (t / size * size + size > count) continue;  // whole windows only
        bool seen = false;
        for (int before = t / size * size; before < t && !seen; ++before) {
          for (int other = 0; other < top_k; ++other) seen |= ids[before * top_k + other] == id;
        }
        distinct[n] += seen ? 0 : 1;
        ++all[n];
      }
    }
  }
  atomicAdd(&sums[0], attended);
  for (int n = 0; n < 3; ++n) {
    atomicAdd(&sums[1 + 2 * n], distinct[n]);
    atomicAdd(&sums[2 + 2 * n], all[n]);
  }
}

}  // namespace

void fill_normal(const DeviceTensor& tensor, std::uint64_t seed) {
  with_type(tensor.view().dtype, [&]<class T>(T) {
    cuda::launch(normal_kernel<T>, {.grid = dim3(kFillCtas), .threads = kThreads}, nullptr,
                 tensor.data<T>(), tensor.view().num_elements(), seed);
  });
}

void fill_index_queries(const DeviceTensor& index_q, const SelectionFamily& family,
                        std::uint64_t seed) {
  const TensorView& view = index_q.view();
  const auto runs = static_cast<unsigned>((view.shape[0] + kRunTokens - 1) / kRunTokens);
  with_type(view.dtype, [&]<class T>(T) {
    cuda::launch(index_query_kernel<T>, {.grid = dim3(runs), .threads = 512}, nullptr,
                 index_q.data<T>(), view.shape[0], static_cast<int>(view.shape[1] * view.shape[2]),
                 walk_of(family), seed);
  });
}

void fill_index_keys(const DeviceTensor& index_k, const SelectionFamily& family,
                     std::uint64_t seed) {
  const TensorView& view = index_k.view();
  with_type(view.dtype, [&]<class T>(T) {
    cuda::launch(index_key_kernel<T>, {.grid = dim3(kFillCtas), .threads = kThreads}, nullptr,
                 index_k.data<T>(), view.num_elements(),
                 static_cast<int>(view.shape[2] * view.shape[3]), static_cast<int>(view.shape[3]),
                 family.a > 0.0 ? 0.9f : 0.0f, seed);
  });
}

void fill_page_table(const DeviceTensor& page_table, std::uint64_t seed) {
  std::vector<std::int32_t> pages(static_cast<std::size_t>(page_table.view().num_elements()));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937_64(seed));
  MSA_CUDA_CHECK(cudaMemcpy(page_table.data<std::int32_t>(), pages.data(), page_table.size(),
                            cudaMemcpyHostToDevice));
}

void fill_selection(const DeviceTensor& block_ids, const SelectionFamily& family,
                    const Problem& problem, std::int64_t seq_len_k, std::uint64_t seed) {
  const TensorView& view = block_ids.view();
  const std::int64_t num_blocks = (seq_len_k + problem.block_size - 1) / problem.block_size;
  MSA_CHECK(num_blocks <= kSelectThreads * kMaxPerThread && problem.top_k <= kMaxTopK,
            "a selection of ", problem.top_k, " of ", num_blocks, " blocks");
  const auto runs = static_cast<unsigned>((view.shape[1] + kRunTokens - 1) / kRunTokens);
  cuda::launch(selection_kernel,
               {.grid = dim3(runs, static_cast<unsigned>(view.shape[0])),
                .threads = kSelectThreads,
                .smem_bytes = 2 * sizeof(float) * static_cast<std::size_t>(num_blocks)},
               nullptr, block_ids.data<std::int32_t>(), view.shape[1], seq_len_k,
               problem.block_size, problem.top_k, walk_of(family), seed);
}

SelectionFacts facts_of(const DeviceTensor& block_ids, const Problem& problem,
                        std::int64_t seq_len_k) {
  const TensorView& view = block_ids.view();
  const DeviceMemory sums(7 * sizeof(unsigned long long));
  MSA_CUDA_CHECK(cudaMemset(sums.data(), 0, sums.size()));
  const std::int64_t windows = (view.shape[1] + 7) / 8;
  cuda::launch(facts_kernel,
               {.grid = dim3(static_cast<unsigned>((windows + kThreads - 1) / kThreads),
                             static_cast<unsigned>(view.shape[0])),
                .threads = kThreads},
               nullptr, static_cast<const std::int32_t*>(block_ids.data<std::int32_t>()),
               view.shape[1], seq_len_k - view.shape[1], problem.block_size, problem.top_k,
               reinterpret_cast<unsigned long long*>(sums.data()));
  unsigned long long host[7] = {};
  MSA_CUDA_CHECK(cudaMemcpy(host, sums.data(), sizeof(host), cudaMemcpyDeviceToHost));
  const auto overlap = [&](int n) {
    const auto all = static_cast<double>(host[2 + 2 * n]);
    return all == 0.0 ? 0.0 : (2 << n) * static_cast<double>(host[1 + 2 * n]) / all;
  };
  return {.attended_tokens = static_cast<double>(host[0]),
          .overlap2 = overlap(0),
          .overlap4 = overlap(1),
          .overlap8 = overlap(2)};
}

}  // namespace msa::bench
