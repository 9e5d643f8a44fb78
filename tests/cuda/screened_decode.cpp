// SPDX-License-Identifier: Apache-2.0
#include "tests/cuda/screened_decode.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/index_code.hpp"
#include "core/scalar.hpp"
#include "msa/msa.hpp"

namespace msa::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::int64_t num_blocks(const Request& request) {
  return (request.num_keys + ScreenedDecode::kBlock - 1) / ScreenedDecode::kBlock;
}

std::int64_t sum_of_blocks(const std::vector<Request>& requests) {
  std::int64_t sum = 0;
  for (const Request& request : requests) sum += num_blocks(request);
  return sum;
}

std::int64_t most_blocks(const std::vector<Request>& requests) {
  std::int64_t most = 1;
  for (const Request& request : requests) most = std::max(most, num_blocks(request));
  return most;
}

std::int64_t sum_of_queries(const std::vector<Request>& requests) {
  std::int64_t sum = 0;
  for (const Request& request : requests) sum += request.num_queries;
  return sum;
}

void fill_normal(const ScreenedDecode& decode, Noise& noise, double query_scale = 1.0,
                 double key_scale = 1.0) {
  decode.fill_queries([&](auto) { return query_scale * noise.normal(); });
  decode.fill_keys([&](auto, auto) { return key_scale * noise.normal(); });
}

/// Keys of which all elements but the first lie half way between two codes of scale 1. Queries of
/// ones meet errors that all point one way, up in even blocks and down in odd ones: what codes say
/// about two blocks is then wrong by as much as the bound allows.
void fill_on_the_bound(const ScreenedDecode& decode, Noise& noise) {
  decode.fill_queries([](auto) { return 1.0; });
  decode.fill_keys([&](std::int64_t token, std::int64_t d) {
    if (d == 0) return 127.0;
    const double even = 2.0 * static_cast<double>(noise.below(9)) - 8.0;
    const bool up = token / ScreenedDecode::kBlock % 2 == 0;
    return up ? even + 0.5 : even - 0.5;
  });
}

/// Between neighbouring blocks lies less than the bound, whatever it is: every block has the same
/// key but for one element.
void fill_close(const ScreenedDecode& decode, Noise& noise) {
  std::vector<double> key(ScreenedDecode::kDim);
  for (double& element : key) element = noise.normal();
  decode.fill_queries([&](auto) { return noise.normal(); });
  decode.fill_keys([&](std::int64_t token, std::int64_t d) {
    const double step = d == token / ScreenedDecode::kBlock % ScreenedDecode::kDim ? 1.01 : 1.0;
    return step * key[static_cast<std::size_t>(d)];
  });
}

}  // namespace

ScreenedDecode::ScreenedDecode(DType dtype, int heads, int top_k, std::vector<Request> requests)
    : problem{.num_q_heads = heads,
              .num_kv_heads = heads,
              .head_dim = 8,
              .index_dim = kDim,
              .block_size = kBlock,
              .top_k = top_k},
      dtype_(dtype),
      requests_(std::move(requests)),
      total_q_(sum_of_queries(requests_)),
      max_blocks_(most_blocks(requests_)),
      cu_seqlens_q_(DType::i32, {num_requests() + 1}),
      seq_lens_k_(DType::i32, {num_requests()}),
      page_table_(DType::i32, {num_requests(), max_blocks_}),
      index_q_(dtype, {total_q_, heads, kDim}),
      index_k_(dtype, {sum_of_blocks(requests_) + 1, 1, kBlock, kDim}),
      codes_(DType::i8, {sum_of_blocks(requests_) + 1, 1, kBlock, kDim}),
      scales_(DType::bf16, {sum_of_blocks(requests_) + 1, 1, kBlock, 2}) {
  const std::int64_t pages = sum_of_blocks(requests_);
  std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  Noise noise(5);
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1],
              order[static_cast<std::size_t>(noise.below(static_cast<std::int64_t>(i)))]);
  }
  std::size_t next = 0;
  std::int32_t queries = 0;
  for (std::int64_t b = 0; b < num_requests(); ++b) {
    const Request& request = requests_[static_cast<std::size_t>(b)];
    queries += request.num_queries;
    cu_seqlens_q_.data<std::int32_t>()[b + 1] = queries;
    seq_lens_k_.data<std::int32_t>()[b] = request.num_keys;
    for (std::int64_t block = 0; block < max_blocks_; ++block) {
      // Beyond a request's keys: no page that there is.
      page_table_.data<std::int32_t>()[b * max_blocks_ + block] =
          block < num_blocks(request) ? order[next++] : (block % 2 == 0 ? -7 : 1 << 30);
    }
  }
}

void ScreenedDecode::set_query(std::int64_t row, std::int64_t head, std::int64_t d,
                               double value) const {
  core::store(index_q_.view(), value, row, head, d);
}

