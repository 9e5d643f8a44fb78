// SPDX-License-Identifier: Apache-2.0
//
// What the longer examples share: memory for a tensor, stand-ins for a model's projections, and
// plan() with its workspace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <span>
#include <type_traits>
#include <vector>

#include "msa/msa.hpp"

namespace example {

/// A contiguous, zeroed tensor in host memory; views of it are what the library takes.
template <class T>
class Tensor {
 public:
  explicit Tensor(std::initializer_list<std::int64_t> shape)
      : view_(msa::TensorView::contiguous(
            nullptr, std::is_same_v<T, float> ? msa::DType::f32 : msa::DType::i32, {}, shape)),
        data_(static_cast<std::size_t>(view_.num_elements())) {
    view_.data = data_.data();
  }
  Tensor(const Tensor&) = delete;  // the view of a copy would still show the original
  Tensor& operator=(const Tensor&) = delete;

  operator const msa::TensorView&() const { return view_; }
  std::int64_t size(std::size_t axis) const { return view_.shape[axis]; }
  std::vector<T>& values() { return data_; }
  /// Element i of the first dimension.
  std::span<T> row(std::int64_t i) {
    return std::span(data_).subspan(static_cast<std::size_t>(i * view_.stride[0]),
                                    static_cast<std::size_t>(view_.stride[0]));
  }

 private:
  msa::TensorView view_;
  std::vector<T> data_;
};

using Floats = Tensor<float>;
using Ints = Tensor<std::int32_t>;

inline void fill(std::span<float> values, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (float& value : values) value = uniform(random);
}

inline float largest_difference(std::span<const float> a, std::span<const float> b) {
  float worst = 0.0f;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] - b[i]));
  return worst;
}

/// An operation that is planned once, with its workspace, and run for every call of the same
/// shapes.
template <class Args>
struct Planned {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  Args args;
  msa::Plan<Args> plan = msa::plan(args);
  std::vector<Line> workspace = std::vector<Line>(plan.workspace_bytes() / sizeof(Line) + 1);

  void run() { plan.run(args, std::as_writable_bytes(std::span(workspace))); }
};

/// Plans and runs. An engine keeps what is planned.
template <class Args>
void run(const Args& args) {
  Planned<Args>{args}.run();
}

/// What a model's projections give for some tokens; one head of keys and values.
struct Projections {
  Projections(std::int64_t tokens, std::int64_t heads, std::int64_t dim)
      : q({tokens, heads, dim}),
        k({tokens, 1, dim}),
        v({tokens, 1, dim}),
        index_q({tokens, 1, dim}),
        index_k({tokens, 1, dim}) {}

  /// Row `row` becomes that of `token`: the same numbers wherever a token turns up.
  void set(std::int64_t row, std::uint32_t token) {
    std::mt19937 random(token);
    for (Floats* tensor : {&q, &k, &v, &index_q, &index_k}) fill(tensor->row(row), random);
  }

  Floats q, k, v, index_q, index_k;
};

/// Chooses blocks for every query of `x` and attends to them; the keys are ragged or paged as
/// `batch` says, `out` is shaped like x.q and `lse` may be left out.
inline void attend(const msa::Problem& problem, const msa::Batch& batch, const Projections& x,
                   const msa::TensorView& k, const msa::TensorView& v,
                   const msa::TensorView& index_k, const msa::TensorView& block_ids,
                   const msa::TensorView& out, const msa::TensorView& lse = {}) {
  run(msa::Indexer{.problem = problem,
                   .batch = batch,
                   .index_q = x.index_q,
                   .index_k = index_k,
                   .block_ids = block_ids});
  run(msa::SparseAttentionForward{.problem = problem,
                                  .batch = batch,
                                  .q = x.q,
                                  .k = k,
                                  .v = v,
                                  .block_ids = block_ids,
                                  .out = out,
                                  .lse = lse});
}

}  // namespace example
