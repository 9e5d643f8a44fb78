// SPDX-License-Identifier: Apache-2.0
//
// What the operations of this backend share: reasons to decline, and the loop over work items with
// one slice of the workspace per worker.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>
#include <span>
#include <string>

#include "core/check.hpp"
#include "core/operation.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/cpu.hpp"
#include "msa/backend.hpp"

namespace msa::cpu {

/// Widest vector of any target in floats; panels are padded to it.
inline constexpr std::int64_t kMaxLanes = 16;

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Floats of scratch that pack_keys needs.
constexpr std::int64_t pack_scratch(std::int64_t dim) {
  return kMaxLanes * round_up(dim, kMaxLanes);
}

/// Declines what no kernel here reads: other devices, f64 and e4m3, rows that are not contiguous.
template <class Args>
std::optional<std::string> declines(const Args& args, const Options&) {
  simd_target();  // a wrong MSA_CPU_TARGET is an error of the plan
  std::optional<std::string> reason;
  core::for_each_tensor(args, [&](const char* name, const TensorView& view, core::Use) {
    if (!view.given() || reason) return;
    const auto last = static_cast<std::size_t>(view.rank - 1);
    if (view.device.type != DeviceType::cpu) {
      reason = core::concat("tensors are on cuda:", view.device.index);
    } else if (view.dtype == DType::f64 || view.dtype == DType::e4m3) {
      reason = core::concat(name, " is ", msa::name_of(view.dtype), ", not f32, f16 or bf16");
    } else if (view.dtype != DType::i32 && view.rank > 2 && view.stride[last] != 1 &&
               view.shape[last] > 1) {
      reason = core::concat(name, " has stride ", view.stride[last],
                            " in its last dimension, expected 1");
    }
  });
  return reason;
}

/// Calls work(item, scratch) for every item in [0, count), in ascending order of their start, on as
/// many threads as the workspace has slices of `slice_bytes` for: the pool may have grown since the
/// plan was made.
template <class Work>
void for_each_item(std::int64_t count, std::span<std::byte> workspace, std::size_t slice_bytes,
                   Work work) {
  const auto slices =
      slice_bytes == 0 ? num_threads() : static_cast<std::int64_t>(workspace.size() / slice_bytes);
  std::atomic<std::int64_t> next{0};
  core::parallel_for(std::min({slices, count, static_cast<std::int64_t>(num_threads())}),
                     [&](std::int64_t slice, int) {
                       std::byte* const scratch =
                           workspace.data() + static_cast<std::size_t>(slice) * slice_bytes;
                       for (;;) {
                         const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
                         if (item >= count) return;
                         work(item, scratch);
                       }
                     });
}

/// Workspace of for_each_item for the threads there are now.
inline std::size_t workspace_of_slices(std::size_t slice_bytes) {
  return slice_bytes * static_cast<std::size_t>(num_threads());
}

}  // namespace msa::cpu
