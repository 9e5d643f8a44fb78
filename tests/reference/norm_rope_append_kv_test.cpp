// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "msa/error.hpp"
#include "msa/ops.hpp"

namespace msa::testing {
namespace {

constexpr Problem kProblem{.num_q_heads = 4,
                           .num_kv_heads = 2,
                           .head_dim = 40,
                           .index_dim = 36,
                           .block_size = 16,
                           .top_k = 2};
constexpr std::int64_t kTokens = 6;
constexpr std::int64_t kRotaryDim = 20;

void fill(const core::Tensor& tensor, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const TensorView& view = tensor.view();
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    const std::int64_t at = i * static_cast<std::int64_t>(size_of(view.dtype));
    core::store_element(static_cast<std::byte*>(view.data) + at, view.dtype, normal(random));
  }
}

double at(const TensorView& view, std::int64_t i) {
  return core::load_element(core::address_at(view, i), view.dtype);
}

/// Two sequences of three new tokens; the second's last page does not exist.
struct Case {
  explicit Case(DType dtype, DType cache)
      : k_pages(cache, {3, 2, 16, 40}), v_pages(cache, {3, 2, 16, 40}) {
    const std::int32_t table[] = {2, 0, 1, 7};
    std::copy(std::begin(table), std::end(table), page_table.data<std::int32_t>());
    seq_lens_k.data<std::int32_t>()[0] = 18;
    seq_lens_k.data<std::int32_t>()[1] = 17;
    q = core::Tensor(dtype, {kTokens, 4, 40});
    k = core::Tensor(dtype, {kTokens, 2, 40});
    v = core::Tensor(dtype, {kTokens, 2, 40});
    index_q = core::Tensor(dtype, {kTokens, 2, 36});
    index_k = core::Tensor(dtype, {kTokens, 1, 36});
    index_k_pages = core::Tensor(dtype, {3, 1, 16, 36});
    std::uint32_t seed = 1;
    for (const core::Tensor* tensor :
         {&q, &k, &v, &index_q, &index_k, &weight, &index_weight, &cos_sin}) {
      fill(*tensor, seed++);
    }
    args = {.problem = kProblem,
            .batch = {.page_table = page_table, .seq_lens_k = seq_lens_k},
            .q = q,
            .k = k,
            .v = v,
            .index_q = index_q,
            .index_k = index_k,
            .q_weight = weight,
            .k_weight = weight,
            .index_q_weight = index_weight,
            .index_k_weight = index_weight,
            .norm_weight_offset = 1.0f,
            .cos_sin = cos_sin,
            .q_out = q_out,
            .index_q_out = index_q_out,
            .k_pages = k_pages,
            .v_pages = v_pages,
            .index_k_pages = index_k_pages,
            .index_k_codes_pages = codes,
            .index_k_scales_pages = scales};
  }

  void run(const char* backend) { plan(args, {.backend = backend}).run(args); }

  /// Head `head` of token `token` in double precision.
  std::vector<double> expected(const TensorView& rows, const TensorView& weights,
                               std::int64_t token, std::int64_t head, std::int64_t position) const {
    const std::int64_t dim = rows.shape[2];
    std::vector<double> x;
    double squares = 0.0;
    for (std::int64_t d = 0; d < dim; ++d) {
      x.push_back(core::load(rows, token, head, d));
      squares += x.back() * x.back();
    }
    const double r = 1.0 / std::sqrt(squares / static_cast<double>(dim) + 1e-6);
    for (std::size_t d = 0; d < x.size(); ++d) {
      x[d] *= r * (1.0 + at(weights, static_cast<std::int64_t>(d)));
    }
    std::vector<double> out = x;
    constexpr std::size_t kHalf = kRotaryDim / 2;
    for (std::size_t i = 0; i < kHalf; ++i) {
      const double cosine = core::load(args.cos_sin, position, i);
      const double sine = core::load(args.cos_sin, position, i + kHalf);
      out[i] = x[i] * cosine - x[i + kHalf] * sine;
      out[i + kHalf] = x[i + kHalf] * cosine + x[i] * sine;
    }
    return out;
  }

