// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>

#include "cuda/common/launch.hpp"
#include "tests/cuda/decode_steps.hpp"

namespace msa::testing {
namespace {

constexpr int kThreads = 256;

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

dim3 grid_of(std::int64_t count) {
  return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads));
}

__device__ std::uint32_t mixed(std::uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

__global__ void advance_kernel(const __grid_constant__ LoopState state) {
  const int step = *state.step;
  __syncthreads();
  if (threadIdx.x == 0) {
    *state.step = step + 1;
    std::int32_t sum = 0;
    for (int b = 0; b < state.batch_size; ++b) {
      const std::int32_t count = state.counts[(b + step) % state.batch_size];
      state.cu_seqlens_q[b] = sum;
      state.seq_lens_k[b] += count;
      sum += count;
    }
    state.cu_seqlens_q[state.batch_size] = sum;
  }
  __syncthreads();
  const int entries = state.batch_size * state.max_pages;
  for (int i = static_cast<int>(threadIdx.x); i < entries; i += kThreads) {
    const int block = i % state.max_pages;
    const bool used = block * state.block_size < state.seq_lens_k[i / state.max_pages];
    state.page_table[i] = used ? state.pages[i] : block % 2 == 0 ? -1 : 1 << 30;
  }
}

__global__ void tokens_kernel(__nv_bfloat16* values, std::int64_t count, const std::int32_t* step,
                              std::uint32_t seed) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const std::uint32_t of_step = mixed(seed * 0x9e3779b9u + static_cast<std::uint32_t>(*step));
  const std::uint32_t bits = mixed(of_step ^ mixed(static_cast<std::uint32_t>(i) + 1));
  values[i] = __float2bfloat16(static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31f);
}

__global__ void mix_kernel(const std::uint32_t* words, std::int64_t count, std::uint32_t* digest) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) digest[i] = mixed(digest[i] * 31 + words[i]);
}

}  // namespace

void advance(const LoopState& state, Stream stream) {
  cuda::launch(advance_kernel, {.threads = kThreads}, native(stream), state);
}

void fill_tokens(const TensorView& tensor, const std::int32_t* step, std::uint32_t seed,
                 Stream stream) {
  const std::int64_t count = tensor.num_elements();
  cuda::launch(tokens_kernel, {.grid = grid_of(count), .threads = kThreads}, native(stream),
               static_cast<__nv_bfloat16*>(tensor.data), count, step, seed);
}

void mix_into(const TensorView& tensor, std::uint32_t* digest, Stream stream) {
  const auto words = static_cast<std::int64_t>(static_cast<std::size_t>(tensor.num_elements()) *
                                               size_of(tensor.dtype) / 4);
  cuda::launch(mix_kernel, {.grid = grid_of(words), .threads = kThreads}, native(stream),
               static_cast<const std::uint32_t*>(tensor.data), words, digest);
}

}  // namespace msa::testing
