// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda/cases.hpp"

#include <algorithm>

#include "msa/ops.hpp"

namespace msa::bench {
namespace {

constexpr Problem kM3{};

struct Shape {
  std::string name;
  std::int64_t seq_len_q;
  std::int64_t seq_len_k;

  double pairs() const {
    const auto n = static_cast<double>(seq_len_q);
    return n * static_cast<double>(seq_len_k - seq_len_q) + n * (n + 1) / 2;
  }
  std::int64_t num_pages() const { return (seq_len_k + kM3.block_size - 1) / kM3.block_size; }
};

double bytes_of(const DeviceTensor& tensor) { return static_cast<double>(tensor.size()); }

/// Tensors of one shape; each part is made when it is asked for.
class Prompt {
 public:
  explicit Prompt(const Shape& shape)
      : shape_(shape),
        page_table_(DType::i32, {1, shape.num_pages()}),
        seq_lens_k_(DType::i32, {1}),
        block_ids_(DType::i32, {kM3.num_kv_heads, shape.seq_len_q, kM3.top_k}) {
    fill_page_table(page_table_, 5);
    const auto length = static_cast<std::int32_t>(shape.seq_len_k);
    MSA_CUDA_CHECK(cudaMemcpy(seq_lens_k_.data<std::int32_t>(), &length, sizeof(length),
                              cudaMemcpyHostToDevice));
  }

  void add_index(const SelectionFamily& family, DType dtype) {
    index_q_ = DeviceTensor(dtype, {shape_.seq_len_q, kM3.num_kv_heads, kM3.index_dim});
    index_k_ = DeviceTensor(dtype, {shape_.num_pages(), 1, kM3.block_size, kM3.index_dim});
    fill_index_queries(index_q_, family, 1);
    fill_index_keys(index_k_, family, 2);
  }
  /// Random data serves e4m3 keys too; scales are left out, which costs the kernels nothing.
  void add_attention(DType key_dtype = DType::bf16) {
    const std::int64_t pages = shape_.num_pages();
    q_ = DeviceTensor(DType::bf16, {shape_.seq_len_q, kM3.num_q_heads, kM3.head_dim});
    k_ = DeviceTensor(key_dtype, {pages, kM3.num_kv_heads, kM3.block_size, kM3.head_dim});
    v_ = DeviceTensor(key_dtype, {pages, kM3.num_kv_heads, kM3.block_size, kM3.head_dim});
    out_ = DeviceTensor(DType::bf16, {shape_.seq_len_q, kM3.num_q_heads, kM3.head_dim});
    fill_normal(q_, 6);
    fill_normal(k_, 3);
    fill_normal(v_, 4);
  }
  void add_selection(const SelectionFamily& family) {
    fill_selection(block_ids_, family, kM3, shape_.seq_len_k, 9);
  }

