// SPDX-License-Identifier: Apache-2.0
//
// The reference's gradients against central differences of its own forward pass and loss, in
// double.
#include <gtest/gtest.h>

#include <cmath>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

/// (f(x + h) - f(x - h)) / 2h for one element, and how far it may be from the derivative.
struct Slope {
  double value = 0.0;
  double error = 0.0;
};

/// The truncation error of a central difference is c * h^2 + O(h^4). Differences with steps h and
/// 2h differ by 3 * c * h^2, so their distance bounds the error of the first one three times over.
/// To that comes the rounding of f: `magnitude` is the sum of magnitudes of its terms, each within
/// `terms` * 2^-53.
template <class F>
Slope central_difference(const TensorView& x, std::int64_t offset, F f, double magnitude,
                         double terms) {
  constexpr double kStep = 1e-3;
  std::byte* const element = core::address_at(x, offset);
  const double at = core::load_element(element, x.dtype);
  const auto difference = [&](double step) {
    core::store_element(element, x.dtype, at + step);
    const double high = f();
    core::store_element(element, x.dtype, at - step);
    const double low = f();
    core::store_element(element, x.dtype, at);
    return (high - low) / (2 * step);
  };
  const double near = difference(kStep);
  const double far = difference(2 * kStep);
  return {near, std::fabs(far - near) + 2 * terms * 0x1p-53 * magnitude / kStep};
}

/// Checks `gradient` of f at every element of x; returns the largest gradient seen.
template <class F>
double expect_gradient(const char* name, const TensorView& x, const TensorView& gradient, F f,
                       double magnitude, double terms) {
  double largest = 0.0;
  for_each_index(x, [&](const auto& indices) {
    const Slope slope = central_difference(x, offset_at(x, indices), f, magnitude, terms);
    const double actual = core::load_element(
        core::address_at(gradient, offset_at(gradient, indices)), gradient.dtype);
    largest = std::max(largest, std::fabs(actual));
    EXPECT_LE(std::fabs(actual - slope.value), slope.error)
        << name << '[' << indices[0] << ", " << indices[1] << ", " << indices[2] << "] is "
        << actual << ", the slope is " << slope.value;
  });
  return largest;
}

double terms_of(const Case& spec) {
  // A score, a row's softmax and sums over it, then the sum over rows.
  double tokens = 0.0;
  for (const Lengths& lengths : spec.sequences)
    tokens += static_cast<double>(lengths.k + lengths.q);
  return 4 * (tokens + spec.problem.head_dim + spec.problem.index_dim) * spec.problem.num_q_heads;
}

const Problem kSmall{.num_q_heads = 4,
                     .num_kv_heads = 2,
                     .head_dim = 3,
                     .index_dim = 2,
                     .block_size = 16,
                     .top_k = 2};

class Gradient : public ::testing::TestWithParam<Case> {
 protected:
  /// Both stages of training: the selection, then the dense support of the warm-up.
  template <class Args, class Check>
  void for_both_supports(Check check) {
    for (const bool warm_up : {false, true}) {
      SCOPED_TRACE(warm_up ? "dense support" : "selected blocks");
      Inputs inputs(GetParam());
      auto args = inputs.args<Args>();
      if (warm_up) args.block_ids = {};
      const Outputs outputs(inputs, args);
      check(inputs, args, warm_up);
    }
  }
};

TEST_P(Gradient, SparseAttentionBackward) {
  for_both_supports<SparseAttentionBackward>(
      [](Inputs& inputs, SparseAttentionBackward args, bool warm_up) {
        reference::sparse_attention_backward(args);
        auto sparse = inputs.args<SparseAttentionForward>();
        const Outputs sparse_outputs(inputs, sparse);
        auto dense = inputs.args<DenseAttentionForward>();
        const Outputs dense_outputs(inputs, dense);
        const std::vector<double> dout = values_of(args.dout);
        double magnitude = 0.0;
        const auto loss = [&] {
          if (warm_up) {
            reference::dense_attention_forward(dense);
          } else {
            reference::sparse_attention_forward(sparse);
          }
          const std::vector<double> out = values_of(warm_up ? dense.out : sparse.out);
          double sum = 0.0;
          magnitude = 0.0;
          for (std::size_t i = 0; i < out.size(); ++i) {
            sum += out[i] * dout[i];
            magnitude += std::fabs(out[i] * dout[i]);
          }
          return sum;
        };
        loss();
        const double terms = terms_of(inputs.spec);
        EXPECT_GT(expect_gradient("dq", inputs.q, args.dq, loss, magnitude, terms), 0.01);
        EXPECT_GT(expect_gradient("dk", inputs.k, args.dk, loss, magnitude, terms), 0.01);
        EXPECT_GT(expect_gradient("dv", inputs.v, args.dv, loss, magnitude, terms), 0.01);
      });
}

TEST_P(Gradient, IndexerKlBackward) {
  for_both_supports<IndexerKlBackward>([](Inputs& inputs, IndexerKlBackward args, bool) {
    args.loss_coefficient = 8.0f;  // so that gradients stand well above rounding
    reference::indexer_kl_backward(args);
    IndexerKlBackward only_loss = args;
    only_loss.dindex_q = only_loss.dindex_k = {};
    const auto loss = [&] {
      reference::indexer_kl_backward(only_loss);
      return core::load(only_loss.loss, 0);
    };
    // The loss is a mean of terms p * log(p / q), whose parts are below |log p| <= 20 here.
    const double magnitude = 20.0 * 8.0;
    const double terms = terms_of(inputs.spec);
    EXPECT_GT(expect_gradient("dindex_q", inputs.index_q, args.dindex_q, loss, magnitude, terms),
              0.01);
    EXPECT_GT(expect_gradient("dindex_k", inputs.index_k, args.dindex_k, loss, magnitude, terms),
              0.01);
  });
}

INSTANTIATE_TEST_SUITE_P(Small, Gradient,
                         ::testing::Values(Case{.name = "ragged",
                                                .problem = kSmall,
                                                .dtype = DType::f64,
                                                .sequences = {{2, 40}, {0, 3}, {4, 4}, {3, 2}}},
                                           Case{.name = "one_sequence",
                                                .problem = {.num_q_heads = 2,
                                                            .num_kv_heads = 1,
                                                            .head_dim = 4,
                                                            .index_dim = 3,
                                                            .block_size = 16,
                                                            .top_k = 3,
                                                            .num_init_blocks = 1},
                                                .dtype = DType::f64,
                                                .sequences = {{4, 55}},
                                                .selection = Selection::any_order,
                                                .give_offsets = false},
                                           Case{.name = "scattered",
                                                .problem = kSmall,
                                                .dtype = DType::f64,
                                                .sequences = {{5, 40}},
                                                .selection = Selection::scattered}),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace msa::testing
