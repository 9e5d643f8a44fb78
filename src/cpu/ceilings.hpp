// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "core/tensor.hpp"

namespace msa::cpu {

/// What this machine gives at this moment, measured on the pool's threads: the denominators of
/// percent-of-roofline. Each takes about `seconds`.
struct Ceilings {
  double fma_gflops = 0.0;         ///< f32 fused multiply-adds from registers, 2 FLOP each
  double read_gbytes_per_s = 0.0;  ///< streaming reads of memory far larger than the caches
  double copy_gbytes_per_s = 0.0;  ///< streaming copies there; bytes read and bytes written count
};

Ceilings measure_ceilings(double seconds = 0.3);

/// Runs some milliseconds of f32 fused multiply-adds from registers on every thread of the pool and
/// returns how many FLOP that was, for callers with their own clock.
double run_fma();

/// Memory of 8 times the last-level cache (256 MiB to 2 GiB), streamed by all threads of the pool.
class MemoryStream {
 public:
  MemoryStream();
  /// GB/s of one pass over all of it: the better of one and of four streams per thread, since
  /// which of them the prefetchers like more differs between machines.
  double read();
  /// GB/s, read plus written, of one copy of its first half to its second.
  double copy();

 private:
  core::HostBuffer buffer_;
};

}  // namespace msa::cpu