  core::Tensor page_table{DType::i32, {2, 2}};
  core::Tensor seq_lens_k{DType::i32, {2}};
  core::Tensor q, k, v, index_q, index_k, index_k_pages;
  core::Tensor k_pages, v_pages;
  core::Tensor q_out{DType::f32, {kTokens, 4, 40}};
  core::Tensor index_q_out{DType::f32, {kTokens, 2, 36}};
  core::Tensor weight{DType::f32, {40}};
  core::Tensor index_weight{DType::bf16, {36}};
  core::Tensor cos_sin{DType::f32, {32, kRotaryDim}};
  core::Tensor codes{DType::i8, {3, 1, 16, 36}};
  core::Tensor scales{DType::bf16, {3, 1, 16, 2}};
  NormRopeAppendKv args;
};

/// Roundings of f32 on the way of an element: a sum of up to 40 squares (less than 40), mean, eps,
/// root and reciprocal, then weight, two products and the rotation: below 64 units of 2^-24, of
/// magnitudes up to the sum of both products of the rotation, here below 64.
constexpr double kTolerance = 64 * 64 * 0x1p-24;

TEST(NormRopeAppendKv, AgreesWithDoublePrecision) {
  Case c(DType::f32, DType::f32);
  c.run("reference");
  for (std::int64_t token = 0; token < kTokens; ++token) {
    const std::int64_t position = token < 3 ? 15 + token : 14 + token - 3;
    for (std::int64_t head = 0; head < 4; ++head) {
      const auto y = c.expected(c.q, c.weight, token, head, position);
      for (std::size_t d = 0; d < y.size(); ++d) {
        EXPECT_NEAR(core::load(c.q_out, token, head, d), y[d], kTolerance);
      }
    }
    // Positions 15 of page 2, 16 and 17 of page 0; 14 and 15 of page 1, 16 has no page.
    const std::int64_t page = token == 0 ? 2 : token < 3 ? 0 : 1;
    if (token == 5) continue;
    for (std::int64_t head = 0; head < 2; ++head) {
      const auto y = c.expected(c.k, c.weight, token, head, position);
      for (std::size_t d = 0; d < y.size(); ++d) {
        EXPECT_NEAR(core::load(c.k_pages, page, head, position % 16, d), y[d], kTolerance);
        EXPECT_EQ(core::load(c.v_pages, page, head, position % 16, d),
                  core::load(c.v, token, head, d));
      }
    }
    const auto y = c.expected(c.index_k, c.index_weight, token, 0, position);
    double squares = 0.0;
    const double scale = core::load(c.scales, page, 0, position % 16, 0);
    for (std::size_t d = 0; d < y.size(); ++d) {
      const double stored = core::load(c.index_k_pages, page, 0, position % 16, d);
      EXPECT_NEAR(stored, y[d], kTolerance);
      const double rest = stored - scale * core::load(c.codes, page, 0, position % 16, d);
      squares += rest * rest;
    }
    EXPECT_GT(scale, 0.0);
    EXPECT_LE(std::sqrt(squares), core::load(c.scales, page, 0, position % 16, 1));
  }
}

TEST(NormRopeAppendKv, E4m3PagesHoldKeysOverTheirScale) {
  Case wide(DType::bf16, DType::f32);
  wide.run("reference");
  Case narrow(DType::bf16, DType::e4m3);
  core::Tensor k_scale(DType::f32, {2});
  k_scale.data<float>()[0] = 0.25f;
  k_scale.data<float>()[1] = 0.003f;  // saturates
  narrow.args.k_scale = k_scale;
  narrow.run("reference");
  for (std::int64_t head = 0; head < 2; ++head) {
    for (std::int64_t d = 0; d < 40; ++d) {
      const auto key = static_cast<float>(core::load(wide.k_pages, 2, head, 15, d));
      EXPECT_EQ(core::load(narrow.k_pages, 2, head, 15, d),
                static_cast<double>(
                    core::e4m3_to_f32(core::f32_to_e4m3(key / k_scale.data<float>()[head]))));
    }
  }
}

TEST(NormRopeAppendKv, CpuIsBitwiseTheReference) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const DType cache : {dtype, DType::e4m3}) {
      Case a(dtype, cache);
      Case b(dtype, cache);
      a.run("reference");
      b.run("cpu");
      for (const auto& [x, y] : {std::pair{&a.q_out, &b.q_out},
                                 {&a.index_q_out, &b.index_q_out},
                                 {&a.k_pages, &b.k_pages},
                                 {&a.v_pages, &b.v_pages},
                                 {&a.index_k_pages, &b.index_k_pages},
                                 {&a.codes, &b.codes},
                                 {&a.scales, &b.scales}}) {
        const std::size_t bytes =
            static_cast<std::size_t>(x->view().num_elements()) * size_of(x->view().dtype);
        EXPECT_EQ(std::memcmp(x->view().data, y->view().data, bytes), 0);
      }
    }
  }
}

TEST(NormRopeAppendKv, WorksInPlaceAndTakesPositions) {
  Case apart(DType::f32, DType::f32);
  core::Tensor positions(DType::i32, {kTokens});
  for (std::int32_t i = 0; i < 6; ++i) positions.data<std::int32_t>()[i] = 3 * i;
  positions.data<std::int32_t>()[4] = 32;  // outside the table: nothing is written
  apart.args.positions = positions;
  apart.run("reference");
  Case in_place(DType::f32, DType::f32);
  in_place.args.positions = positions;
  in_place.args.q_out = in_place.q;
  in_place.run("reference");
  const auto y = in_place.expected(apart.q, apart.weight, 2, 1, 6);
  for (std::int64_t d = 0; d < 40; ++d) {
    EXPECT_EQ(core::load(in_place.q, 2, 1, d), core::load(apart.q_out, 2, 1, d));
    EXPECT_NEAR(core::load(apart.q_out, 2, 1, d), y[static_cast<std::size_t>(d)], kTolerance);
    EXPECT_EQ(core::load(apart.q_out, 4, 1, d), 0.0);
    EXPECT_EQ(core::load(apart.k_pages, 1, 0, 15, d), 0.0);
    EXPECT_NE(core::load(apart.k_pages, 1, 0, 14, d), 0.0);
  }
}

TEST(NormRopeAppendKv, RefusesWhatDoesNotFit) {
  const auto message = [](auto change) -> std::string {
    Case c(DType::f32, DType::f32);
    change(c.args);
    try {
      (void)plan(c.args);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  using Args = NormRopeAppendKv;
  const auto expect = [&](auto change, const char* text) {
    EXPECT_NE(message(change).find(text), std::string::npos) << message(change);
  };
  expect([](Args& a) { a.q_out = {}; }, "q and q_out must be given together");
  expect([](Args& a) { a.q = a.q_out = {}; }, "q_weight is given without q");
  expect([](Args& a) { a.norm_eps = -1.0f; }, "norm_eps is -1");
  expect([](Args& a) { a.cos_sin.shape[1] = 19; }, "rotary_dim 19, expected an even number");
  expect([](Args& a) { a.cos_sin.shape[1] = 38; }, "from 2 to 36");
  expect([](Args& a) { a.k_scale = a.q_weight; }, "k_scale is given, but k_pages has dtype f32");
  expect([](Args& a) { a.k_weight.dtype = DType::f64; }, "k_weight has dtype f64");
}

}  // namespace
}  // namespace msa::testing
