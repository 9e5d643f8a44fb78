// SPDX-License-Identifier: Apache-2.0
//
// AppendKv: one CTA per new token copies its elements as they are; one more codes its index
// key, where codes are wanted.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/batch.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/cuda.hpp"
#include "cuda/generic/index_code.cuh"

namespace msa::cuda::generic {
namespace {

constexpr int kThreads = 128;

/// A pair (new rows, pages); elements are copied as their bits. Strides are in elements.
struct AppendPair {
  const std::byte* rows;  ///< null: not given
  std::byte* pages;
  std::int64_t row_token_stride, row_head_stride;
  std::int64_t page_stride, head_stride, token_stride;
  int num_heads;
  int dim;
  int element_size;
};

struct CodePages {
  std::int8_t* codes;
  std::uint16_t* scales;
  std::int64_t codes_page_stride, codes_token_stride;
  std::int64_t scales_page_stride, scales_token_stride;
  DType dtype;  ///< of the keys
};

AppendPair make_pair(const TensorView& rows, const TensorView& pages) {
  AppendPair pair{};
  if (!rows.given()) return pair;
  pair.rows = static_cast<const std::byte*>(rows.data);
  pair.pages = static_cast<std::byte*>(pages.data);
  pair.row_token_stride = rows.stride[0];
  pair.row_head_stride = rows.stride[1];
  pair.page_stride = pages.stride[0];
  pair.head_stride = pages.stride[1];
  pair.token_stride = pages.stride[2];
  pair.num_heads = static_cast<int>(pages.shape[1]);
  pair.dim = static_cast<int>(pages.shape[3]);
  pair.element_size = static_cast<int>(size_of(rows.dtype));
  return pair;
}

template <class Word>
__device__ void copy_token(const AppendPair& pair, std::int64_t row, std::int64_t page,
                           std::int64_t offset) {
  const Word* const from = reinterpret_cast<const Word*>(pair.rows) + row * pair.row_token_stride;
  Word* const to =
      reinterpret_cast<Word*>(pair.pages) + page * pair.page_stride + offset * pair.token_stride;
  for (int head = 0; head < pair.num_heads; ++head) {
    for (int d = static_cast<int>(threadIdx.x); d < pair.dim; d += kThreads) {
      to[head * pair.head_stride + d] = from[head * pair.row_head_stride + d];
    }
  }
}

__device__ void append(const AppendPair& pair, std::int64_t row, std::int64_t page,
                       std::int64_t offset) {
  if (pair.rows == nullptr) return;
  if (pair.element_size == 2) return copy_token<std::uint16_t>(pair, row, page, offset);
  if (pair.element_size == 4) return copy_token<std::uint32_t>(pair, row, page, offset);
  copy_token<std::uint64_t>(pair, row, page, offset);
}

__device__ double element_of(const std::byte* row, DType dtype, int d) {
  switch (dtype) {
    case DType::bf16:
      return static_cast<double>(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[d]));
    case DType::f16:
      return static_cast<double>(__half2float(reinterpret_cast<const __half*>(row)[d]));
    case DType::f32:
      return static_cast<double>(reinterpret_cast<const float*>(row)[d]);
    default:
      return reinterpret_cast<const double*>(row)[d];
  }
}

/// core::encode_index_key by a CTA; squares are summed in the order of their elements.
__device__ void encode(const AppendPair& keys, const CodePages& to, std::int64_t row,
                       std::int64_t page, std::int64_t offset) {
  __shared__ double values[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const std::byte* const key = keys.rows + row * keys.row_token_stride * keys.element_size;
  double largest = 0.0;
  bool coded = true;
  for (int d = thread; d < keys.dim; d += kThreads) {
    const double magnitude = fabs(element_of(key, to.dtype, d));
    coded = coded && magnitude <= core::kMaxCodedElement;  // a NaN is not
    largest = fmax(largest, magnitude);
  }
  coded = __syncthreads_and(coded) != 0;
  values[thread] = largest;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) largest = fmax(largest, values[i]);
  const std::uint16_t scale_bits = coded ? least_bf16(largest / core::kMaxIndexCode) : 0;
  const double scale =
      static_cast<double>(__uint_as_float(static_cast<std::uint32_t>(scale_bits) << 16));
  std::int8_t* const codes =
      to.codes + page * to.codes_page_stride + offset * to.codes_token_stride;
  double squares = 0.0;
  for (int begin = 0; begin < keys.dim; begin += kThreads) {
    const int d = begin + thread;
    __syncthreads();
    values[thread] = 0.0;
    if (d < keys.dim) {
      const CodedElement coded_element = code_element(element_of(key, to.dtype, d), scale);
      codes[d] = coded_element.code;
      values[thread] = coded_element.square;
    }
    __syncthreads();
    if (thread == 0) {
      for (int i = 0; i < kThreads; ++i) squares = __dadd_rn(squares, values[i]);
    }
  }
  if (thread != 0) return;
  std::uint16_t* const scales =
      to.scales + page * to.scales_page_stride + offset * to.scales_token_stride;
  store_scales(scales, scale_bits, coded, squares);
}

/// Where a new token goes; page -1: nowhere.
struct Slot {
  std::int64_t page;
  std::int64_t offset;
};

__device__ __forceinline__ Slot slot_of(const DeviceBatch& batch, std::int64_t row) {
  const DeviceSequence sequence = sequence_of_query(batch, row);
  const std::int64_t p = sequence.position(row - sequence.q_begin);
  if (p < 0 || p >= sequence.k_len) return {.page = -1, .offset = 0};
  return {.page = page_of(batch, sequence.batch_idx, p / batch.block_size),
          .offset = p % batch.block_size};
}

__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ DeviceBatch batch,
                     const __grid_constant__ AppendPair k, const __grid_constant__ AppendPair v,
                     const __grid_constant__ AppendPair index_k) {
  const std::int64_t row = blockIdx.x;
  const Slot slot = slot_of(batch, row);
  if (slot.page < 0) return;
  append(k, row, slot.page, slot.offset);
  append(v, row, slot.page, slot.offset);
  append(index_k, row, slot.page, slot.offset);
}

