// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda/append.hpp"

#include <numeric>

#include "core/check.hpp"
#include "core/operation.hpp"
#include "msa/ops.hpp"

namespace msa::bench {
namespace {

constexpr Problem kM3{};
constexpr std::int64_t kRotaryDim = 64;
constexpr std::int64_t kMaxPositions = 4096;
constexpr int kLayers = 16;

struct AppendShape {
  std::string name;
  std::int64_t batch_size;
  bool norm_rope = true;
  DType cache = DType::bf16;
};

template <class T>
void upload(const DeviceTensor& to, const std::vector<T>& from) {
  MSA_CUDA_CHECK(cudaMemcpy(to.data<T>(), from.data(), to.size(), cudaMemcpyHostToDevice));
}

/// The tensors of one layer: a request has one page, and its new token lies somewhere in it.
class Layer {
 public:
  Layer(const AppendShape& shape, std::uint64_t seed) : shape_(shape) {
    const std::int64_t n = shape.batch_size;
    std::vector<std::int32_t> lengths(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      lengths[i] = static_cast<std::int32_t>(1 + i * 37 % static_cast<std::size_t>(kM3.block_size));
    }
    seq_lens_k_ = DeviceTensor(DType::i32, {n});
    upload(seq_lens_k_, lengths);
    page_table_ = DeviceTensor(DType::i32, {1, n});
    fill_page_table(page_table_, seed);
    q_ = rows(kM3.num_q_heads, kM3.head_dim, seed + 1);
    k_ = rows(kM3.num_kv_heads, kM3.head_dim, seed + 2);
    v_ = rows(kM3.num_kv_heads, kM3.head_dim, seed + 3);
    index_q_ = rows(kM3.num_kv_heads, kM3.index_dim, seed + 4);
    index_k_ = rows(1, kM3.index_dim, seed + 5);
    q_weight_ = weight(kM3.head_dim, seed + 6);
    index_weight_ = weight(kM3.index_dim, seed + 7);
    cos_sin_ = DeviceTensor(DType::bf16, {kMaxPositions, kRotaryDim});
    fill_normal(cos_sin_, seed + 8);
    q_out_ = DeviceTensor(DType::bf16, {n, kM3.num_q_heads, kM3.head_dim});
    index_q_out_ = DeviceTensor(shape.cache, {n, kM3.num_kv_heads, kM3.index_dim});
    k_pages_ = pages(kM3.num_kv_heads, kM3.head_dim);
    v_pages_ = pages(kM3.num_kv_heads, kM3.head_dim);
    index_k_pages_ = pages(1, kM3.index_dim);
    if (shape.cache != DType::bf16) return;
    codes_ = DeviceTensor(DType::i8, {n, 1, kM3.block_size, kM3.index_dim});
    scales_ = DeviceTensor(DType::bf16, {n, 1, kM3.block_size, 2});
  }

