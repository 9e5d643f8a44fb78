// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msa::bench {

/// What this GPU does in this run.
struct DeviceCeilings {
  double e4m3_tflops = 0.0;        ///< the same for e4m3
  double tensor_tflops = 0.0;      ///< bf16 wgmma from shared memory, sustained; 0 below sm_90
  double copy_tbytes_per_s = 0.0;  ///< device to device, bytes read plus bytes written
};
DeviceCeilings measure_device_ceilings();

}  // namespace msa::bench
