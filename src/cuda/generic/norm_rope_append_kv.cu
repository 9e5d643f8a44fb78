// SPDX-License-Identifier: Apache-2.0
//
// NormRopeAppendKv: one warp for each head of each new token, all tensors in one launch. Lane l
// holds elements 4 l .. 4 l + 3 of every 128, which is the order of sums that ops.hpp defines.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/common/batch.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/cuda.hpp"
#include "cuda/generic/index_code.cuh"

namespace msa::cuda::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kLanes = 32;
constexpr int kPerLane = 4;
constexpr int kMaxDim = 256;
constexpr int kSteps = kMaxDim / (kLanes * kPerLane);
constexpr int kKinds = 5;

/// Heads of one input and where they go. Strides are in elements.
struct HeadRows {
  const std::byte* rows;  ///< null: not given, num_heads is then 0
  const std::byte* weight;
  std::byte* to;
  const float* scale;
  std::int64_t row_token_stride, row_head_stride, weight_stride, scale_stride;
  std::int64_t to_token_stride;  ///< of a page's tokens where `paged`
  std::int64_t to_head_stride, page_stride;
  DType dtype, weight_dtype, to_dtype;
  int num_heads, dim;
  bool paged, rotated, vector_in, vector_out;
};

struct NormRopeParams {
  HeadRows kinds[kKinds];  ///< q, index_q, k, v, index_k
  int heads_of_token;
  float eps, weight_offset;
  const std::byte* cos_sin;
  std::int64_t cos_sin_stride, cos_sin_element_stride, max_positions;
  DType cos_sin_dtype;
  int half;
  const std::int32_t* positions;
  std::int64_t positions_stride;
  std::int8_t* codes;
  std::uint16_t* scales;
  std::int64_t codes_page_stride, codes_token_stride, scales_page_stride, scales_token_stride;
};

