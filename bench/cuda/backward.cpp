// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda/backward.hpp"

#include <algorithm>
#include <numeric>
#include <optional>

#include "core/check.hpp"
#include "msa/ops.hpp"

namespace msa::bench {
namespace {

constexpr Problem kM3{};

/// What a row has of a training step.
struct Step {
  bool forward = false;
  bool backward = false;
  bool kl = false;
};

/// The tensors of one layer and their gradients.
class Sequence {
 public:
  explicit Sequence(std::int64_t num_tokens) : num_tokens_(num_tokens) {
    const auto queries = [&] { return rows(kM3.num_q_heads, kM3.head_dim); };
    const auto keys = [&] { return rows(kM3.num_kv_heads, kM3.head_dim); };
    q_ = queries();
    k_ = keys();
    v_ = keys();
    fill_normal(q_, 6);
    fill_normal(k_, 3);
    fill_normal(v_, 4);
    out_ = queries();
    lse_ = DeviceTensor(DType::f32, {num_tokens, kM3.num_q_heads});
    block_ids_ = DeviceTensor(DType::i32, {kM3.num_kv_heads, num_tokens, kM3.top_k});
    fill_selection(block_ids_, kRealLike, kM3, num_tokens, 9);
  }
  void add_backward() {
    dout_ = rows(kM3.num_q_heads, kM3.head_dim);
    fill_normal(dout_, 7);
    dq_ = rows(kM3.num_q_heads, kM3.head_dim);
    dk_ = rows(kM3.num_kv_heads, kM3.head_dim);
    dv_ = rows(kM3.num_kv_heads, kM3.head_dim);
  }
  void add_kl() {
    index_q_ = rows(kM3.num_kv_heads, kM3.index_dim);
    index_k_ = rows(1, kM3.index_dim);
    fill_normal(index_q_, 1);
    fill_normal(index_k_, 2);
    loss_ = DeviceTensor(DType::f32, {1});
    dindex_q_ = rows(kM3.num_kv_heads, kM3.index_dim);
    dindex_k_ = rows(1, kM3.index_dim);
  }

  SparseAttentionForward forward() const {
    return {.problem = kM3,
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .block_ids = block_ids_.view(),
            .out = out_.view(),
            .lse = lse_.view()};
  }
  SparseAttentionBackward backward() const {
    return {.problem = kM3,
            .q = q_.view(),
            .k = k_.view(),
            .v = v_.view(),
            .block_ids = block_ids_.view(),
            .out = out_.view(),
            .lse = lse_.view(),
            .dout = dout_.view(),
            .dq = dq_.view(),
            .dk = dk_.view(),
            .dv = dv_.view()};
  }
  IndexerKlBackward kl() const {
    return {.problem = kM3,
            .q = q_.view(),
            .k = k_.view(),
            .index_q = index_q_.view(),
            .index_k = index_k_.view(),
            .block_ids = block_ids_.view(),
            .loss = loss_.view(),
            .dindex_q = dindex_q_.view(),
            .dindex_k = dindex_k_.view(),
            .lse = lse_.view()};
  }

  SelectionFacts selection() const { return facts_of(block_ids_, kM3, num_tokens_); }

  /// Products with q, k, v and their gradients: two of the forward pass, five of the backward one;
  /// scores of teacher and student and the student's two gradients.
  static double flops(const Step& step, const SelectionFacts& selection) {
    const double product = 2.0 * kM3.head_dim * kM3.group_size() * selection.attended_tokens;
    const double index_product = 2.0 * kM3.index_dim * selection.attended_tokens;
    return (step.forward ? 2 * product : 0.0) + (step.backward ? 5 * product : 0.0) +
           (step.kl ? product + 3 * index_product : 0.0);
  }
  /// Every tensor once for each operation that reads or writes it.
  double bytes(const Step& step) const {
    const auto total = [](bool counts, std::initializer_list<const DeviceTensor*> tensors) {
      if (!counts) return 0.0;
      return std::accumulate(tensors.begin(), tensors.end(), 0.0,
                             [](double sum, const DeviceTensor* tensor) {
                               return sum + static_cast<double>(tensor->size());
                             });
    };
    return total(step.forward, {&q_, &k_, &v_, &block_ids_, &out_, &lse_}) +
           total(step.backward,
                 {&q_, &k_, &v_, &block_ids_, &out_, &lse_, &dout_, &dq_, &dk_, &dv_}) +
           total(step.kl,
                 {&q_, &k_, &index_q_, &index_k_, &block_ids_, &lse_, &dindex_q_, &dindex_k_});
  }

