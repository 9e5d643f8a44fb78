// SPDX-License-Identifier: Apache-2.0
//
// The outputs of a run, and what tests ask of them whatever the operation.
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {

template <class Args>
Outputs::Outputs(const Inputs& inputs, Args& args, bool wide) {
  const Case& spec = inputs.spec;
  const Problem& p = spec.problem;
  const DType element = wide ? DType::f64 : spec.dtype;
  const DType statistic = element == DType::f64 ? DType::f64 : DType::f32;
  const auto add = [&](const char* name, TensorView& field, DType dtype,
                       const std::vector<std::int64_t>& shape) {
    tensors_.push_back({name, GuardedTensor(dtype, shape, spec.row_gap, GuardedTensor::kSentinel)});
    field = tensors_.back().tensor;
  };
  const auto add_like = [&](const char* name, TensorView& field, const TensorView& like) {
    add(name, field, element, {like.shape.begin(), like.shape.begin() + like.rank});
  };
  if constexpr (requires { args.q_out; }) {
    add_like("q_out", args.q_out, args.q);
    add("index_q_out", args.index_q_out, inputs.index_k.view().dtype,
        {inputs.total_q, p.num_kv_heads, p.index_dim});
  }
  if constexpr (requires { args.k_pages; }) {
    const auto copy = [&](const char* name, TensorView& field, const GuardedTensor& pages) {
      tensors_.push_back({name, pages.clone()});
      field = tensors_.back().tensor;
    };
    copy("k_pages", args.k_pages, inputs.k);
    copy("v_pages", args.v_pages, inputs.v);
    copy("index_k_pages", args.index_k_pages, inputs.index_k);
    if (spec.index_codes) {
      copy("index_k_codes_pages", args.index_k_codes_pages, inputs.index_k_codes);
      copy("index_k_scales_pages", args.index_k_scales_pages, inputs.index_k_scales);
    }
  } else if constexpr (requires { args.dq; }) {
    add_like("dq", args.dq, args.q);
    add_like("dk", args.dk, args.k);
    add_like("dv", args.dv, args.v);
  } else if constexpr (requires { args.dindex_q; }) {
    add("loss", args.loss, statistic, {1});
    add_like("dindex_q", args.dindex_q, args.index_q);
    add_like("dindex_k", args.dindex_k, args.index_k);
  } else if constexpr (requires { args.out; }) {
    if constexpr (requires { args.index_q; }) {
      add("block_ids", args.block_ids, DType::i32, {p.num_kv_heads, inputs.total_q, p.top_k});
    }
    add_like("out", args.out, args.q);
    add("lse", args.lse, statistic, {inputs.total_q, p.num_q_heads});
  } else if constexpr (requires { args.block_ids; }) {
    add("block_ids", args.block_ids, DType::i32, {p.num_kv_heads, inputs.total_q, p.top_k});
  } else {
    add("block_scores", args.block_scores, statistic,
        {p.num_kv_heads, inputs.total_q, inputs.num_blocks});
  }
}

std::string Outputs::damaged() const {
  for (const Named& named : tensors_) {
    const std::string damage = named.tensor.damaged();
    if (!damage.empty()) return std::string("output ") + named.name + ": " + damage;
  }
  return "";
}

std::string Outputs::difference(const Outputs& other) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const std::string text = tensors_[i].tensor.difference(other.tensors_[i].tensor);
    if (!text.empty()) return std::string("output ") + tensors_[i].name + ": " + text;
  }
  return "";
}

void Outputs::unify_nans() {
  for (const Named& named : tensors_) {
    const TensorView& view = named.tensor;
    if (view.dtype == DType::i32 || view.dtype == DType::i8) continue;
    for_each_index(view, [&](const auto& indices) {
      std::byte* const at = core::address_at(view, offset_at(view, indices));
      if (std::isnan(core::load_element(at, view.dtype))) {
        core::store_element(at, view.dtype, std::numeric_limits<double>::quiet_NaN());
      }
    });
  }
}

std::vector<std::span<std::byte>> Outputs::buffers() const {
  std::vector<std::span<std::byte>> all;
  for (const Named& named : tensors_) all.push_back(named.tensor.bytes());
  return all;
}

// NOLINTBEGIN(bugprone-macro-parentheses): the argument is a type
#define MSA_INSTANTIATE(Args) \
  template Outputs::Outputs(const Inputs& inputs, Args& args, bool wide);
// NOLINTEND(bugprone-macro-parentheses)
MSA_FOR_EACH_OPERATION(MSA_INSTANTIATE)
#undef MSA_INSTANTIATE

}  // namespace msa::testing