__device__ __forceinline__ float bf16_bits(std::uint32_t bits) {
  return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float f16_bits(std::uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ float element_at(const std::byte* data, DType dtype, std::int64_t i) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(data)[i];
  const std::uint32_t bits = reinterpret_cast<const std::uint16_t*>(data)[i];
  return dtype == DType::bf16 ? bf16_bits(bits) : f16_bits(bits);
}

__device__ __forceinline__ void load_four(const HeadRows& rows, std::int64_t at, float (&x)[4]) {
  if (rows.vector_in && rows.dtype == DType::f32) {
    const float4 four = *reinterpret_cast<const float4*>(rows.rows + at * 4);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else if (rows.vector_in) {
    const uint2 two = *reinterpret_cast<const uint2*>(rows.rows + at * 2);
    const std::uint32_t bits[4] = {two.x & 0xffffu, two.x >> 16, two.y & 0xffffu, two.y >> 16};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[j] = rows.dtype == DType::bf16 ? bf16_bits(bits[j]) : f16_bits(bits[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = element_at(rows.rows, rows.dtype, at + j);
  }
}

/// The bits of x in a dtype; `x` becomes what they stand for.
__device__ __forceinline__ std::uint32_t round_to(DType dtype, float& x) {
  if (dtype == DType::bf16) {
    const std::uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    x = bf16_bits(bits);
    return bits;
  }
  if (dtype == DType::f16) {
    const std::uint32_t bits = __half_as_ushort(__float2half_rn(x));
    x = f16_bits(bits);
    return bits;
  }
  if (dtype == DType::e4m3) {
    const __nv_fp8_storage_t bits = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    x = __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
    return bits;
  }
  return __float_as_uint(x);
}

__device__ __forceinline__ void store_four(const HeadRows& rows, std::int64_t at, int count,
                                           float (&x)[4]) {
  std::uint32_t bits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) bits[j] = round_to(rows.to_dtype, x[j]);
  const int size = rows.to_dtype == DType::f32 ? 4 : rows.to_dtype == DType::e4m3 ? 1 : 2;
  std::byte* const to = rows.to + at * size;
  if (rows.vector_out) {
    if (size == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    } else if (size == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    } else {
      *reinterpret_cast<std::uint32_t*>(to) =
          bits[0] | bits[1] << 8 | bits[2] << 16 | bits[3] << 24;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= count) continue;
    if (size == 4) {
      reinterpret_cast<std::uint32_t*>(to)[j] = bits[j];
    } else if (size == 2) {
      reinterpret_cast<std::uint16_t*>(to)[j] = static_cast<std::uint16_t>(bits[j]);
    } else {
      reinterpret_cast<std::uint8_t*>(to)[j] = static_cast<std::uint8_t>(bits[j]);
    }
  }
}

/// core::encode_index_key by one warp; lane 0 sums squares in the order of their elements.
__device__ void encode(const NormRopeParams& params, const float* key, int dim, std::int64_t page,
                       std::int64_t slot) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float largest_f32 = 0.0f;
  bool coded = true;
  for (int d = lane; d < dim; d += kLanes) {
    coded = coded && fabsf(key[d]) <= static_cast<float>(core::kMaxCodedElement);  // a NaN is not
    largest_f32 = fmaxf(largest_f32, fabsf(key[d]));
  }
  coded = __all_sync(~0u, coded) != 0;
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) {
    largest_f32 = fmaxf(largest_f32, __shfl_xor_sync(~0u, largest_f32, o));
  }
  const std::uint16_t scale_bits =
      coded ? least_bf16(static_cast<double>(largest_f32) / core::kMaxIndexCode) : 0;
  const double scale = static_cast<double>(bf16_bits(scale_bits));
  std::int8_t* const codes =
      params.codes + page * params.codes_page_stride + slot * params.codes_token_stride;
  double squares = 0.0;
  for (int begin = 0; begin < dim; begin += kLanes) {
    const int d = begin + lane;
    double square = 0.0;
    if (d < dim) {
      const CodedElement coded_element = code_element(static_cast<double>(key[d]), scale);
      codes[d] = coded_element.code;
      square = coded_element.square;
    }
    for (int i = 0; i < kLanes; ++i) squares = __dadd_rn(squares, __shfl_sync(~0u, square, i));
  }
  if (lane != 0) return;
  std::uint16_t* const scales =
      params.scales + page * params.scales_page_stride + slot * params.scales_token_stride;
  store_scales(scales, scale_bits, coded, squares);
}

__global__ void __launch_bounds__(kWarps* kLanes)
    norm_rope_append_kv_kernel(const __grid_constant__ DeviceBatch batch,
                               const __grid_constant__ NormRopeParams params) {
  __shared__ float normed[kWarps][kMaxDim];
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t token = blockIdx.x;
  int head = static_cast<int>(blockIdx.y) * kWarps + warp;
  if (head >= params.heads_of_token) return;
  int kind = 0;
  while (head >= params.kinds[kind].num_heads) head -= params.kinds[kind++].num_heads;
  const HeadRows& rows = params.kinds[kind];

  const DeviceSequence sequence = sequence_of_query(batch, token);
  const std::int64_t p = sequence.position(token - sequence.q_begin);
  if (p < 0 || p >= sequence.k_len) return;
  std::int64_t turn = p;
  if (params.cos_sin != nullptr) {
    if (params.positions != nullptr) turn = params.positions[token * params.positions_stride];
    if (turn < 0 || turn >= params.max_positions) return;
  }
  const std::int64_t slot = p % batch.block_size;
  std::int64_t page = 0;
  std::int64_t to = token * rows.to_token_stride + head * rows.to_head_stride;
  if (rows.paged) {
    page = page_of(batch, sequence.batch_idx, p / batch.block_size);
    if (page < 0) return;
    to = page * rows.page_stride + head * rows.to_head_stride + slot * rows.to_token_stride;
  }

  const std::int64_t from = token * rows.row_token_stride + head * rows.row_head_stride;
  float x[kSteps][kPerLane];
  float sum = 0.0f;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int begin = (step * kLanes + lane) * kPerLane;
    if (begin + kPerLane <= rows.dim) {
      load_four(rows, from + begin, x[step]);
    } else {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        x[step][j] =
            begin + j < rows.dim ? element_at(rows.rows, rows.dtype, from + begin + j) : 0.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sum = __fadd_rn(sum, __fmul_rn(x[step][j], x[step][j]));
  }
  if (rows.weight != nullptr) {
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, o));
    const float mean = __fdiv_rn(sum, static_cast<float>(rows.dim));
    const float r = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, params.eps)));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int d = (step * kLanes + lane) * kPerLane + j;
        if (d >= rows.dim) continue;
        const float weight = element_at(rows.weight, rows.weight_dtype, d * rows.weight_stride);
        x[step][j] = __fmul_rn(__fmul_rn(x[step][j], r), __fadd_rn(weight, params.weight_offset));
      }
    }
  }
  float* const row = normed[warp];
  if (rows.rotated) {
    // The other element of a pair is in another lane, or in the same one, as rotary_dim has it.
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int d = (step * kLanes + lane) * kPerLane + j;
        if (d < rows.dim) row[d] = x[step][j];
      }
    }
    __syncwarp();
    const std::int64_t table = turn * params.cos_sin_stride;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int d = (step * kLanes + lane) * kPerLane + j;
        if (d >= 2 * params.half || d >= rows.dim) continue;
        const bool second = d >= params.half;
        const int i = second ? d - params.half : d;
        const float cosine = element_at(params.cos_sin, params.cos_sin_dtype,
                                        table + i * params.cos_sin_element_stride);
        const float sine = element_at(params.cos_sin, params.cos_sin_dtype,
                                      table + (i + params.half) * params.cos_sin_element_stride);
        const float other = row[second ? i : i + params.half];
        const float own_cos = __fmul_rn(x[step][j], cosine);
        const float other_sin = __fmul_rn(other, sine);
        x[step][j] = second ? __fadd_rn(own_cos, other_sin) : __fsub_rn(own_cos, other_sin);
      }
    }
    __syncwarp();
  }
  const float scale = rows.scale != nullptr ? rows.scale[head * rows.scale_stride] : 1.0f;
  const bool encodes = kind == kKinds - 1 && params.codes != nullptr;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int begin = (step * kLanes + lane) * kPerLane;
    if (begin >= rows.dim) continue;
    if (rows.scale != nullptr) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) x[step][j] = __fdiv_rn(x[step][j], scale);
    }
    store_four(rows, to + begin, rows.dim - begin, x[step]);
    if (!encodes) continue;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (begin + j < rows.dim) row[begin + j] = x[step][j];
    }
  }
  if (!encodes) return;
  __syncwarp();
  encode(params, row, rows.dim, page, slot);
}

