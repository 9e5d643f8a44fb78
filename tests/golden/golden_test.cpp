// SPDX-License-Identifier: Apache-2.0
//
// The reference against results of make_golden.py, which shares no code with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "reference/reference.hpp"
#include "tests/support/guarded_tensor.hpp"

namespace msa::testing {
namespace {

class Golden {
 public:
  explicit Golden(const std::string& name) {
    std::ifstream file(std::string(MSA_SOURCE_DIR "/tests/golden/") + name + ".bin",
                       std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    if (read_text(8) != std::string("MSAGOLD\0", 8)) throw std::runtime_error("no golden file");
    if (read<std::uint32_t>() != 1) throw std::runtime_error("unknown golden version");
    const auto count = read<std::uint32_t>();
    for (std::uint32_t i = 0; i < count; ++i) {
      const std::string key = read_text(read<std::uint32_t>());
      const DType dtype = read<std::uint32_t>() == 1 ? DType::i32 : DType::f64;
      std::vector<std::int64_t> shape(read<std::uint32_t>());
      for (std::int64_t& size : shape) size = read<std::int64_t>();
      GuardedTensor tensor(dtype, shape, /*row_gap=*/0, GuardedTensor::kPoison);
      const std::size_t size =
          size_of(dtype) * static_cast<std::size_t>(tensor.view().num_elements());
      const std::string data = read_text(size);
      std::memcpy(tensor.view().data, data.data(), size);
      tensors_.emplace(key, std::move(tensor));
    }
    const std::vector<double> p = values_of(tensors_.at("problem"));
    const auto field = [&p](std::size_t i) { return static_cast<int>(p.at(i)); };
    problem = {.num_q_heads = field(0),
               .num_kv_heads = field(1),
               .head_dim = field(2),
               .index_dim = field(3),
               .block_size = field(4),
               .top_k = field(5),
               .num_init_blocks = field(6),
               .num_local_blocks = field(7)};
    batch = {.cu_seqlens_q = (*this)["cu_seqlens_q"],
             .cu_seqlens_k = (*this)["cu_seqlens_k"],
             .page_table = (*this)["page_table"],
             .seq_lens_k = (*this)["seq_lens_k"]};
  }

  /// Not given where the file has no such tensor.
  TensorView operator[](const std::string& key) const {
    const auto found = tensors_.find(key);
    return found == tensors_.end() ? TensorView{} : found->second.view();
  }

  Problem problem{};
  Batch batch{};

 private:
  std::string read_text(std::size_t size) {
    if (size > bytes_.size() - position_) throw std::runtime_error("golden file is cut short");
    position_ += size;
    return bytes_.substr(position_ - size, size);
  }
  template <class T>
  T read() {
    T value{};
    std::memcpy(&value, read_text(sizeof(T)).data(), sizeof(T));
    return value;
  }

  std::string bytes_;
  std::size_t position_ = 0;
  std::map<std::string, GuardedTensor> tensors_;
};

GuardedTensor like(const TensorView& view) {
  return {view.dtype,
          {view.shape.begin(), view.shape.begin() + view.rank},
          /*row_gap=*/2,
          GuardedTensor::kSentinel};
}

/// Both sides are float64 and sum the same numbers in another order. With n the most terms that any
/// element depends on through sums (a dot product inside a softmax inside a sum over queries), each
/// side is within about n * u of exact relative to the terms' magnitudes, for which the largest
/// element of the tensor stands; the factor 4 is for both sides and for terms that cancel.
void expect_close(const Golden& golden, const char* key, const TensorView& actual) {
  const std::vector<double> expected = values_of(golden[key]);
  const std::vector<double> values = values_of(actual);
  ASSERT_EQ(values.size(), expected.size()) << key;
  double largest = 0.0;
  for (double x : expected) largest = std::isfinite(x) ? std::max(largest, std::fabs(x)) : largest;
  const Problem& p = golden.problem;
  const double n = static_cast<double>(p.head_dim + p.index_dim + golden["k"].num_elements() +
                                       golden["q"].num_elements());
  const double tolerance = 4.0 * n * 0x1p-53 * largest;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(expected[i])) {
      ASSERT_LE(std::fabs(values[i] - expected[i]), tolerance) << key << " element " << i;
    } else {
      ASSERT_EQ(values[i], expected[i]) << key << " element " << i;  // -inf
    }
  }
}

class GoldenFile : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenFile, IndexerScores) {
  const Golden golden(GetParam());
  const GuardedTensor scores = like(golden["block_scores"]);
  Batch batch = golden.batch;
  // The script makes columns for the longest sequence only.
  batch.max_seq_len_k = golden["block_scores"].shape[2] * golden.problem.block_size;
  reference::indexer_scores({.problem = golden.problem,
                             .batch = batch,
                             .index_q = golden["index_q"],
                             .index_k = golden["index_k"],
                             .block_scores = scores});
  expect_close(golden, "block_scores", scores);
}

TEST_P(GoldenFile, SelectTopK) {
  const Golden golden(GetParam());
  const GuardedTensor ids = like(golden["block_ids"]);
  Batch batch = golden.batch;
  batch.page_table = {};
  reference::select_top_k({.problem = golden.problem,
                           .batch = batch,
                           .block_scores = golden["block_scores"],
                           .block_ids = ids});
  EXPECT_EQ(values_of(ids), values_of(golden["block_ids"]));
}

