// SPDX-License-Identifier: Apache-2.0
//
// Requests of a decode step whose index keys try to break the bound by which
// cuda_sm90_decode_screened leaves blocks out.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/tensor.hpp"
#include "msa/ops.hpp"
#include "tests/support/device.hpp"

namespace msa::testing {

/// A fast source of numbers, the same everywhere.
class Noise {
 public:
  explicit Noise(std::uint64_t seed) : state_(seed * 2 + 1) {}
  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  std::int64_t below(std::int64_t end) { return bits() % end; }
  double uniform() { return static_cast<double>(bits()) * 0x1p-31; }
  /// Mean 0, variance 1.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7320508; }

 private:
  std::uint64_t state_;
};

struct Request {
  std::int32_t num_queries;
  std::int32_t num_keys;
};

/// Index queries, pages of index keys and their codes, of 128 dimensions in blocks of 128 keys, in
/// host memory first and then on the device.
class ScreenedDecode {
 public:
  static constexpr std::int64_t kDim = 128;
  static constexpr std::int64_t kBlock = 128;

  ScreenedDecode(DType dtype, int heads, int top_k, std::vector<Request> requests);

  std::int64_t num_requests() const { return std::ssize(requests_); }
  std::int64_t num_keys(std::int64_t request) const {
    return requests_[static_cast<std::size_t>(request)].num_keys;
  }
  std::int64_t total_q() const { return total_q_; }
  std::int64_t max_blocks() const { return max_blocks_; }
  int heads() const { return problem.num_kv_heads; }

  void set_query(std::int64_t row, std::int64_t head, std::int64_t d, double value) const;
  void set_key(std::int64_t request, std::int64_t token, std::int64_t d, double value) const;
  /// Every element of all queries, or of all keys.
  void fill_queries(const std::function<double(std::int64_t d)>& value) const;
  void fill_keys(const std::function<double(std::int64_t token, std::int64_t d)>& value) const;
  /// Changes `count` elements of keys anywhere.
  void plant(Noise& noise, int count, double value) const;
  /// Makes the entry of the page table one that no page has.
  void lose_page(std::int64_t request, std::int64_t block, std::int32_t id) const;

  /// Codes of all keys, then copies of everything on the device.
  void upload();
  /// Arguments on the device; block_ids are `ids`.
  Indexer args(const TensorView& ids) const;
  /// What a backend selects: [heads][total_q][top_k].
  std::vector<std::int32_t> select(const char* backend) const;

  Problem problem;

 private:
  TensorView on_device(const core::Tensor& tensor, std::size_t slot) const;

  DType dtype_;
  std::vector<Request> requests_;
  std::int64_t total_q_ = 0;
  std::int64_t max_blocks_ = 0;
  core::Tensor cu_seqlens_q_, seq_lens_k_, page_table_, index_q_, index_k_, codes_, scales_;
  std::vector<DeviceBuffer> copies_{};
};

struct ScreenFamily {
  const char* name;
  std::function<void(const ScreenedDecode& decode, Noise& noise)> fill;
};

/// Ways to fill queries and keys.
const std::vector<ScreenFamily>& screen_families();

}  // namespace msa::testing