/// Whether groups of four elements lie at multiples of their size.
bool fours_are_aligned(const TensorView& view) {
  const auto size = static_cast<std::uintptr_t>(size_of(view.dtype)) * kPerLane;
  if (reinterpret_cast<std::uintptr_t>(view.data) % size != 0) return false;
  if (view.shape[static_cast<std::size_t>(view.rank - 1)] % kPerLane != 0) return false;
  for (int axis = 0; axis + 1 < view.rank; ++axis) {
    if (view.stride[static_cast<std::size_t>(axis)] % kPerLane != 0) return false;
  }
  return true;
}

HeadRows make_rows(const TensorView& rows, const TensorView& weight, const TensorView& to,
                   const TensorView& scale, bool rotated) {
  HeadRows made{};
  if (!rows.given()) return made;
  made.rows = static_cast<const std::byte*>(rows.data);
  made.weight = weight.given() ? static_cast<const std::byte*>(weight.data) : nullptr;
  made.to = static_cast<std::byte*>(to.data);
  made.scale = scale.given() ? static_cast<const float*>(scale.data) : nullptr;
  made.row_token_stride = rows.stride[0];
  made.row_head_stride = rows.stride[1];
  made.weight_stride = weight.stride[0];
  made.scale_stride = scale.stride[0];
  made.paged = to.rank == 4;
  made.page_stride = made.paged ? to.stride[0] : 0;
  made.to_token_stride = made.paged ? to.stride[2] : to.stride[0];
  made.to_head_stride = to.stride[1];
  made.dtype = rows.dtype;
  made.weight_dtype = weight.dtype;
  made.to_dtype = to.dtype;
  made.num_heads = static_cast<int>(rows.shape[1]);
  made.dim = static_cast<int>(rows.shape[2]);
  made.rotated = rotated;
  made.vector_in = fours_are_aligned(rows);
  made.vector_out = fours_are_aligned(to);
  return made;
}