 private:
  DeviceTensor rows(std::int64_t heads, std::int64_t dim) const {
    return DeviceTensor(DType::bf16, {num_tokens_, heads, dim});
  }

  std::int64_t num_tokens_;
  DeviceTensor q_, k_, v_, out_, lse_, block_ids_;
  DeviceTensor dout_, dq_, dk_, dv_;
  DeviceTensor index_q_, index_k_, loss_, dindex_q_, dindex_k_;
};

/// A plan that may be absent.
template <class Args>
class Part {
 public:
  Part() = default;
  Part(const Args& args, const Options& options) : args_(args), plan_(msa::plan(args, options)) {}
  std::size_t workspace_bytes() const { return plan_ ? plan_->workspace_bytes() : 0; }
  void run(const DeviceMemory& workspace, cudaStream_t stream) const {
    if (plan_) plan_->run(args_, {workspace.data(), plan_->workspace_bytes()}, {stream});
  }
  void add_name(std::string& names) const {
    if (plan_) names += core::concat(names.empty() ? "" : " + ", plan_->implementation());
  }

 private:
  Args args_{};
  std::optional<Plan<Args>> plan_;
};

PreparedCase prepare(std::int64_t num_tokens, const Step& step, const Options& options,
                     const Options& kl_options) {
  const auto sequence = std::make_shared<Sequence>(num_tokens);
  if (step.backward) sequence->add_backward();
  if (step.kl) sequence->add_kl();
  Part<SparseAttentionForward> forward(sequence->forward(), options);
  Part<SparseAttentionBackward> backward;
  Part<IndexerKlBackward> kl;
  if (step.backward) backward = {sequence->backward(), options};
  if (step.kl) kl = {sequence->kl(), kl_options};
  // They take turns in the same memory.
  const auto workspace = std::make_shared<DeviceMemory>(
      std::max({forward.workspace_bytes(), backward.workspace_bytes(), kl.workspace_bytes()}));
  // What the backward pass alone reads of the forward one.
  forward.run(*workspace, nullptr);
  MSA_CUDA_CHECK(cudaStreamSynchronize(nullptr));
  if (!step.forward) forward = {};
  const SelectionFacts selection = sequence->selection();
  std::string names;
  forward.add_name(names);
  backward.add_name(names);
  kl.add_name(names);
  return {.enqueue =
              [sequence, forward, backward, kl, workspace](cudaStream_t stream) {
                forward.run(*workspace, stream);
                backward.run(*workspace, stream);
                kl.run(*workspace, stream);
              },
          .implementation = names,
          .flops = Sequence::flops(step, selection),
          .bytes = sequence->bytes(step),
          .extra_bytes = workspace->size(),
          .selection = selection};
}

}  // namespace

std::vector<BenchCase> backward_cases() {
  constexpr std::int64_t k = 1024;
  const struct {
    const char* name;
    Step step;
    bool deterministic = true;
    const char* kl_backend = nullptr;  ///< by name only; null: as the options say
  } rows[] = {{"forward", {.forward = true}},
              {"backward", {.backward = true}},
              {"kl", {.kl = true}},
              {"kl.key_rows", {.kl = true}, true, "cuda_sm90_key_rows"},
              {"total", {.forward = true, .backward = true, .kl = true}},
              {"total.default", {.forward = true, .backward = true, .kl = true}, false}};
  std::vector<BenchCase> cases;
  for (const auto& [length, num_tokens] :
       {std::pair{"8k", 8 * k}, std::pair{"32k", 32 * k}, std::pair{"128k", 128 * k}}) {
    for (const auto& row : rows) {
      cases.push_back({core::concat("train.", length, ".", row.name), num_tokens,
                       [row, num_tokens = num_tokens](const Options& options) {
                         Options chosen = options;
                         chosen.deterministic = row.deterministic;
                         Options of_kl = chosen;
                         if (row.kl_backend != nullptr && of_kl.backend == nullptr) {
                           of_kl.backend = row.kl_backend;
                         }
                         return prepare(num_tokens, row.step, chosen, of_kl);
                       }});
    }
  }
  return cases;
}

}  // namespace msa::bench
