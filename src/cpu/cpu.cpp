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

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(exp2_all);

namespace {

constexpr std::int64_t kCompiled = HWY_TARGETS;

constexpr std::int64_t lowest_bit(std::int64_t mask) { return mask & -mask; }

/// The compiled target of that name, 0 if there is none.
std::int64_t find_target(const std::string& name) {
  for (std::int64_t rest = kCompiled; rest != 0; rest &= rest - 1) {
    if (name == hwy::TargetName(lowest_bit(rest))) return lowest_bit(rest);
  }
  return 0;
}

/// Applies MSA_CPU_TARGET. Lower bits are better targets.
bool limit_targets() {
  const std::string name = core::env("MSA_CPU_TARGET");
  if (name.empty()) return true;
  const std::int64_t best = find_target(name);
  MSA_CHECK(best != 0, "MSA_CPU_TARGET is '", name, "', expected one of ", [] {
    std::string names;
    for (std::int64_t rest = kCompiled; rest != 0; rest &= rest - 1) {
      names += core::concat(names.empty() ? "" : ", ", hwy::TargetName(lowest_bit(rest)));
    }
    return names;
  }());
  hwy::DisableTargets(best - 1);
  return true;
}

std::int64_t usable_targets() {
  static const bool limited = limit_targets();
  static_cast<void>(limited);
  const std::int64_t usable = hwy::SupportedTargets() & kCompiled;
  return usable != 0 ? usable : HWY_STATIC_TARGET;
}

}  // namespace

const char* simd_target() { return hwy::TargetName(lowest_bit(usable_targets())); }

std::vector<const char*> simd_targets() {
  std::vector<const char*> names;
  for (std::int64_t rest = usable_targets(); rest != 0; rest &= rest - 1) {
    names.push_back(hwy::TargetName(lowest_bit(rest)));
  }
  return names;
}

void use_simd_target(const char* name) {
  hwy::SetSupportedTargetsForTest(0);
  if (name != nullptr) {
    const std::int64_t target = find_target(name) & usable_targets();
    MSA_CHECK(target != 0, "SIMD target ", name, " is not available here");
    hwy::SetSupportedTargetsForTest(target);
  }
  hwy::GetChosenTarget().DeInit();
}

void exp2_nonpositive(const float* x, float* y, std::int64_t count) {
  HWY_DYNAMIC_DISPATCH(exp2_all)(x, y, count);
}

}  // namespace msa::cpu
#endif
