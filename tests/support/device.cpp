// SPDX-License-Identifier: Apache-2.0
//
// What needs no CUDA; the rest is in tests/cuda/device.cpp or, without MSA_CUDA, in no_device.cpp.
#include "tests/support/device.hpp"

#include "core/check.hpp"

namespace msa::testing {

bool runs_on_device(const std::string& backend) { return backend.starts_with("cuda"); }

const DeviceBuffer* DeviceMirror::find(std::span<const std::byte> host) const {
  for (const Pair& pair : pairs_) {
    if (pair.host.data() == host.data()) return &pair.device;
  }
  return nullptr;
}

TensorView DeviceMirror::at(TensorView view,
                            const std::vector<std::span<std::byte>>& host_buffers) {
  if (!view.given()) return view;
  const auto* data = static_cast<std::byte*>(view.data);
  for (const std::span<std::byte> host : host_buffers) {
    if (data < host.data() || data >= host.data() + host.size()) continue;
    const DeviceBuffer* device = find(host);
    if (device == nullptr) {
      pairs_.push_back({host, DeviceBuffer(host.size())});
      device = &pairs_.back().device;
      device->upload(host);
    }
    view.data = device->data() + (data - host.data());
    view.device = {DeviceType::cuda, 0};
    return view;
  }
  throw Error(ErrorCode::internal, core::concat("no test buffer holds the ", name_of(view.dtype),
                                                core::shape_text(view)));
}

}  // namespace msa::testing
