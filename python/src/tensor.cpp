// SPDX-License-Identifier: Apache-2.0
//
// Arrays in and out through DLPack. Libraries that can't name bf16 or e4m3 there pass the bits as
// unsigned integers and the dtype beside them.
#include "tensor.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

namespace nb = nanobind;

namespace msa_python {
namespace {

using Code = nb::dlpack::dtype_code;

constexpr nb::dlpack::dtype dlpack_dtype(Code code, std::uint8_t bits) {
  return {static_cast<std::uint8_t>(code), bits, 1};
}

struct NamedDType {
  msa::DType dtype;
  nb::dlpack::dtype dlpack;
};

constexpr NamedDType kDTypes[] = {
    {msa::DType::f32, dlpack_dtype(Code::Float, 32)},
    {msa::DType::f64, dlpack_dtype(Code::Float, 64)},
    {msa::DType::f16, dlpack_dtype(Code::Float, 16)},
    {msa::DType::bf16, dlpack_dtype(Code::Bfloat, 16)},
    {msa::DType::e4m3, dlpack_dtype(Code::Float8_E4M3FN, 8)},
    {msa::DType::i8, dlpack_dtype(Code::Int, 8)},
    {msa::DType::i32, dlpack_dtype(Code::Int, 32)},
};

const NamedDType& named(const std::string& dtype) {
  for (const NamedDType& row : kDTypes) {
    if (dtype == msa::name_of(row.dtype)) return row;
  }
  throw nb::value_error(("no dtype is named " + dtype).c_str());
}

msa::DType dtype_of(const std::string& name, nb::dlpack::dtype dlpack) {
  for (const NamedDType& row : kDTypes) {
    if (row.dlpack == dlpack) return row.dtype;
  }
  throw nb::value_error((name + " has an element type that no operation takes (DLPack code " +
                         std::to_string(dlpack.code) + ", " + std::to_string(dlpack.bits) +
                         " bits); there are float32, float64, float16, bfloat16, float8_e4m3fn, "
                         "int8 and int32")
                            .c_str());
}

msa::Device device_of(const std::string& name, const nb::ndarray<nb::ro>& array) {
  switch (array.device_type()) {
    case nb::device::cpu::value:
    case nb::device::cuda_host::value:
      return {};
    case nb::device::cuda::value:
    case nb::device::cuda_managed::value:
      return {msa::DeviceType::cuda, array.device_id()};
    default:
      throw nb::value_error((name + " is neither on the CPU nor on a CUDA device").c_str());
  }
}

/// `array`: anything with __dlpack__ or the buffer protocol, or a DLPack capsule.
Tensor import_tensor(nb::object array, const std::string& name, bool writable,
                     const std::optional<std::string>& dtype) {
  nb::ndarray<nb::ro> owner;
  if (writable) {
    nb::ndarray<> written;
    if (!nb::try_cast(array, written, false)) {
      throw nb::type_error(
          (name + " is written to, but gives no writable memory through DLPack").c_str());
    }
    owner = nb::ndarray<nb::ro>(written);
  } else if (!nb::try_cast(array, owner, false)) {
    throw nb::type_error((name + " is no array: it can't be read through DLPack").c_str());
  }
  if (owner.ndim() == 0 || owner.ndim() > static_cast<std::size_t>(msa::kMaxRank)) {
    throw nb::value_error((name + " has " + std::to_string(owner.ndim()) +
                           " dimensions, expected 1 to " + std::to_string(msa::kMaxRank))
                              .c_str());
  }
  msa::TensorView view{.data = const_cast<void*>(owner.data()), .device = device_of(name, owner)};
  view.dtype = dtype ? named(*dtype).dtype : dtype_of(name, owner.dtype());
  view.rank = static_cast<int>(owner.ndim());
  for (std::size_t i = 0; i < owner.ndim(); ++i) {
    view.shape[i] = static_cast<std::int64_t>(owner.shape(i));
    view.stride[i] = owner.stride(i);
  }
  if (dtype && msa::size_of(view.dtype) * 8 != owner.dtype().bits) {
    throw nb::value_error(
        (name + ": the bits passed for " + *dtype + " have another size").c_str());
  }
  return {.owner = std::move(owner), .view = view};
}

/// An object with __dlpack__ for the memory of `array`, a row-major one whose bits are a `dtype`.
nb::object export_as(const nb::ndarray<>& array, const std::string& dtype) {
  std::vector<std::size_t> shape;
  for (std::size_t i = 0; i < array.ndim(); ++i) shape.push_back(array.shape(i));
  const nb::object owner = nb::find(array).is_valid() ? nb::find(array) : nb::cast(array);
  return nb::cast(nb::ndarray<nb::array_api>(array.data(), shape.size(), shape.data(), owner,
                                             nullptr, named(dtype).dlpack, array.device_type(),
                                             array.device_id()));
}

}  // namespace

void bind_tensor(nb::module_& module) {
  nb::class_<Tensor>(module, "Tensor")
      .def(
          "__init__",
          [](Tensor* self, nb::object array, const std::string& name, bool writable,
             const std::optional<std::string>& dtype) {
            new (self) Tensor(import_tensor(std::move(array), name, writable, dtype));
          },
          nb::arg("array"), nb::arg("name"), nb::arg("writable"), nb::arg("dtype").none())
      .def_prop_ro("pointer", [](const Tensor& self) {
        return reinterpret_cast<std::uintptr_t>(self.view.data);
      });
  module.def("export_as", &export_as);
}

}  // namespace msa_python