NormRopeParams make_params(const NormRopeAppendKv& args) {
  const bool rotated = args.cos_sin.given();
  NormRopeParams params{};
  params.kinds[0] = make_rows(args.q, args.q_weight, args.q_out, {}, rotated);
  params.kinds[1] = make_rows(args.index_q, args.index_q_weight, args.index_q_out, {}, rotated);
  params.kinds[2] = make_rows(args.k, args.k_weight, args.k_pages, args.k_scale, rotated);
  params.kinds[3] = make_rows(args.v, {}, args.v_pages, args.v_scale, false);
  params.kinds[4] = make_rows(args.index_k, args.index_k_weight, args.index_k_pages, {}, rotated);
  for (const HeadRows& rows : params.kinds) params.heads_of_token += rows.num_heads;
  params.eps = args.norm_eps;
  params.weight_offset = args.norm_weight_offset;
  if (rotated) {
    params.cos_sin = static_cast<const std::byte*>(args.cos_sin.data);
    params.cos_sin_stride = args.cos_sin.stride[0];
    params.cos_sin_element_stride = args.cos_sin.stride[1];
    params.max_positions = args.cos_sin.shape[0];
    params.cos_sin_dtype = args.cos_sin.dtype;
    params.half = static_cast<int>(args.cos_sin.shape[1] / 2);
  }
  if (args.positions.given()) {
    params.positions = static_cast<const std::int32_t*>(args.positions.data);
    params.positions_stride = args.positions.stride[0];
  }
  if (args.index_k_codes_pages.given()) {
    params.codes = static_cast<std::int8_t*>(args.index_k_codes_pages.data);
    params.scales = static_cast<std::uint16_t*>(args.index_k_scales_pages.data);
    params.codes_page_stride = args.index_k_codes_pages.stride[0];
    params.codes_token_stride = args.index_k_codes_pages.stride[2];
    params.scales_page_stride = args.index_k_scales_pages.stride[0];
    params.scales_token_stride = args.index_k_scales_pages.stride[2];
  }
  return params;
}

}  // namespace

const msa::detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv = {
    .name = "cuda_generic",
    .dtypes = "f32 f16 bf16 e4m3",
    .declines = [](const NormRopeAppendKv& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_device(args, 80, false)) return reason;
      for (const TensorView* rows : {&args.q, &args.index_q, &args.k, &args.v, &args.index_k}) {
        if (rows->given() && rows->shape[2] > kMaxDim) {
          return core::concat("head_dim or index_dim ", rows->shape[2], " is above ", kMaxDim);
        }
      }
      return std::nullopt;
    },
    .workspace_bytes = [](const NormRopeAppendKv&) -> std::size_t { return 0; },
    .run =
        [](const NormRopeAppendKv& args, std::span<std::byte>, Stream stream) {
          const DeviceBatch batch = make_device_batch(args);
          const NormRopeParams params = make_params(args);
          if (batch.total_q == 0) return;
          const LaunchConfig config{
              .grid = dim3(static_cast<unsigned>(batch.total_q),
                           static_cast<unsigned>(ceil_div(params.heads_of_token, kWarps))),
              .threads = kWarps * kLanes};
          launch(norm_rope_append_kv_kernel, config, stream_of(stream), batch, params);
        }};

}  // namespace msa::cuda::generic