void ScreenedDecode::set_key(std::int64_t request, std::int64_t token, std::int64_t d,
                             double value) const {
  const std::int32_t page =
      page_table_.data<std::int32_t>()[request * max_blocks_ + token / kBlock];
  if (page < 0 || page >= index_k_.view().shape[0]) return;
  core::store(index_k_.view(), value, page, 0, token % kBlock, d);
}

void ScreenedDecode::fill_queries(const std::function<double(std::int64_t)>& value) const {
  for (std::int64_t row = 0; row < total_q_; ++row) {
    for (std::int64_t head = 0; head < heads(); ++head) {
      for (std::int64_t d = 0; d < kDim; ++d) set_query(row, head, d, value(d));
    }
  }
}

void ScreenedDecode::fill_keys(
    const std::function<double(std::int64_t, std::int64_t)>& value) const {
  for (std::int64_t b = 0; b < num_requests(); ++b) {
    for (std::int64_t token = 0; token < num_keys(b); ++token) {
      for (std::int64_t d = 0; d < kDim; ++d) set_key(b, token, d, value(token, d));
    }
  }
}

void ScreenedDecode::plant(Noise& noise, int count, double value) const {
  for (int i = 0; i < count; ++i) {
    const std::int64_t b = noise.below(num_requests());
    if (num_keys(b) > 0) set_key(b, noise.below(num_keys(b)), noise.below(kDim), value);
  }
}

void ScreenedDecode::lose_page(std::int64_t request, std::int64_t block, std::int32_t id) const {
  page_table_.data<std::int32_t>()[request * max_blocks_ + block] = id;
}

void ScreenedDecode::upload() {
  const std::int64_t rows = index_k_.view().shape[0] * kBlock;
  for (std::int64_t row = 0; row < rows; ++row) {
    core::encode_index_key(
        reinterpret_cast<const std::byte*>(index_k_.data<std::uint16_t>() + row * kDim), dtype_,
        kDim, codes_.data<std::int8_t>() + row * kDim, scales_.data<std::uint16_t>() + row * 2);
  }
  copies_.clear();
  for (const core::Tensor* tensor :
       {&cu_seqlens_q_, &seq_lens_k_, &page_table_, &index_q_, &index_k_, &codes_, &scales_}) {
    const std::span<std::byte> host = tensor->span<std::byte>().first(
        size_of(tensor->view().dtype) * static_cast<std::size_t>(tensor->view().num_elements()));
    copies_.emplace_back(host.size());
    copies_.back().upload(host);
  }
}

TensorView ScreenedDecode::on_device(const core::Tensor& tensor, std::size_t slot) const {
  TensorView view = tensor.view();
  view.data = copies_[slot].data();
  view.device = {DeviceType::cuda, 0};
  return view;
}

Indexer ScreenedDecode::args(const TensorView& ids) const {
  return {.problem = problem,
          .batch = {.cu_seqlens_q = on_device(cu_seqlens_q_, 0),
                    .page_table = on_device(page_table_, 2),
                    .seq_lens_k = on_device(seq_lens_k_, 1)},
          .index_q = on_device(index_q_, 3),
          .index_k = on_device(index_k_, 4),
          .index_k_codes = on_device(codes_, 5),
          .index_k_scales = on_device(scales_, 6),
          .block_ids = ids};
}

std::vector<std::int32_t> ScreenedDecode::select(const char* backend) const {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(heads() * total_q_ * problem.top_k));
  const DeviceBuffer copy(ids.size() * sizeof(std::int32_t));
  copy.fill(std::byte{0x5a});
  const Indexer on_gpu = args(TensorView::contiguous(copy.data(), DType::i32, {DeviceType::cuda, 0},
                                                     {heads(), total_q_, problem.top_k}));
  const auto plan = msa::plan(on_gpu, {.backend = backend});
  const DeviceBuffer workspace(plan.workspace_bytes() + 1);
  workspace.fill(std::byte{0xff});
  const DeviceStream stream;
  plan.run(on_gpu, workspace.span().first(plan.workspace_bytes()), stream.stream());
  stream.wait();
  copy.download(std::as_writable_bytes(std::span(ids)));
  return ids;
}