__global__ void __launch_bounds__(kThreads)
    encode_index_keys_kernel(const __grid_constant__ DeviceBatch batch,
                             const __grid_constant__ AppendPair index_k,
                             const __grid_constant__ CodePages codes) {
  const std::int64_t row = blockIdx.x;
  const Slot slot = slot_of(batch, row);
  if (slot.page >= 0) encode(index_k, codes, row, slot.page, slot.offset);
}

std::optional<std::string> declines_pair(const char* name, const TensorView& rows,
                                         const TensorView& pages) {
  if (rows.given() && rows.dtype != pages.dtype) {
    return core::concat(name, " is ", name_of(rows.dtype), " and its pages are ",
                        name_of(pages.dtype));
  }
  return std::nullopt;
}

}  // namespace

const msa::detail::Implementation<AppendKv> kAppendKv = {
    .name = "cuda_generic",
    .dtypes = "f64 f32 f16 bf16",
    .declines = [](const AppendKv& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_device(args, 80, false)) return reason;
      if (auto reason = declines_pair("k", args.k, args.k_pages)) return reason;
      if (auto reason = declines_pair("v", args.v, args.v_pages)) return reason;
      return declines_pair("index_k", args.index_k, args.index_k_pages);
    },
    .workspace_bytes = [](const AppendKv&) -> std::size_t { return 0; },
    .run =
        [](const AppendKv& args, std::span<std::byte>, Stream stream) {
          const DeviceBatch batch = make_device_batch(args);
          const LaunchConfig config{.grid = dim3(static_cast<unsigned>(batch.total_q)),
                                    .threads = kThreads};
          const AppendPair index_k = make_pair(args.index_k, args.index_k_pages);
          launch(append_kv_kernel, config, stream_of(stream), batch,
                 make_pair(args.k, args.k_pages), make_pair(args.v, args.v_pages), index_k);
          if (!args.index_k_codes_pages.given()) return;
          const CodePages codes{
              .codes = static_cast<std::int8_t*>(args.index_k_codes_pages.data),
              .scales = static_cast<std::uint16_t*>(args.index_k_scales_pages.data),
              .codes_page_stride = args.index_k_codes_pages.stride[0],
              .codes_token_stride = args.index_k_codes_pages.stride[2],
              .scales_page_stride = args.index_k_scales_pages.stride[0],
              .scales_token_stride = args.index_k_scales_pages.stride[2],
              .dtype = args.index_k.dtype};
          launch(encode_index_keys_kernel, config, stream_of(stream), batch, index_k, codes);
        }};

}  // namespace msa::cuda::generic
