// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda/decode.hpp"

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "core/check.hpp"
#include "msa/indexed_attention.hpp"

namespace msa::bench {
namespace {

constexpr Problem kM3{};
constexpr const char* kScreened = "cuda_sm90_decode_screened";
constexpr const char* kFused = "cuda_sm90_decode_fused";
constexpr int kMaxCaches = 32;
// Ten times the L2 cache: what one step reads is gone when its turn comes again.
constexpr double kTurnBytes = 500e6;

struct DecodeShape {
  std::string name;
  std::int64_t batch_size;
  std::int64_t seq_len_q;  ///< query tokens of each request
  std::int64_t seq_len_k;
  DType kv_dtype = DType::bf16;
  bool codes = false;
  bool attention_only = false;
  bool index_only = false;
  bool fused = false;  ///< one operation: IndexedAttentionForward

  std::int64_t total_q() const { return batch_size * seq_len_q; }
  std::int64_t blocks() const { return (seq_len_k + kM3.block_size - 1) / kM3.block_size; }
  std::int64_t pages() const { return batch_size * blocks(); }
  double index_key_bytes() const {
    const double per_token = codes ? kM3.index_dim + 2.0 * 2 : 2.0 * kM3.index_dim;
    return static_cast<double>(batch_size * seq_len_k) * per_token;
  }
};

double bytes_of(const DeviceTensor& tensor) { return static_cast<double>(tensor.size()); }

template <class T>
void upload(const DeviceTensor& to, const std::vector<T>& from) {
  MSA_CUDA_CHECK(cudaMemcpy(to.data<T>(), from.data(), to.size(), cudaMemcpyHostToDevice));
}

/// The tensors of one layer.
class Cache {
 public:
  Cache(const DecodeShape& shape, std::uint64_t seed)
      : shape_(shape),
        page_table_(DType::i32, {shape.batch_size, shape.blocks()}),
        seq_lens_k_(DType::i32, {shape.batch_size}),
        block_ids_(DType::i32, {kM3.num_kv_heads, shape.total_q(), kM3.top_k}),
        q_(DType::bf16, {shape.total_q(), kM3.num_q_heads, kM3.head_dim}),
        k_(shape.kv_dtype, {shape.pages(), kM3.num_kv_heads, kM3.block_size, kM3.head_dim}),
        v_(shape.kv_dtype, {shape.pages(), kM3.num_kv_heads, kM3.block_size, kM3.head_dim}),
        out_(DType::bf16, {shape.total_q(), kM3.num_q_heads, kM3.head_dim}) {
    fill_page_table(page_table_, seed + 5);
    upload(seq_lens_k_, std::vector<std::int32_t>(static_cast<std::size_t>(shape.batch_size),
                                                  static_cast<std::int32_t>(shape.seq_len_k)));
    fill_normal(q_, seed + 6);
    fill_normal(k_, seed + 3);
    fill_normal(v_, seed + 4);
    if (shape.attention_only) {
      choose_at_random(seed + 9);
    } else {
      add_index(seed);
    }
  }

  Indexer indexer() const {
    return {.problem = kM3,
            .batch = batch(),
            .index_q = index_q_.view(),
            .index_k = index_k_.view(),
            .index_k_codes = index_k_codes_.view(),
            .index_k_scales = index_k_scales_.view(),
            .block_ids = block_ids_.view()};
  }
  SparseAttentionForward attention() const {
    return {.problem = kM3,
            .batch = batch(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .block_ids = block_ids_.view(),
            .out = out_.view()};
  }
  IndexedAttentionForward step() const {
    return {.problem = kM3,
            .batch = batch(),
            .index_q = index_q_.view(),
            .index_k = index_k_.view(),
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .block_ids = block_ids_.view(),
            .out = out_.view()};
  }

  double index_flops() const {
    return 2.0 * kM3.index_dim * kM3.num_kv_heads * static_cast<double>(shape_.total_q()) *
           static_cast<double>(shape_.seq_len_k);
  }
  double index_bytes() const {
    return bytes_of(index_q_) + shape_.index_key_bytes() + bytes_of(block_ids_);
  }
  /// FLOP and bytes of attention on the present ids: each K and V of a block that any query of a
  /// sequence takes is read once.
  std::pair<double, double> attention_work() const {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(block_ids_.view().num_elements()));
    MSA_CUDA_CHECK(cudaMemcpy(ids.data(), block_ids_.data<std::int32_t>(), block_ids_.size(),
                              cudaMemcpyDeviceToHost));
    double attended = 0.0;
    std::set<std::int64_t> read;  // block of a sequence and KV head
    for (std::size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] < 0) continue;
      const std::int64_t row = static_cast<std::int64_t>(i) / kM3.top_k;  // head * total_q + query
      const std::int64_t query = row % shape_.total_q();
      const std::int64_t position = shape_.seq_len_k - shape_.seq_len_q + query % shape_.seq_len_q;
      const std::int64_t visible = position + 1 - std::int64_t{ids[i]} * kM3.block_size;
      attended += static_cast<double>(std::min<std::int64_t>(visible, kM3.block_size));
      const std::int64_t sequence =
          row / shape_.total_q() * shape_.batch_size + query / shape_.seq_len_q;
      read.insert(sequence * shape_.blocks() + ids[i]);
    }
    const double block_bytes =
        2.0 * kM3.block_size * kM3.head_dim * static_cast<double>(size_of(shape_.kv_dtype));
    return {4.0 * kM3.head_dim * kM3.group_size() * attended,
            static_cast<double>(read.size()) * block_bytes + bytes_of(q_) + bytes_of(out_) +
                bytes_of(block_ids_)};
  }

