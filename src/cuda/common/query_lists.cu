// SPDX-License-Identifier: Apache-2.0
//
// A counting sort of (bin, query) pairs whose order depends on block_ids alone. A CTA has a chunk
// of neighbouring queries of one KV head and sets a bit per pair in shared memory, bins by queries:
// bits come out ascending however threads were timed, and a block that a row names twice counts
// once. Three steps: count the bits of each (chunk, bin); add counts up, chunks inside bins; set
// the bits again and write each query to its place.
#include "cuda/common/launch.hpp"
#include "cuda/common/query_lists.cuh"

namespace msa::cuda {
namespace {

constexpr int kThreads = 512;
/// Of bits: over a thousand bins for the shortest chunk, and two CTAs or three share an SM.
constexpr std::size_t kSmemBytes = 72 * 1024;
constexpr int kScanThreads = 1024;
constexpr int kColumnThreads = 128;
constexpr int kColumnBatch = 8;  ///< loads under way

/// Words of 32 queries, and one so that neighbouring bins start in different banks.
__device__ constexpr int pitch_of(int chunk) { return chunk / 32 + 1; }

/// Bins of the sequences that a chunk's queries belong to.
struct BinRange {
  std::int64_t begin;
  std::int64_t end;
};

__device__ BinRange bins_of(const QueryListBuild& g, std::int64_t begin, std::int64_t end) {
  const DeviceSequence first = sequence_of_query(g.batch, begin);
  const DeviceSequence last = sequence_of_query(g.batch, end - 1);
  const std::int64_t blocks = (last.k_len + g.batch.block_size - 1) / g.batch.block_size;
  return {first_bin(g.batch, first), min(first_bin(g.batch, last) + blocks, g.num_bins)};
}

/// Sets the bits of queries [begin, end) for bins [base, base + num_bins).
__device__ void set_bits(const QueryListBuild& g, std::uint32_t* bits, int head, std::int64_t begin,
                         std::int64_t end, std::int64_t base, int num_bins) {
  const int pitch = pitch_of(g.chunk);
  for (int i = static_cast<int>(threadIdx.x); i < num_bins * pitch; i += kThreads) bits[i] = 0;
  __syncthreads();
  for (std::int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
    const DeviceSequence sequence = sequence_of_query(g.batch, row);
    const std::int64_t visible = num_visible_keys(sequence, row);
    const std::int64_t first = first_bin(g.batch, sequence) - base;
    const std::int32_t* const ids = g.block_ids + head * g.head_stride + row * g.token_stride;
    const int query = static_cast<int>(row - begin);
#pragma unroll 4
    for (int slot = 0; slot < g.top_k; ++slot) {
      const std::int64_t id = ids[slot];
      if (id < 0 || id * g.batch.block_size >= visible) continue;
      const std::int64_t bin = first + id;
      if (bin < 0 || bin >= num_bins) continue;
      atomicOr(&bits[bin * pitch + query / 32], 1u << query % 32);
    }
  }
  __syncthreads();
}

/// Calls visit(base, num_bins) for as many bins at a time as shared memory has bits for.
template <class Visit>
__device__ void for_each_pass(const QueryListBuild& g, const BinRange& range, Visit visit) {
  const int most = static_cast<int>(kSmemBytes / sizeof(std::uint32_t)) / pitch_of(g.chunk);
  for (std::int64_t base = range.begin; base < range.end; base += most) {
    visit(base, static_cast<int>(min(std::int64_t{most}, range.end - base)));
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    count_kernel(const __grid_constant__ QueryListBuild g) {
  extern __shared__ std::uint32_t bits[];
  const int head = static_cast<int>(blockIdx.y);
  const std::int64_t begin = std::int64_t{blockIdx.x} * g.chunk;
  const std::int64_t end = min(begin + g.chunk, g.batch.total_q);
  const int pitch = pitch_of(g.chunk);
  std::int32_t* const counts = g.counts + (head * g.num_chunks + blockIdx.x) * g.num_bins;
  const BinRange range = bins_of(g, begin, end);
  for (std::int64_t bin = threadIdx.x; bin < g.num_bins; bin += kThreads) {
    if (bin < range.begin || bin >= range.end) counts[bin] = 0;
  }
  for_each_pass(g, range, [&](std::int64_t base, int num_bins) {
    set_bits(g, bits, head, begin, end, base, num_bins);
    for (int bin = static_cast<int>(threadIdx.x); bin < num_bins; bin += kThreads) {
      int count = 0;
      for (int word = 0; word < g.chunk / 32; ++word) count += __popc(bits[bin * pitch + word]);
      counts[base + bin] = count;
    }
    __syncthreads();
  });
}

/// A thread per (head, bin): its counts become their sums over earlier chunks; the sum of all goes
/// to begins[bin].
__global__ void __launch_bounds__(kColumnThreads)
    add_chunks_kernel(const __grid_constant__ QueryListBuild g) {
  const std::int64_t bin = std::int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
  if (bin >= g.num_bins) return;
  const std::int64_t head = blockIdx.y;
  std::int32_t* const counts = g.counts + head * g.num_chunks * g.num_bins + bin;
  std::int32_t sum = 0;
  for (std::int64_t chunk = 0; chunk < g.num_chunks; chunk += kColumnBatch) {
    std::int32_t values[kColumnBatch];
#pragma unroll
    for (int i = 0; i < kColumnBatch; ++i) {
      values[i] = chunk + i < g.num_chunks ? counts[(chunk + i) * g.num_bins] : 0;
    }
#pragma unroll
    for (int i = 0; i < kColumnBatch; ++i) {
      if (chunk + i < g.num_chunks) counts[(chunk + i) * g.num_bins] = sum;
      sum += values[i];
    }
  }
  g.begins[head * (g.num_bins + 1) + bin] = sum;
}

/// A CTA per head: begins become their sums over earlier bins.
__global__ void __launch_bounds__(kScanThreads)
    add_bins_kernel(const __grid_constant__ QueryListBuild g) {
  __shared__ std::int32_t warp_sums[kScanThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  std::int32_t* const begins = g.begins + std::int64_t{blockIdx.x} * (g.num_bins + 1);
  std::int32_t before = 0;
  for (std::int64_t base = 0; base < g.num_bins; base += kScanThreads) {
    const std::int64_t bin = base + threadIdx.x;
    const std::int32_t value = bin < g.num_bins ? begins[bin] : 0;
    std::int32_t sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const std::int32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    std::int32_t total = 0;
    std::int32_t earlier = 0;
#pragma unroll
    for (int i = 0; i < kScanThreads / 32; ++i) {
      if (i < warp) earlier += warp_sums[i];
      total += warp_sums[i];
    }
    if (bin < g.num_bins) begins[bin] = before + earlier + sum - value;
    before += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) begins[g.num_bins] = before;
}

__global__ void __launch_bounds__(kThreads, 2)
    write_kernel(const __grid_constant__ QueryListBuild g) {
  extern __shared__ std::uint32_t bits[];
  const int head = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t begin = std::int64_t{blockIdx.x} * g.chunk;
  const std::int64_t end = min(begin + g.chunk, g.batch.total_q);
  const int words = g.chunk / 32;
  const std::int32_t* const counts = g.counts + (head * g.num_chunks + blockIdx.x) * g.num_bins;
  const std::int32_t* const begins = g.begins + head * (g.num_bins + 1);
  std::int32_t* const rows = g.rows + head * g.batch.total_q * g.top_k;
  for_each_pass(g, bins_of(g, begin, end), [&](std::int64_t base, int num_bins) {
    set_bits(g, bits, head, begin, end, base, num_bins);
    for (int bin = warp; bin < num_bins; bin += kThreads / 32) {
      std::int32_t* to = rows + begins[base + bin] + counts[base + bin];
      for (int first = 0; first < words; first += 32) {
        const int word = first + lane;
        std::uint32_t left = word < words ? bits[bin * pitch_of(g.chunk) + word] : 0;
        int sum = __popc(left);
        const int own = sum;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += other;
        }
        std::int32_t* at = to + sum - own;
        for (; left != 0; left &= left - 1) {
          *at++ = static_cast<std::int32_t>(begin) + word * 32 + __ffs(static_cast<int>(left)) - 1;
        }
        to += __shfl_sync(~0u, sum, 31);
      }
    }
    __syncthreads();
  });
}

}  // namespace

void build_query_lists(const QueryListBuild& build, cudaStream_t stream) {
  if (build.rows == nullptr) return;
  const auto heads = static_cast<unsigned>(build.num_kv_heads);
  const LaunchConfig chunks{.grid = dim3(static_cast<unsigned>(build.num_chunks), heads),
                            .threads = kThreads,
                            .smem_bytes = kSmemBytes};
  launch(count_kernel, chunks, stream, build);
  launch(add_chunks_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(build.num_bins, kColumnThreads)), heads),
          .threads = kColumnThreads},
         stream, build);
  launch(add_bins_kernel, {.grid = dim3(heads), .threads = kScanThreads}, stream, build);
  launch(write_kernel, chunks, stream, build);
}

}  // namespace msa::cuda
