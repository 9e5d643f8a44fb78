// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace msa {

enum class DType : std::uint8_t { f32, f64, f16, bf16, e4m3, i8, i32 };

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::e4m3:
    case DType::i8:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "f64";
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::e4m3:
      return "e4m3";
    case DType::i8:
      return "i8";
    case DType::i32:
      return "i32";
  }
  return "unknown";
}

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  friend constexpr bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxRank = 5;

/// A non-owning, strided view. Strides are in elements and may be anything that stays inside the
/// caller's allocation; a default-constructed view (rank 0, null data) means "not given".
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device{};
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};

  /// A row-major view of `data`; the last dimension has stride 1.
  static constexpr TensorView contiguous(void* data, DType dtype, Device device,
                                         std::initializer_list<std::int64_t> shape) {
    TensorView view{.data = data, .dtype = dtype, .device = device};
    for (std::int64_t size : shape) {
      if (view.rank == kMaxRank) break;
      view.shape[static_cast<std::size_t>(view.rank++)] = size;
    }
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.stride[static_cast<std::size_t>(i)] = stride;
      stride *= view.shape[static_cast<std::size_t>(i)];
    }
    return view;
  }

  constexpr bool given() const { return rank != 0; }

  constexpr std::int64_t num_elements() const {
    if (rank == 0) return 0;
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[static_cast<std::size_t>(i)];
    return n;
  }
};

}  // namespace msa
