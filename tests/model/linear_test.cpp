// SPDX-License-Identifier: Apache-2.0
#include "model/linear.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/time.h>

#include <atomic>
#include <cmath>

#include "msa/backend.hpp"
#include "msa/error.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

struct Case {
  DType dtype = DType::f32;
  std::int64_t tokens = 1;
  std::int64_t in = 1;
  std::int64_t out = 1;
};

class Threads {
 public:
  explicit Threads(int count) : before_(num_threads()) { set_num_threads(count); }
  ~Threads() { set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

/// Every element against a double sum. Any order of f32 additions of n products errs by at most
/// n u / (1 - n u) times the sum of their magnitudes, u = 2^-24 (Higham's gamma_n).
void check(const Case& c, const TensorView& weight, const std::vector<float>& x) {
  model::LinearScratch scratch;
  std::vector<float> y(static_cast<std::size_t>(c.tokens * c.out), NAN);
  model::linear(weight, x, c.tokens, y, scratch);
  const double nu = static_cast<double>(c.in) * 0x1p-24;
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (std::int64_t o = 0; o < c.out; ++o) {
      double sum = 0.0;
      double magnitude = 0.0;
      for (std::int64_t i = 0; i < c.in; ++i) {
        const double product = core::load(weight, o, i) *
                               static_cast<double>(x[static_cast<std::size_t>(t * c.in + i)]);
        sum += product;
        magnitude += std::fabs(product);
      }
      ASSERT_LE(std::fabs(static_cast<double>(y[static_cast<std::size_t>(t * c.out + o)]) - sum),
                nu / (1.0 - nu) * magnitude)
          << name_of(c.dtype) << " tokens " << c.tokens << " in " << c.in << " out " << c.out
          << " at " << t << ", " << o;
    }
  }
}

TEST(Linear, AgreesWithDoubleForEveryDtypeAndTokenCount) {
  test::Uniform uniform(1);
  for (int threads : {1, 3}) {
    const Threads scope(threads);
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (std::int64_t tokens : {1, 2, 4, 5, 33}) {
        for (const auto& [in, out] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                                      {64, 48},
                                      {130, 7},
                                      {257, 100},
                                      {96, 513}}) {
          const Case c{.dtype = dtype, .tokens = tokens, .in = in, .out = out};
          const core::Tensor weight(dtype, {out, in});
          test::fill(weight, uniform, 1.0);
          check(c, weight, test::random_vector(tokens * in, uniform));
        }
      }
    }
  }
}

TEST(Linear, TakesRowsThatLieApart) {
  test::Uniform uniform(2);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (std::int64_t tokens : {1, 9}) {
      const Case c{.dtype = dtype, .tokens = tokens, .in = 40, .out = 37};
      const core::Tensor storage(dtype, {c.out, c.in + 11});
      test::fill(storage, uniform, 1.0);
      TensorView weight = storage;
      weight.shape[1] = c.in;
      check(c, weight, test::random_vector(tokens * c.in, uniform));
    }
  }
}

TEST(Linear, SeveralProductsAreEachAsAloneOnAnyNumberOfThreads) {
  test::Uniform uniform(3);
  constexpr std::int64_t kIn = 256;
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    // Wide enough for several threads at one token and at many, a width of no tasks, odd ones.
    const core::Tensor weights[] = {core::Tensor(dtype, {700, kIn}), core::Tensor(dtype, {0, kIn}),
                                    core::Tensor(dtype, {33, kIn}),
                                    core::Tensor(dtype, {128, kIn})};
    for (const core::Tensor& weight : weights) test::fill(weight, uniform, 1.0);
    for (std::int64_t tokens : {1, 3, 64}) {
      const std::vector<float> x = test::random_vector(tokens * kIn, uniform);
      std::vector<std::vector<float>> alone;
      for (const core::Tensor& weight : weights) {
        const Threads scope(1);
        model::LinearScratch scratch;
        alone.emplace_back(static_cast<std::size_t>(tokens * weight.view().shape[0]), NAN);
        model::linear(weight, x, tokens, alone.back(), scratch);
      }
      for (int threads : {1, 2, 5}) {
        const Threads scope(threads);
        model::LinearScratch scratch;
        std::vector<std::vector<float>> together;
        std::vector<TensorView> views;
        for (const std::vector<float>& y : alone) together.emplace_back(y.size(), NAN);
        for (const core::Tensor& weight : weights) views.push_back(weight);
        const model::Product products[] = {{views[0], together[0]},
                                           {views[1], together[1]},
                                           {views[2], together[2]},
                                           {views[3], together[3]}};
        model::linear(products, x, tokens, scratch);
        EXPECT_EQ(together, alone)
            << name_of(dtype) << " tokens " << tokens << " threads " << threads;
      }
    }
  }
}

std::atomic<int> num_signals{0};

/// A shape whose sgemm lost its values to every signal that met it, before they were blocked.
TEST(Linear, SignalsDoNotDisturbProducts) {
  struct sigaction count{};
  struct sigaction before{};
  count.sa_handler = [](int) { ++num_signals; };
  count.sa_flags = SA_RESTART;
  ASSERT_EQ(sigaction(SIGALRM, &count, &before), 0);
  const itimerval every_half_millisecond{{0, 500}, {0, 500}};
  ASSERT_EQ(setitimer(ITIMER_REAL, &every_half_millisecond, nullptr), 0);
  const Threads threads(1);
  test::Uniform uniform(4);
  std::vector<float> x(512 * 128);
  std::vector<float> w(16 * 128);
  for (float& value : x) value = static_cast<float>(uniform());
  for (float& value : w) value = static_cast<float>(uniform());
  const TensorView weight = TensorView::contiguous(w.data(), DType::f32, {}, {16, 128});
  model::LinearScratch scratch;
  std::vector<float> first(512 * 16);
  model::linear(weight, x, 512, first, scratch);
  std::vector<float> y(first.size());
  for (int i = 0; i < 2000; ++i) {
    model::linear(weight, x, 512, y, scratch);
    ASSERT_EQ(y, first) << "product " << i << ", signals " << num_signals;
  }
  const itimerval never{};
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &before, nullptr);
  EXPECT_GT(num_signals, 10);  // or nothing was tried
}

TEST(Linear, ExpandsExactly) {
  for (DType dtype : {DType::f16, DType::bf16}) {
    std::vector<std::uint16_t> bits(1 << 16);
    for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
    std::vector<float> out(bits.size());
    model::expand_to_f32(reinterpret_cast<const std::byte*>(bits.data()), dtype, out);
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const double expected = core::load_element(&bits[i], dtype);
      ASSERT_TRUE(static_cast<double>(out[i]) == expected ||
                  (std::isnan(out[i]) && std::isnan(expected)))
          << name_of(dtype) << " " << i;
    }
  }
}

TEST(Linear, RefusesWhatDoesNotFit) {
  const core::Tensor weight(DType::f32, {4, 8});
  model::LinearScratch scratch;
  std::vector<float> x(16);
  std::vector<float> y(7);
  EXPECT_THROW(model::linear(weight, x, 2, y, scratch), Error);
  const core::Tensor ids(DType::i32, {4, 8});
  y.resize(8);
  EXPECT_THROW(model::linear(ids, x, 2, y, scratch), Error);
}

}  // namespace
}  // namespace msa