  Batch batch() const {
    return {.page_table = page_table_.view(),
            .seq_lens_k = seq_lens_k_.view(),
            .max_seq_len_q = shape_.seq_len_q,
            .max_seq_len_k = shape_.seq_len_k};
  }
  Indexer indexer() const {
    return {.problem = kM3,
            .batch = batch(),
            .index_q = index_q_.view(),
            .index_k = index_k_.view(),
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

  SelectionFacts selection() const { return facts_of(block_ids_, kM3, shape_.seq_len_k); }
  std::size_t id_bytes() const { return block_ids_.size(); }
  double index_flops() const { return 2.0 * kM3.index_dim * kM3.num_kv_heads * shape_.pairs(); }
  double index_bytes() const {
    return bytes_of(index_q_) + bytes_of(index_k_) + bytes_of(block_ids_);
  }
  static double attention_flops(const SelectionFacts& selection) {
    return 4.0 * kM3.head_dim * kM3.group_size() * selection.attended_tokens;
  }
  /// Every block is taken by somebody here: its own tokens at least, in a whole prompt.
  double attention_bytes() const {
    return bytes_of(q_) + bytes_of(out_) + bytes_of(k_) + bytes_of(v_) + bytes_of(block_ids_);
  }

 private:
  Shape shape_;
  DeviceTensor page_table_, seq_lens_k_, block_ids_;
  DeviceTensor index_q_, index_k_, q_, k_, v_, out_;
};

/// A plan on GPU tensors: whoever takes it but a host backend, which declines them.
template <class Args>
struct Planned {
  Planned(const Args& request, const Options& options)
      : args(request), plan(msa::plan(request, options)) {}
  void enqueue(std::byte* workspace, cudaStream_t stream) const {
    plan.run(args, {workspace, plan.workspace_bytes()}, {stream});
  }
  Args args;
  Plan<Args> plan;
};

PreparedCase prepare_indexer(const Shape& shape, DType dtype, const Options& options) {
  const auto prompt = std::make_shared<Prompt>(shape);
  prompt->add_index(kRealLike, dtype);
  const Planned<Indexer> indexer(prompt->indexer(), options);
  const auto workspace = std::make_shared<DeviceMemory>(indexer.plan.workspace_bytes());
  return {.enqueue = [=](cudaStream_t s) { indexer.enqueue(workspace->data(), s); },
          .implementation = indexer.plan.implementation(),
          .flops = prompt->index_flops(),
          .e4m3_flops = dtype == DType::e4m3 ? prompt->index_flops() : 0.0,
          .bytes = prompt->index_bytes(),
          .extra_bytes = workspace->size(),
          .selection_after_run = [=] { return prompt->selection(); }};
}

PreparedCase prepare_attention(const Shape& shape, const SelectionFamily& family, DType key_dtype,
                               const Options& options) {
  const auto prompt = std::make_shared<Prompt>(shape);
  prompt->add_attention(key_dtype);
  prompt->add_selection(family);
  const Planned<SparseAttentionForward> attention(prompt->attention(), options);
  const auto workspace = std::make_shared<DeviceMemory>(attention.plan.workspace_bytes());
  const SelectionFacts selection = prompt->selection();
  return {.enqueue = [prompt, attention,
                      workspace](cudaStream_t s) { attention.enqueue(workspace->data(), s); },
          .implementation = attention.plan.implementation(),
          .flops = Prompt::attention_flops(selection),
          .bytes = prompt->attention_bytes(),
          .extra_bytes = workspace->size(),
          .selection = selection};
}

/// Indexer, then attention on what it chose; the workspaces take turns in the same memory.
PreparedCase prepare_total(const Shape& shape, DType index_dtype, const Options& options) {
  const auto prompt = std::make_shared<Prompt>(shape);
  prompt->add_index(kRealLike, index_dtype);
  prompt->add_attention();
  const Planned<Indexer> indexer(prompt->indexer(), options);
  const Planned<SparseAttentionForward> attention(prompt->attention(), options);
  const auto workspace = std::make_shared<DeviceMemory>(
      std::max(indexer.plan.workspace_bytes(), attention.plan.workspace_bytes()));
  // The ids that attention will find, for its share of the necessary work.
  indexer.enqueue(workspace->data(), nullptr);
  const SelectionFacts selection = prompt->selection();
  return {.enqueue =
              [prompt, indexer, attention, workspace](cudaStream_t s) {
                indexer.enqueue(workspace->data(), s);
                attention.enqueue(workspace->data(), s);
              },
          .implementation =
              core::concat(indexer.plan.implementation(), " + ", attention.plan.implementation()),
          .flops = prompt->index_flops() + Prompt::attention_flops(selection),
          .e4m3_flops = index_dtype == DType::e4m3 ? prompt->index_flops() : 0.0,
          .bytes = prompt->index_bytes() + prompt->attention_bytes(),
          .extra_bytes = workspace->size() + prompt->id_bytes(),
          .selection = selection};
}

}  // namespace

std::vector<BenchCase> gpu_cases() {
  constexpr std::int64_t k = 1024;
  const std::vector<Shape> prompts = {{"8k", 8 * k, 8 * k},
                                      {"32k", 32 * k, 32 * k},
                                      {"128k", 128 * k, 128 * k},
                                      {"1m", k * k, k * k}};
  const Shape chunk{"chunk2k_512k", 2 * k, 512 * k};
  const struct {
    const char* name;
    SelectionFamily family;
  } families[] = {{"real", kRealLike}, {"weak", kWeak}, {"random", kRandom}};
  std::vector<BenchCase> cases;
  const auto add = [&](const std::string& name, const Shape& shape, const auto& prepare) {
    cases.push_back({name, shape.seq_len_k, prepare});
  };
  const auto add_shape = [&](const Shape& shape) {
    add(core::concat("index.", shape.name), shape,
        [shape](const Options& o) { return prepare_indexer(shape, DType::bf16, o); });
    for (const auto& [name, family] : families) {
      add(core::concat("attention.", shape.name, ".", name), shape,
          [shape, family](const Options& o) {
            return prepare_attention(shape, family, DType::bf16, o);
          });
    }
    add(core::concat("total.", shape.name), shape,
        [shape](const Options& o) { return prepare_total(shape, DType::bf16, o); });
  };
  for (const Shape& shape : prompts) {
    add_shape(shape);
    add(core::concat("index.", shape.name, ".fp8_index"), shape,
        [shape](const Options& o) { return prepare_indexer(shape, DType::e4m3, o); });
    add(core::concat("total.", shape.name, ".fp8_index"), shape,
        [shape](const Options& o) { return prepare_total(shape, DType::e4m3, o); });
  }
  add_shape(chunk);
  for (const Shape& shape : {prompts[1], prompts[2]}) {
    add(core::concat("attention.", shape.name, ".real.fp8_kv"), shape,
        [shape](const Options& o) { return prepare_attention(shape, kRealLike, DType::e4m3, o); });
  }
  return cases;
}

}  // namespace msa::bench
