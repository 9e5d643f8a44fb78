// SPDX-License-Identifier: Apache-2.0
//
// What the rows of all CUDA backends share.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>

#include "core/check.hpp"
#include "core/operation.hpp"
#include "cuda/common/device.hpp"

namespace msa::cuda {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

/// A reason that holds for every kernel here: another device, a GPU older than `minimum` (or other
/// than `minimum` where `exactly`), rows that are not contiguous.
template <class Args>
std::optional<std::string> declines_device(const Args& args, int minimum, bool exactly) {
  std::optional<std::string> reason;
  core::for_each_tensor(args, [&](const char* name, const TensorView& view, core::Use) {
    if (!view.given() || reason) return;
    if (view.device.type != DeviceType::cuda) {
      reason = "tensors are on the CPU";
      return;
    }
    const int capability = compute_capability(view.device.index);
    const auto last = static_cast<std::size_t>(view.rank - 1);
    if (capability == 0) {
      reason = core::concat("there is no device cuda:", view.device.index);
    } else if (exactly ? capability != minimum : capability < minimum) {
      reason = core::concat("compute capability of cuda:", view.device.index, " is ",
                            capability / 10, ".", capability % 10, exactly ? ", not " : ", below ",
                            minimum / 10, ".", minimum % 10);
    } else if (view.rank > 1 && view.stride[last] != 1 && view.shape[last] > 1) {
      reason = core::concat(name, " has stride ", view.stride[last],
                            " in its last dimension, expected 1");
    }
  });
  return reason;
}

/// Why TMA can't read `view`: its address and strides must be multiples of 16 bytes. A plan made
/// before there is memory (null) is one for aligned addresses; run() throws where it gets another.
inline std::optional<std::string> declines_tma(const char* name, const TensorView& view) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  if (reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) {
    return core::concat(name, " starts at ", view.data, ", not a multiple of 16 bytes");
  }
  for (int axis = 0; axis + 1 < view.rank; ++axis) {
    const auto i = static_cast<std::size_t>(axis);
    if (view.shape[i] > 1 && view.stride[i] * size % 16 != 0) {
      return core::concat(name, " has stride ", view.stride[i] * size, " bytes in dimension ", axis,
                          ", not a multiple of 16");
    }
  }
  return std::nullopt;
}

inline cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

/// The scale of an argument struct: `given`, or 1 / sqrt(dim) where it is 0.
inline double scale_or_default(float given, int dim) {
  return given != 0.0f ? static_cast<double>(given) : 1.0 / std::sqrt(static_cast<double>(dim));
}

}  // namespace msa::cuda
