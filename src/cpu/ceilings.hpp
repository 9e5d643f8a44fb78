// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msa::cpu {

/// What this machine gives at this moment, measured on the pool's threads: the denominators of
/// percent-of-roofline. Each takes about `seconds`.
struct Ceilings {
  double fma_gflops = 0.0;         ///< f32 fused multiply-adds from registers, 2 FLOP each
  double read_gbytes_per_s = 0.0;  ///< streaming reads of memory far larger than the caches
};

Ceilings measure_ceilings(double seconds = 0.3);

/// Runs some milliseconds of f32 fused multiply-adds from registers on every thread of the pool and
/// returns how many FLOP that was, for callers with their own clock.
double run_fma();

}  // namespace msa::cpu
