// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace msa::cuda {

struct DeviceInfo {
  std::string name;            ///< "NVIDIA H100 80GB HBM3"
  int compute_capability = 0;  ///< 90 for 9.0
  int num_sms = 0;
  double memory_gib = 0.0;
};

/// The visible GPUs; empty, with the reason in `why_none`, without a driver or a device.
std::vector<DeviceInfo> devices(std::string& why_none);

/// Of device `index`, asked for once in the life of the process: 90 for 9.0; 0: no such device.
int compute_capability(int index);
/// Of device `index`; 0: no such device.
int num_sms(int index);

}  // namespace msa::cuda
