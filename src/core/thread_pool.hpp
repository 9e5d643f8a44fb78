// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

namespace msa::core {

/// Runs task(context, index, worker) for every index in [0, count) on the process-wide pool, the
/// caller included, and returns when all are done. Workers take indices in ascending order from one
/// counter; `worker` is in [0, num_threads()). A task must not throw and must not call
/// parallel_for.
void parallel_for(std::int64_t count, void (*task)(void* context, std::int64_t index, int worker),
                  void* context);

/// The same for a callable (index, worker).
template <class Task>
void parallel_for(std::int64_t count, Task&& task) {
  parallel_for(
      count,
      [](void* context, std::int64_t index, int worker) {
        (*static_cast<std::remove_reference_t<Task>*>(context))(index, worker);
      },
      const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace msa::core
