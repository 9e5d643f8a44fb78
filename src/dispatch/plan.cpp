// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstring>

#include "core/check.hpp"
#include "core/env.hpp"
#include "core/indexed_attention.hpp"
#include "dispatch/lists.hpp"
#include "msa/backend.hpp"

namespace msa {
namespace {

bool same_layout(const TensorView& a, const TensorView& b) {
  return a.dtype == b.dtype && a.device == b.device && a.rank == b.rank && a.shape == b.shape &&
         a.stride == b.stride;
}

template <class Args>
std::string shapes_text(const Args& args) {
  std::string text;
  core::for_each_tensor(args, [&](const char* name, const TensorView& view, core::Use) {
    if (view.given()) {
      text += core::concat(text.empty() ? "" : " ", name, " ", name_of(view.dtype),
                           core::shape_text(view));
    }
  });
  return text;
}

}  // namespace

template <class Args>
Plan<Args> make_plan(const Args& args, const Options& options) {
  core::validate(args);
  const char* operation = core::operation_name(args);
  const std::string forced =
      options.backend != nullptr ? options.backend : core::env("MSA_BACKEND");
  const detail::Implementation<Args>* chosen = nullptr;
  std::string refusals;
  std::string names;
  bool known = forced.empty();
  for (const detail::Implementation<Args>* candidate : dispatch::implementations_of<Args>()) {
    names += core::concat(names.empty() ? "" : ", ", candidate->name);
    if (!forced.empty() && forced != candidate->name) continue;
    known = true;
    const std::optional<std::string> reason = candidate->declines(args, options);
    if (!reason) {
      chosen = candidate;
      break;
    }
    refusals += core::concat(refusals.empty() ? "" : "; ", candidate->name, ": ", *reason);
  }
  if (core::env("MSA_VERBOSE") == "1") {
    std::fprintf(stderr, "msa: plan %s: %s -> %s%s%s\n", operation, shapes_text(args).c_str(),
                 chosen != nullptr ? chosen->name : "none",
                 refusals.empty() ? "" : "; declined: ", refusals.c_str());
  }
  if (chosen == nullptr) {
    throw Error(
        ErrorCode::unsupported,
        known ? core::concat("plan(", operation, "): no implementation takes this: ", refusals)
              : core::concat("plan(", operation, "): no implementation is named '", forced,
                             "', there are: ", names));
  }
  Plan<Args> plan;
  plan.planned_ = args;
  plan.implementation_ = chosen;
  plan.workspace_bytes_ = chosen->workspace_bytes(args);
  return plan;
}

template <class Args>
std::size_t Plan<Args>::workspace_bytes() const {
  return workspace_bytes_;
}

template <class Args>
const char* Plan<Args>::implementation() const {
  return implementation_ == nullptr ? "none" : implementation_->name;
}

template <class Args>
void Plan<Args>::run(const Args& args, std::span<std::byte> workspace, Stream stream) const {
  const char* operation = core::operation_name(args);
  MSA_CHECK(implementation_ != nullptr, "run(", operation,
            "): the plan is empty; make it with plan()");
  MSA_CHECK(workspace.size() >= workspace_bytes_, "run(", operation, "): workspace has ",
            workspace.size(), " bytes, the plan needs ", workspace_bytes_);
  MSA_CHECK(workspace_bytes_ == 0 || reinterpret_cast<std::uintptr_t>(workspace.data()) % 64 == 0,
            "run(", operation, "): workspace is not aligned to 64 bytes");
  // Both walks visit the same fields in the same order.
  constexpr std::size_t kMaxTensors = 32;
  std::array<TensorView, kMaxTensors> planned{};
  std::size_t count = 0;
  core::for_each_tensor(
      planned_, [&](const char*, const TensorView& view, core::Use) { planned[count++] = view; });
  count = 0;
  core::for_each_tensor(args, [&](const char* name, const TensorView& view, core::Use) {
    const TensorView& expected = planned[count++];
    MSA_CHECK(same_layout(view, expected), "run(", operation, "): ", name, " is ",
              name_of(view.dtype), core::shape_text(view), ", planned was ",
              name_of(expected.dtype), core::shape_text(expected), " (or its strides differ)");
    MSA_CHECK(view.data != nullptr || view.num_elements() == 0, "run(", operation, "): ", name,
              " has a null pointer");
    MSA_CHECK(reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) == 0, "run(",
              operation, "): ", name, " is not aligned to its elements of ", size_of(view.dtype),
              " bytes");
  });
  MSA_CHECK(std::memcmp(&args.problem, &planned_.problem, sizeof(Problem)) == 0, "run(", operation,
            "): problem differs from the planned one");
  implementation_->run(args, workspace, stream);
}

// Visible by name: an instantiation is otherwise as hidden as its argument.
#define MSA_INSTANTIATE(Args)        \
  template class MSA_API Plan<Args>; \
  Plan<Args> plan(const Args& args, const Options& options) { return make_plan(args, options); }
MSA_FOR_EACH_OPERATION(MSA_INSTANTIATE)
#undef MSA_INSTANTIATE

}  // namespace msa
