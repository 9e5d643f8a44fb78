// SPDX-License-Identifier: Apache-2.0
#include "cpu/cpu.hpp"

#include <cstring>

#include "core/check.hpp"
#include "core/env.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cpu.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/exp2-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

void exp2_all(const float* x, float* y, std::int64_t count) {
  const FloatTag d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  HWY_ALIGN float buffer[kMaxLanes];
  for (std::int64_t i = 0; i < count; i += lanes) {
    const std::int64_t rest = std::min(lanes, count - i);
    std::copy_n(x + i, rest, buffer);
    hn::Store(exp2_nonpositive(hn::Load(d, buffer)), d, buffer);
    std::copy_n(buffer, rest, y + i);
  }
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(exp2_all);
HWY_EXPORT(target_name);

namespace {

constexpr std::int64_t kCompiled = HWY_TARGETS;

constexpr std::int64_t lowest_bit(std::int64_t mask) { return mask & -mask; }

/// Calls visit(target, name) for every target of the mask, best first: lower bits are better.
template <class Visit>
void for_each_target(std::int64_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(lowest_bit(mask), hwy::TargetName(lowest_bit(mask)));
}

/// The target of that name, 0 if the mask has none.
std::int64_t find_target(std::int64_t mask, const std::string& wanted) {
  std::int64_t found = 0;
  for_each_target(mask, [&](std::int64_t target, const char* name) {
    if (wanted == name) found = target;
  });
  return found;
}

/// What the CPU has of the compiled targets, up to MSA_CPU_TARGET.
std::int64_t detect_targets() {
  const std::string name = core::env("MSA_CPU_TARGET");
  std::int64_t allowed = kCompiled;
  if (!name.empty()) {
    const std::int64_t best = find_target(kCompiled, name);
    std::string names;
    for_each_target(kCompiled, [&](std::int64_t, const char* known) {
      names += core::concat(names.empty() ? "" : ", ", known);
    });
    MSA_CHECK(best != 0, "MSA_CPU_TARGET is '", name, "', expected one of ", names);
    allowed &= ~(best - 1);
  }
  const std::int64_t usable = hwy::SupportedTargets() & allowed;
  // Written to Highway's choice directly: its DisableTargets() is undone by the next call of
  // SupportedTargets() (seen with 1.0.3).
  hwy::GetChosenTarget().Update(usable != 0 ? usable : HWY_STATIC_TARGET);
  return usable != 0 ? usable : HWY_STATIC_TARGET;
}

std::int64_t usable_targets() {
  static const std::int64_t usable = detect_targets();
  return usable;
}

}  // namespace

const char* simd_target() {
  usable_targets();
  return HWY_DYNAMIC_DISPATCH(target_name)();
}

std::vector<const char*> simd_targets() {
  std::vector<const char*> names;
  for_each_target(usable_targets(), [&](std::int64_t, const char* name) { names.push_back(name); });
  return names;
}

void use_simd_target(const char* name) {
  std::int64_t targets = usable_targets();
  if (name != nullptr) {
    targets = find_target(targets, name);
    MSA_CHECK(targets != 0, "SIMD target ", name, " is not available here");
  }
  hwy::GetChosenTarget().Update(targets);
}

void exp2_nonpositive(const float* x, float* y, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(exp2_all)(x, y, count);
}

}  // namespace msa::cpu
#endif
