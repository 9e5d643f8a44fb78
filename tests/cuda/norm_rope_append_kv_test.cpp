// SPDX-License-Identifier: Apache-2.0
//
// NormRopeAppendKv on the GPU against the reference, byte by byte: the contract fixes every
// rounding. Bytes that are not to be written keep the value they had.
#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <random>
#include <string>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "msa/ops.hpp"
#include "tests/support/device.hpp"

namespace msa::testing {
namespace {

struct Shape {
  std::string name;
  Problem problem;
  std::int64_t batch_size, seq_len_q, rotary_dim;
  DType dtype, cache, index_cache;
};

/// Host tensors of a request; the dims that are no multiples of 4 take the unaligned path.
class Request {
 public:
  explicit Request(const Shape& s) {
    const Problem& p = s.problem;
    const std::int64_t tokens = s.batch_size * s.seq_len_q;
    constexpr std::int64_t kPages = 3;
    const std::int64_t num_pages = s.batch_size * kPages;
    args_.problem = p;
    args_.norm_weight_offset = 1.0f;
    args_.batch.page_table = ints({s.batch_size, kPages}, [&](std::int64_t i) {
      return i % 11 == 10 ? num_pages : num_pages - 1 - i;  // some pages do not exist
    });
    args_.batch.seq_lens_k = ints({s.batch_size}, [&](std::int64_t i) {
      return 1 + i * 37 % (kPages * p.block_size);  // some tokens lie before position 0
    });
    args_.q = floats(s.dtype, {tokens, p.num_q_heads, p.head_dim});
    args_.k = floats(s.dtype, {tokens, p.num_kv_heads, p.head_dim});
    args_.v = floats(s.dtype, {tokens, p.num_kv_heads, p.head_dim});
    args_.index_q = floats(s.dtype, {tokens, p.num_kv_heads, p.index_dim});
    args_.index_k = floats(s.dtype, {tokens, 1, p.index_dim});
    args_.q_weight = floats(s.dtype, {p.head_dim});
    args_.k_weight = floats(DType::f32, {p.head_dim});
    args_.index_q_weight = floats(DType::f32, {p.index_dim});
    args_.index_k_weight = floats(s.dtype, {p.index_dim});
    args_.cos_sin = floats(DType::f32, {kPages * p.block_size - 8, s.rotary_dim});
    args_.q_out = floats(s.dtype, {tokens, p.num_q_heads, p.head_dim});
    args_.index_q_out = floats(s.index_cache, {tokens, p.num_kv_heads, p.index_dim});
    args_.k_pages = floats(s.cache, {num_pages, p.num_kv_heads, p.block_size, p.head_dim});
    args_.v_pages = floats(s.cache, {num_pages, p.num_kv_heads, p.block_size, p.head_dim});
    args_.index_k_pages = floats(s.index_cache, {num_pages, 1, p.block_size, p.index_dim});
    args_.index_k_codes_pages = make(DType::i8, {num_pages, 1, p.block_size, p.index_dim});
    args_.index_k_scales_pages = make(DType::bf16, {num_pages, 1, p.block_size, 2});
    if (s.cache == DType::e4m3) {
      args_.k_scale = floats(DType::f32, {p.num_kv_heads});
      args_.v_scale = floats(DType::f32, {p.num_kv_heads});
    }
  }

  const NormRopeAppendKv& args() const { return args_; }
  const std::deque<core::Tensor>& tensors() const { return tensors_; }

 private:
  TensorView make(DType dtype, std::initializer_list<std::int64_t> shape) {
    return tensors_.emplace_back(dtype, shape);
  }
  template <class Value>
  TensorView ints(std::initializer_list<std::int64_t> shape, Value value) {
    const TensorView view = make(DType::i32, shape);
    for (std::int64_t i = 0; i < view.num_elements(); ++i) {
      static_cast<std::int32_t*>(view.data)[i] = static_cast<std::int32_t>(value(i));
    }
    return view;
  }
  TensorView floats(DType dtype, std::initializer_list<std::int64_t> shape) {
    const TensorView view = make(dtype, shape);
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < view.num_elements(); ++i) {
      core::store_element(core::address_at(view, i), dtype, normal(random_));
    }
    return view;
  }

  std::mt19937 random_{7};
  std::deque<core::Tensor> tensors_;
  NormRopeAppendKv args_;
};

constexpr Problem kM3{};
constexpr Problem kOdd{.num_q_heads = 6,
                       .num_kv_heads = 2,
                       .head_dim = 250,
                       .index_dim = 37,
                       .block_size = 16,
                       .top_k = 2};

class NormRopeAppendKvGpuScaled : public ::testing::TestWithParam<Shape> {};

TEST_P(NormRopeAppendKvGpuScaled, IsBitwiseTheReference) {
  if (!why_no_device().empty()) GTEST_SKIP() << why_no_device();
  const Request request(GetParam());
  std::vector<std::span<std::byte>> buffers;
  for (const core::Tensor& tensor : request.tensors()) {
    const std::size_t bytes =
        static_cast<std::size_t>(tensor.view().num_elements()) * size_of(tensor.view().dtype);
    buffers.emplace_back(tensor.data<std::byte>(), bytes);
  }
  DeviceMirror mirror;
  NormRopeAppendKv args = request.args();
  for (TensorView* view : {&args.batch.page_table,
                           &args.batch.seq_lens_k,
                           &args.q,
                           &args.k,
                           &args.v,
                           &args.index_q,
                           &args.index_k,
                           &args.q_weight,
                           &args.k_weight,
                           &args.index_q_weight,
                           &args.index_k_weight,
                           &args.cos_sin,
                           &args.q_out,
                           &args.index_q_out,
                           &args.k_pages,
                           &args.v_pages,
                           &args.index_k_pages,
                           &args.index_k_codes_pages,
                           &args.index_k_scales_pages,
                           &args.k_scale,
                           &args.v_scale}) {
    *view = mirror.at(*view, buffers);
  }
  const DeviceStream stream;
  plan(args, {.backend = "cuda_generic"}).run(args, {}, stream.stream());
  stream.wait();
  plan(request.args(), {.backend = "reference"}).run(request.args());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    std::vector<std::byte> got(buffers[i].size());
    const DeviceBuffer* const copy = mirror.find(buffers[i]);
    ASSERT_NE(copy, nullptr);
    copy->download(got);
    EXPECT_EQ(std::memcmp(got.data(), buffers[i].data(), got.size()), 0) << "tensor " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, NormRopeAppendKvGpuScaled,
    ::testing::Values(
        Shape{"m3_bf16", kM3, 19, 1, 64, DType::bf16, DType::bf16, DType::bf16},
        Shape{"m3_e4m3", kM3, 19, 1, 64, DType::bf16, DType::e4m3, DType::e4m3},
        Shape{"m3_f16_four_tokens", kM3, 5, 4, 128, DType::f16, DType::f16, DType::f16},
        Shape{"odd_f32", kOdd, 13, 3, 10, DType::f32, DType::f32, DType::f32},
        Shape{"odd_bf16_to_e4m3", kOdd, 13, 3, 36, DType::bf16, DType::e4m3, DType::f16}),
    [](const auto& shape) { return shape.param.name; });

}  // namespace
}  // namespace msa::testing