 private:
  Batch batch() const {
    return {.page_table = page_table_.view(),
            .seq_lens_k = seq_lens_k_.view(),
            .max_seq_len_q = shape_.seq_len_q,
            .max_seq_len_k = shape_.seq_len_k};
  }

  void add_index(std::uint64_t seed) {
    index_q_ = DeviceTensor(DType::bf16, {shape_.total_q(), kM3.num_kv_heads, kM3.index_dim});
    index_k_ = DeviceTensor(DType::bf16, {shape_.pages(), 1, kM3.block_size, kM3.index_dim});
    fill_index_queries(index_q_, kRealLike, seed + 1);
    fill_index_keys(index_k_, kRealLike, seed + 2);
    if (!shape_.codes) return;
    // AppendKv writes the codes: of the same keys, once more as new tokens.
    const DeviceTensor keys(DType::bf16, {shape_.pages(), 1, kM3.block_size, kM3.index_dim});
    fill_index_keys(keys, kRealLike, seed + 2);
    index_k_codes_ = DeviceTensor(DType::i8, {shape_.pages(), 1, kM3.block_size, kM3.index_dim});
    index_k_scales_ = DeviceTensor(DType::bf16, {shape_.pages(), 1, kM3.block_size, 2});
    const std::int64_t tokens = shape_.batch_size * shape_.seq_len_k;
    Batch batch = this->batch();
    batch.max_seq_len_q = shape_.seq_len_k;
    const AppendKv append{
        .problem = kM3,
        .batch = batch,
        .index_k = TensorView::contiguous(keys.view().data, DType::bf16, keys.view().device,
                                          {tokens, 1, kM3.index_dim}),
        .index_k_pages = index_k_.view(),
        .index_k_codes_pages = index_k_codes_.view(),
        .index_k_scales_pages = index_k_scales_.view()};
    msa::plan(append).run(append);
    MSA_CUDA_CHECK(cudaDeviceSynchronize());
  }

  void choose_at_random(std::uint64_t seed) {
    std::vector<std::int32_t> ids;
    std::mt19937_64 random(seed);
    std::vector<std::int32_t> blocks(static_cast<std::size_t>(shape_.blocks() - 1));
    std::iota(blocks.begin(), blocks.end(), 0);
    for (std::int64_t row = 0; row < kM3.num_kv_heads * shape_.total_q(); ++row) {
      std::vector<std::int32_t> chosen;
      std::sample(blocks.begin(), blocks.end(), std::back_inserter(chosen), kM3.top_k - 1, random);
      chosen.push_back(static_cast<std::int32_t>(shape_.blocks() - 1));
      ids.insert(ids.end(), chosen.begin(), chosen.end());
    }
    upload(block_ids_, ids);
  }

  DecodeShape shape_;
  DeviceTensor page_table_, seq_lens_k_, block_ids_;
  DeviceTensor q_, k_, v_, out_;
  DeviceTensor index_q_, index_k_, index_k_codes_, index_k_scales_;
};

using Caches = std::shared_ptr<std::vector<Cache>>;

/// By the fused kernel, which has to be asked for, unless another backend is.
PreparedCase prepare_fused(const Caches& caches, Options options) {
  if (options.backend == nullptr) options.backend = kFused;
  const auto plan = msa::plan(caches->front().step(), options);
  const auto workspace = std::make_shared<DeviceMemory>(plan.workspace_bytes());
  const auto enqueue = [=](cudaStream_t stream) {
    for (const Cache& cache : *caches) {
      plan.run(cache.step(), {workspace->data(), plan.workspace_bytes()}, {stream});
    }
  };
  enqueue(nullptr);
  MSA_CUDA_CHECK(cudaDeviceSynchronize());
  const auto [flops, bytes] = caches->front().attention_work();
  return {.enqueue = enqueue,
          .repeats = static_cast<int>(caches->size()),
          .implementation = plan.implementation(),
          .flops = flops + caches->front().index_flops(),
          .bytes = bytes + caches->front().index_bytes(),
          .extra_bytes = workspace->size()};
}

