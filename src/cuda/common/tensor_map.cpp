// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/tensor_map.hpp"

#include <string>

#include "cuda/common/check.hpp"

namespace msa::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

/// Asked from the driver, so that the library does not link libcuda and loads without a driver.
Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    MSA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw Error(ErrorCode::cuda, "the driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

CUtensorMapDataType data_type(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::f16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::f32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case DType::f64:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
    case DType::i32:
      return CU_TENSOR_MAP_DATA_TYPE_INT32;
    case DType::e4m3:
    case DType::i8:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

template <class T>
std::string list_text(std::span<const T> values) {
  std::string text;
  for (const T value : values) text += core::concat(text.empty() ? "[" : ", ", value);
  return text + "]";
}

}  // namespace

CUtensorMap make_tensor_map(const void* data, DType dtype, std::span<const std::uint64_t> dims,
                            std::span<const std::uint64_t> byte_strides,
                            std::span<const std::uint32_t> box, TensorMapLayout layout) {
  constexpr cuuint32_t kUnit[5] = {1, 1, 1, 1, 1};
  CUtensorMap map{};
  const CUresult result = encoder()(
      &map, data_type(dtype), static_cast<cuuint32_t>(dims.size()), const_cast<void*>(data),
      dims.data(), byte_strides.data(), box.data(), kUnit, CU_TENSOR_MAP_INTERLEAVE_NONE,
      layout == TensorMapLayout::swizzle_128b ? CU_TENSOR_MAP_SWIZZLE_128B
                                              : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::cuda,
                core::concat("cuTensorMapEncodeTiled refused (error ", static_cast<int>(result),
                             ") a tensor of ", name_of(dtype), " at ", data, ", dimensions ",
                             list_text(dims), ", strides ", list_text(byte_strides), " bytes, box ",
                             list_text(box)));
  }
  return map;
}

}  // namespace msa::cuda
