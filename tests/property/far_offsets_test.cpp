// SPDX-License-Identifier: Apache-2.0
//
// Tensors that reach beyond 2^31 elements: strides over address space that is reserved and mostly
// never touched. The results equal those of contiguous tensors, bit for bit.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <stdexcept>

#include "tests/property/backends.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

/// A copy of a tensor whose slices along one axis are far apart.
class FarTensor {
 public:
  static constexpr std::int64_t kStride = (std::int64_t{1} << 27) + 32;  // elements, 512 MiB

  FarTensor(const TensorView& near, std::size_t far_axis) : view_(near) {
    std::int64_t reach = 0;
    view_.stride[far_axis] = kStride;
    for (std::size_t axis = 0; axis < static_cast<std::size_t>(view_.rank); ++axis) {
      reach += (view_.shape[axis] - 1) * view_.stride[axis];
    }
    if (reach <= std::int64_t{1} << 31) throw std::logic_error("not far enough");
    bytes_ = static_cast<std::size_t>(reach + 1) * size_of(view_.dtype);
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("can't reserve address space");
    view_.data = memory_;
    if (near.data != nullptr) set_values(view_, values_of(near));
  }
  FarTensor(const FarTensor&) = delete;
  FarTensor& operator=(const FarTensor&) = delete;
  ~FarTensor() { munmap(memory_, bytes_); }

  operator const TensorView&() const { return view_; }

 private:
  TensorView view_;
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

Case spec_of(Keys keys) {
  return {.problem = {.num_q_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 8,
                      .index_dim = 8,
                      .block_size = 16,
                      .top_k = 2},
          .dtype = DType::f32,
          .sequences = {{18, 70}, {3, 210}},
          .keys = keys,
          .row_gap = 0};
}

TEST(FarOffsets, RaggedAndPaged) {
  for (const Keys keys : {Keys::ragged, Keys::paged}) {
    SCOPED_TRACE(static_cast<int>(keys));
    Inputs inputs(spec_of(keys));
    auto near_index = inputs.args<Indexer>();
    auto near = inputs.args<SparseAttentionForward>();
    auto near_dense = inputs.args<DenseAttentionForward>();
    const Outputs a(inputs, near_index);
    const Outputs b(inputs, near);
    const Outputs c(inputs, near_dense);
    const FarTensor q(near.q, 0);
    const FarTensor k(near.k, 0);
    const FarTensor v(near.v, 0);
    const FarTensor index_q(near_index.index_q, 0);
    const FarTensor index_k(near_index.index_k, 0);
    const FarTensor ids(near_index.block_ids, 1);
    const FarTensor out(near.out, 0);
    const FarTensor lse(near.lse, 0);
    for_each_backend([&](const char* backend) {
      Indexer index = near_index;
      index.index_q = index_q;
      index.index_k = index_k;
      index.block_ids = ids;
      run_on(backend, near_index);
      run_on(backend, index);
      EXPECT_EQ(values_of(ids), values_of(near_index.block_ids));

      SparseAttentionForward sparse = near;
      sparse.q = q;
      sparse.k = k;
      sparse.v = v;
      sparse.block_ids = ids;
      sparse.out = out;
      sparse.lse = lse;
      near.block_ids = near_index.block_ids;
      run_on(backend, near);
      run_on(backend, sparse);
      EXPECT_EQ(values_of(out), values_of(near.out));
      EXPECT_EQ(values_of(lse), values_of(near.lse));

      DenseAttentionForward dense = near_dense;
      dense.q = q;
      dense.k = k;
      dense.v = v;
      dense.out = out;
      dense.lse = lse;
      run_on(backend, near_dense);
      run_on(backend, dense);
      EXPECT_EQ(values_of(out), values_of(near_dense.out));
      EXPECT_EQ(values_of(lse), values_of(near_dense.lse));
    });
  }
}

TEST(FarOffsets, AppendedTokens) {
  Inputs inputs(spec_of(Keys::paged));
  for_each_backend([&](const char* backend) {
    auto near = inputs.args<AppendKv>();
    const Outputs outputs(inputs, near);
    AppendKv args = near;
    const FarTensor k(near.k, 0);
    const FarTensor k_pages(near.k_pages, 0);
    args.k = k;
    args.k_pages = k_pages;
    run_on(backend, near);
    run_on(backend, args);
    std::vector<double> expected = values_of(near.k_pages);
    std::vector<double> actual = values_of(k_pages);
    // Rows that nobody wrote are NaN.
    for (auto* values : {&expected, &actual}) {
      for (double& x : *values) x = std::isnan(x) ? -77.0 : x;
    }
    EXPECT_EQ(actual, expected);
  });
}

TEST(FarOffsets, BlockScores) {
  Inputs inputs(spec_of(Keys::ragged));
  for_each_backend([&](const char* backend) {
    auto near = inputs.args<IndexerScores>();
    const Outputs outputs(inputs, near);
    IndexerScores args = near;
    const FarTensor scores(near.block_scores, 1);
    args.block_scores = scores;
    run_on(backend, near);
    run_on(backend, args);
    EXPECT_EQ(values_of(scores), values_of(near.block_scores));
    auto select = inputs.args<SelectTopK>();
    const Outputs near_ids(inputs, select);
    run_on(backend, select);
    SelectTopK far_select = select;
    const FarTensor far_scores(select.block_scores, 1);
    const core::Tensor ids(DType::i32, {2, inputs.total_q, 2});
    far_select.block_scores = far_scores;
    far_select.block_ids = ids;
    run_on(backend, far_select);
    EXPECT_EQ(values_of(ids), values_of(select.block_ids));
  });
}

}  // namespace
}  // namespace msa::testing