  NormRopeAppendKv norm_rope_append() const {
    return {.problem = kM3,
            .batch = batch(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .index_q = index_q_.view(),
            .index_k = index_k_.view(),
            .q_weight = q_weight_.view(),
            .k_weight = q_weight_.view(),
            .index_q_weight = index_weight_.view(),
            .index_k_weight = index_weight_.view(),
            .norm_weight_offset = 1.0f,
            .cos_sin = cos_sin_.view(),
            .q_out = q_out_.view(),
            .index_q_out = index_q_out_.view(),
            .k_pages = k_pages_.view(),
            .v_pages = v_pages_.view(),
            .index_k_pages = index_k_pages_.view(),
            .index_k_codes_pages = codes_.view(),
            .index_k_scales_pages = scales_.view()};
  }
  AppendKv append() const {
    return {.problem = kM3,
            .batch = batch(),
            .k = k_.view(),
            .v = v_.view(),
            .index_k = index_k_.view(),
            .k_pages = k_pages_.view(),
            .v_pages = v_pages_.view(),
            .index_k_pages = index_k_pages_.view(),
            .index_k_codes_pages = codes_.view(),
            .index_k_scales_pages = scales_.view()};
  }

  /// New rows read and, in the dtype of their place, written; weights and angles count as nothing.
  double bytes() const {
    const auto total = [](std::initializer_list<const DeviceTensor*> tensors) {
      return std::accumulate(tensors.begin(), tensors.end(), 0.0,
                             [](double sum, const DeviceTensor* tensor) {
                               return sum + static_cast<double>(tensor->size());
                             });
    };
    const double stored =
        total({&k_pages_, &v_pages_, &index_k_pages_, &codes_, &scales_}) / kM3.block_size;
    const double keys = total({&k_, &v_, &index_k_}) + stored;
    return shape_.norm_rope ? keys + total({&q_, &index_q_, &q_out_, &index_q_out_}) : keys;
  }

 private:
  Batch batch() const {
    // One column of the table's row for each request.
    const TensorView table = TensorView::contiguous(
        page_table_.view().data, DType::i32, page_table_.view().device, {shape_.batch_size, 1});
    return {.page_table = table, .seq_lens_k = seq_lens_k_.view(), .max_seq_len_q = 1};
  }
  DeviceTensor rows(std::int64_t heads, std::int64_t dim, std::uint64_t seed) const {
    DeviceTensor tensor(DType::bf16, {shape_.batch_size, heads, dim});
    fill_normal(tensor, seed);
    return tensor;
  }
  static DeviceTensor weight(std::int64_t dim, std::uint64_t seed) {
    DeviceTensor tensor(DType::bf16, {dim});
    fill_normal(tensor, seed);
    return tensor;
  }
  DeviceTensor pages(std::int64_t heads, std::int64_t dim) const {
    return DeviceTensor(shape_.cache, {shape_.batch_size, heads, kM3.block_size, dim});
  }

  AppendShape shape_;
  DeviceTensor seq_lens_k_, page_table_;
  DeviceTensor q_, k_, v_, index_q_, index_k_, q_weight_, index_weight_, cos_sin_;
  DeviceTensor q_out_, index_q_out_, k_pages_, v_pages_, index_k_pages_, codes_, scales_;
};

template <class Args>
PreparedCase prepare(const AppendShape& shape, const Options& options,
                     Args (Layer::*args)() const) {
  const auto layers = std::make_shared<std::vector<Layer>>();
  for (int i = 0; i < kLayers; ++i)
    layers->emplace_back(shape, 100 * static_cast<std::uint64_t>(i));
  const auto plan = msa::plan((layers->front().*args)(), options);
  MSA_CHECK(plan.workspace_bytes() == 0, plan.implementation(), " needs a workspace of ",
            plan.workspace_bytes(), " bytes");
  return {.enqueue =
              [=](cudaStream_t stream) {
                for (const Layer& layer : *layers) plan.run((layer.*args)(), {}, {stream});
              },
          .repeats = kLayers,
          .implementation = plan.implementation(),
          .bytes = layers->front().bytes()};
}

}  // namespace

std::vector<BenchCase> append_cases() {
  std::vector<BenchCase> cases;
  for (const std::int64_t batch_size : {1, 8, 64, 512}) {
    const std::string suffix = core::concat(".b", batch_size);
    for (const AppendShape& shape : {
             AppendShape{"append.norm_rope" + suffix, batch_size},
             AppendShape{"append.norm_rope.fp8" + suffix, batch_size, true, DType::e4m3},
             AppendShape{"append.plain" + suffix, batch_size, false},
         }) {
      cases.push_back({shape.name, kM3.block_size, [shape](const Options& options) {
                         return shape.norm_rope ? prepare(shape, options, &Layer::norm_rope_append)
                                                : prepare(shape, options, &Layer::append);
                       }});
    }
  }
  return cases;
}

}  // namespace msa::bench
