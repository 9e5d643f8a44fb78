// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "msa/tensor.hpp"

namespace msa_python {

/// A view of an array of another library, which stays alive with it.
struct Tensor {
  nanobind::ndarray<nanobind::ro> owner;
  msa::TensorView view;
};

/// Tensor, and export_as() for arrays that we allocate.
void bind_tensor(nanobind::module_& module);
/// PagedKvCache.
void bind_cache(nanobind::module_& module);

}  // namespace msa_python