PreparedCase prepare(const DecodeShape& shape, const Options& options) {
  const double attention_bytes = 2.0 * static_cast<double>(shape.batch_size * kM3.num_kv_heads) *
                                 kM3.top_k * kM3.block_size * kM3.head_dim *
                                 static_cast<double>(size_of(shape.kv_dtype));
  const double step_bytes = (shape.index_only ? 0.0 : attention_bytes) +
                            (shape.attention_only ? 0.0 : shape.index_key_bytes());
  const int num_caches = std::clamp(static_cast<int>(kTurnBytes / step_bytes) + 1, 1, kMaxCaches);
  const Caches caches = std::make_shared<std::vector<Cache>>();
  for (int i = 0; i < num_caches; ++i) {
    caches->emplace_back(shape, 100 * static_cast<std::uint64_t>(i));
  }
  if (shape.fused) return prepare_fused(caches, options);
  const auto attention = msa::plan(caches->front().attention(), options);
  // Screening stands below the row that reads every key: it has to be asked for.
  Options index_options = options;
  if (shape.codes && options.backend == nullptr) index_options.backend = kScreened;
  const auto indexer =
      shape.attention_only ? Plan<Indexer>{} : msa::plan(caches->front().indexer(), index_options);
  const std::size_t index_bytes = shape.attention_only ? 0 : indexer.workspace_bytes();
  const auto workspace =
      std::make_shared<DeviceMemory>(std::max(index_bytes, attention.workspace_bytes()));
  const auto enqueue = [=](cudaStream_t stream) {
    for (const Cache& cache : *caches) {
      if (!shape.attention_only) {
        indexer.run(cache.indexer(), {workspace->data(), indexer.workspace_bytes()}, {stream});
      }
      if (shape.index_only) continue;
      attention.run(cache.attention(), {workspace->data(), attention.workspace_bytes()}, {stream});
    }
  };
  enqueue(nullptr);  // the ids that attention will find, for its share of the necessary work
  MSA_CUDA_CHECK(cudaDeviceSynchronize());
  auto [flops, bytes] = caches->front().attention_work();
  if (shape.index_only) flops = bytes = 0.0;
  PreparedCase prepared{.enqueue = enqueue,
                        .repeats = num_caches,
                        .implementation = attention.implementation(),
                        .flops = flops,
                        .bytes = bytes,
                        .extra_bytes = workspace->size()};
  if (!shape.attention_only) {
    prepared.implementation =
        shape.index_only ? indexer.implementation()
                         : core::concat(indexer.implementation(), " + ", prepared.implementation);
    prepared.flops += caches->front().index_flops();
    prepared.bytes += caches->front().index_bytes();
  }
  return prepared;
}

}  // namespace

std::vector<BenchCase> decode_cases() {
  constexpr std::int64_t k = 1024;
  std::vector<DecodeShape> shapes = {
      {"b1.32k", 1, 1, 32 * k},     {"b1.512k", 1, 1, 512 * k},   {"b1.1m", 1, 1, k * k},
      {"b32.128k", 32, 1, 128 * k}, {"b32.512k", 32, 1, 512 * k},
  };
  for (std::size_t i = 1, count = shapes.size(); i < count; ++i) {
    shapes.push_back(shapes[i]);
    shapes.back().name += ".screened";
    shapes.back().codes = true;
  }
  for (std::size_t i = 0, count = shapes.size(); i < count; ++i) {
    shapes.push_back(shapes[i]);
    shapes.back().name += ".index";
    shapes.back().index_only = true;
  }
  for (const std::int64_t batch_size : {1, 2, 4}) {
    shapes.push_back({.name = core::concat("b", batch_size, ".32k.fused"),
                      .batch_size = batch_size,
                      .seq_len_q = 1,
                      .seq_len_k = 32 * k,
                      .fused = true});
  }
  shapes.push_back({"b2.32k", 2, 1, 32 * k});
  shapes.push_back({"b4.32k", 4, 1, 32 * k});
  shapes.push_back({"b8.128k", 8, 1, 128 * k});
  shapes.push_back({"b8.128k.mtp4", 8, 4, 128 * k});
  shapes.push_back({.name = "b1.attention",
                    .batch_size = 1,
                    .seq_len_q = 1,
                    .seq_len_k = 32 * k,
                    .attention_only = true});
  shapes.push_back({.name = "b64.attention",
                    .batch_size = 64,
                    .seq_len_q = 1,
                    .seq_len_k = 32 * k,
                    .attention_only = true});
  shapes.push_back(shapes.back());
  shapes.back().name = "b64.attention.fp8_kv";
  shapes.back().kv_dtype = DType::e4m3;
  std::vector<BenchCase> cases;
  for (const DecodeShape& shape : shapes) {
    cases.push_back({core::concat("decode.", shape.name), shape.seq_len_k,
                     [shape](const Options& options) { return prepare(shape, options); }});
  }
  return cases;
}

}  // namespace msa::bench