TEST_P(GoldenFile, Indexer) {
  const Golden golden(GetParam());
  const GuardedTensor ids = like(golden["block_ids"]);
  reference::indexer({.problem = golden.problem,
                      .batch = golden.batch,
                      .index_q = golden["index_q"],
                      .index_k = golden["index_k"],
                      .block_ids = ids});
  EXPECT_EQ(values_of(ids), values_of(golden["block_ids"]));
}

TEST_P(GoldenFile, SparseAttentionForward) {
  const Golden golden(GetParam());
  const GuardedTensor out = like(golden["out"]);
  const GuardedTensor lse = like(golden["lse"]);
  reference::sparse_attention_forward({.problem = golden.problem,
                                       .batch = golden.batch,
                                       .q = golden["q"],
                                       .k = golden["k"],
                                       .v = golden["v"],
                                       .block_ids = golden["block_ids"],
                                       .out = out,
                                       .lse = lse});
  expect_close(golden, "out", out);
  expect_close(golden, "lse", lse);
}

TEST_P(GoldenFile, DenseAttentionForward) {
  const Golden golden(GetParam());
  const GuardedTensor out = like(golden["out"]);
  const GuardedTensor lse = like(golden["lse"]);
  reference::dense_attention_forward({.problem = golden.problem,
                                      .batch = golden.batch,
                                      .q = golden["q"],
                                      .k = golden["k"],
                                      .v = golden["v"],
                                      .out = out,
                                      .lse = lse});
  expect_close(golden, "dense_out", out);
  expect_close(golden, "dense_lse", lse);
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenFile, ::testing::Values("ragged", "init_local", "paged"),
                         [](const auto& test) { return std::string(test.param); });

/// The file and whether the support is dense (warm-up) or the selection.
class GoldenGradient : public ::testing::TestWithParam<std::pair<const char*, bool>> {
 protected:
  Golden golden_{GetParam().first};
  std::string prefix_ = GetParam().second ? "dense_" : "";
  TensorView block_ids_ = GetParam().second ? TensorView{} : golden_["block_ids"];
};

TEST_P(GoldenGradient, SparseAttentionBackward) {
  const GuardedTensor dq = like(golden_["q"]);
  const GuardedTensor dk = like(golden_["k"]);
  const GuardedTensor dv = like(golden_["v"]);
  reference::sparse_attention_backward({.problem = golden_.problem,
                                        .batch = golden_.batch,
                                        .q = golden_["q"],
                                        .k = golden_["k"],
                                        .v = golden_["v"],
                                        .block_ids = block_ids_,
                                        .out = golden_[prefix_ + "out"],
                                        .lse = golden_[prefix_ + "lse"],
                                        .dout = golden_["dout"],
                                        .dq = dq,
                                        .dk = dk,
                                        .dv = dv});
  expect_close(golden_, (prefix_ + "dq").c_str(), dq);
  expect_close(golden_, (prefix_ + "dk").c_str(), dk);
  expect_close(golden_, (prefix_ + "dv").c_str(), dv);
}

TEST_P(GoldenGradient, IndexerKlBackward) {
  const GuardedTensor loss = like(golden_["loss"]);
  const GuardedTensor dindex_q = like(golden_["index_q"]);
  const GuardedTensor dindex_k = like(golden_["index_k"]);
  reference::indexer_kl_backward(
      {.problem = golden_.problem,
       .batch = golden_.batch,
       .q = golden_["q"],
       .k = golden_["k"],
       .index_q = golden_["index_q"],
       .index_k = golden_["index_k"],
       .block_ids = block_ids_,
       .loss_coefficient = static_cast<float>(values_of(golden_["loss_coefficient"])[0]),
       .loss = loss,
       .dindex_q = dindex_q,
       .dindex_k = dindex_k});
  expect_close(golden_, (prefix_ + "loss").c_str(), loss);
  expect_close(golden_, (prefix_ + "dindex_q").c_str(), dindex_q);
  expect_close(golden_, (prefix_ + "dindex_k").c_str(), dindex_k);
}

INSTANTIATE_TEST_SUITE_P(Files, GoldenGradient,
                         ::testing::Values(std::pair{"ragged", false}, std::pair{"ragged", true},
                                           std::pair{"init_local", false},
                                           std::pair{"init_local", true}),
                         [](const auto& test) {
                           return std::string(test.param.first) +
                                  (test.param.second ? "_dense" : "_sparse");
                         });

TEST(GoldenPaged, AppendKv) {
  const Golden golden("paged");
  reference::append_kv({.problem = golden.problem,
                        .batch = golden.batch,
                        .k = golden["k_new"],
                        .v = golden["v_new"],
                        .index_k = golden["index_k_new"],
                        .k_pages = golden["k_before"],
                        .v_pages = golden["v_before"],
                        .index_k_pages = golden["index_k_before"]});
  for (const char* key : {"k", "v", "index_k"}) {
    const TensorView expected = golden[key];
    const TensorView actual = golden[std::string(key) + "_before"];
    // Bytes: what belongs to no token is NaN and stays so.
    EXPECT_EQ(std::memcmp(actual.data, expected.data,
                          static_cast<std::size_t>(expected.num_elements()) * sizeof(double)),
              0)
        << key;
  }
}

}  // namespace
}  // namespace msa::testing
