// SPDX-License-Identifier: Apache-2.0
//
// What tests ask of the outputs of a run, whatever the operation.
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {

std::string Outputs::damaged() const {
  for (const Named& named : tensors_) {
    const std::string damage = named.tensor.damaged();
    if (!damage.empty()) return std::string("output ") + named.name + ": " + damage;
  }
  return "";
}

std::string Outputs::difference(const Outputs& other) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const std::string text = tensors_[i].tensor.difference(other.tensors_[i].tensor);
    if (!text.empty()) return std::string("output ") + tensors_[i].name + ": " + text;
  }
  return "";
}

void Outputs::unify_nans() {
  for (const Named& named : tensors_) {
    const TensorView& view = named.tensor;
    if (view.dtype == DType::i32 || view.dtype == DType::i8) continue;
    for_each_index(view, [&](const auto& indices) {
      std::byte* const at = core::address_at(view, offset_at(view, indices));
      if (std::isnan(core::load_element(at, view.dtype))) {
        core::store_element(at, view.dtype, std::numeric_limits<double>::quiet_NaN());
      }
    });
  }
}

std::vector<std::span<std::byte>> Outputs::buffers() const {
  std::vector<std::span<std::byte>> all;
  for (const Named& named : tensors_) all.push_back(named.tensor.bytes());
  return all;
}

}  // namespace msa::testing