const std::vector<ScreenFamily>& screen_families() {
  static const std::vector<ScreenFamily> all = {
      {"normal", [](const auto& decode, Noise& noise) { fill_normal(decode, noise); }},
      {"on_the_bound", fill_on_the_bound},
      {"on_the_bound_both_ways",
       [](const auto& decode, Noise& noise) {
         fill_on_the_bound(decode, noise);
         decode.fill_queries([&](auto) { return noise.below(2) == 0 ? 1.0 : -1.0; });
       }},
      // The same on stairs about as high as twice the error, so that blocks one stair below the
      // least selected are on the edge of being left out, and all others are.
      {"on_the_bound_stairs",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([](auto) { return 1.0; });
         decode.fill_keys([&](std::int64_t token, std::int64_t d) {
           if (d == 0) return 127.0;
           const std::int64_t block = token / ScreenedDecode::kBlock;
           const double stair = d % 2 == 0 ? 2.0 * static_cast<double>(block * 37 % 41 - 20) : 0.0;
           const double even = stair + (d == 1 ? 2.0 * static_cast<double>(noise.below(3)) : 0.0);
           return block % 2 == 0 ? even + 0.5 : even - 0.5;
         });
       }},
      {"close", fill_close},
      {"ties",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([&](auto) { return static_cast<double>(noise.below(3)) - 1.0; });
         decode.fill_keys([&](auto, auto) { return static_cast<double>(noise.below(3)) - 1.0; });
       }},
      {"all_equal",
       [](const auto& decode, Noise&) {
         decode.fill_queries([](auto) { return 0.7; });
         decode.fill_keys([](auto, auto) { return 0.3; });
       }},
      {"neighbours",  // elements one or two steps of bf16 apart
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([](auto) { return 1.0; });
         decode.fill_keys(
             [&](auto, auto) { return 1.0 + 0x1p-7 * static_cast<double>(noise.below(3)); });
       }},
      {"cancelling",  // scores are small beside the sums of magnitudes
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([](std::int64_t d) { return d % 2 == 0 ? 1.0 : -1.0; });
         decode.fill_keys([&](auto, auto) { return 100.0 + noise.normal(); });
       }},
      {"outlier_dimension",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries(
             [&](std::int64_t d) { return (d == 3 ? 1e-3 : 1.0) * noise.normal(); });
         decode.fill_keys(
             [&](auto, std::int64_t d) { return (d == 3 ? 300.0 : 0.0) + noise.normal(); });
       }},
      {"query_of_one_element",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([](std::int64_t d) { return d == 77 ? 3e4 : 1e-5; });
         decode.fill_keys([&](auto, std::int64_t d) { return d == 77 ? 0.0 : noise.normal(); });
       }},
      {"blocks_apart",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([&](auto) { return 1.0 + 0.1 * noise.normal(); });
         decode.fill_keys([&](std::int64_t token, auto) {
           return std::sin(static_cast<double>(token / ScreenedDecode::kBlock)) +
                  0.05 * noise.normal();
         });
       }},
      {"not_finite",
       [](const auto& decode, Noise& noise) {
         fill_normal(decode, noise);
         decode.plant(noise, 9, kNan);
         decode.plant(noise, 5, kInf);
         decode.plant(noise, 5, -kInf);
       }},
      {"huge_keys",
       [](const auto& decode, Noise& noise) {
         fill_normal(decode, noise);
         decode.plant(noise, 3, 3e4);
         decode.plant(noise, 3, 1e13);
         decode.plant(noise, 2, -3e38);
       }},
      {"all_nan",
       [](const auto& decode, Noise&) {
         decode.fill_queries([](auto) { return 1.0; });
         decode.fill_keys([](auto, auto) { return kNan; });
       }},
      {"all_but_some_nan",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries([&](auto) { return noise.normal(); });
         decode.fill_keys([&](std::int64_t token, auto) {
           return token / ScreenedDecode::kBlock % 9 == 4 ? noise.normal() : kNan;
         });
       }},
      {"strange_queries",
       [](const auto& decode, Noise& noise) {
         fill_normal(decode, noise);
         const double values[] = {kNan, kInf, -kInf, 1e13, 6e4, 0.0, -0.0, 1e-30};
         for (std::int64_t row = 0; row < decode.total_q(); ++row) {
           decode.set_query(row, row % decode.heads(), row * 5 % ScreenedDecode::kDim,
                            values[row % 8]);
         }
       }},
      {"zero_queries",
       [](const auto& decode, Noise& noise) {
         fill_normal(decode, noise);
         decode.fill_queries([](auto) { return 0.0; });
       }},
      {"large", [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e11, 1e11); }},
      {"too_large",
       [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e18, 1e14); }},
      {"products_underflow",
       [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e-20, 1e-20); }},
      {"tiny_queries",
       [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e-18, 1.0); }},
      {"subnormal_keys",
       [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e11, 1e-39); }},
      {"subnormal_beside_normal_keys",
       [](const auto& decode, Noise& noise) {
         decode.fill_queries(
             [&](std::int64_t d) { return (d == 0 ? 1e-20 : 1e11) * noise.normal(); });
         decode.fill_keys(
             [&](auto, std::int64_t d) { return (d == 0 ? 4e-38 : 5e-39) * noise.normal(); });
       }},
      {"subnormal_queries",
       [](const auto& decode, Noise& noise) { fill_normal(decode, noise, 1e-39, 1e11); }},
  };
  return all;
}

}  // namespace msa::testing
