// SPDX-License-Identifier: Apache-2.0
//
// What is fuzzed: functions that must survive any bytes. Each runs as a libFuzzer binary (preset
// `fuzz`) and, over the kept corpus, as an ordinary test.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>

#include "core/check.hpp"

namespace msa::fuzz {

using Bytes = std::span<const std::uint8_t>;

/// Thrown where the library did what it must not do. Nobody catches it: libFuzzer reports a crash,
/// GoogleTest a failure.
class Finding : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) throw Finding(core::concat(parts...));
}

/// Runs `read`; true where it succeeded. Refusing by an Error(invalid_argument) with a text is
/// fine, any other exception passes through.
bool accepts(const std::function<void()>& read);

/// A safetensors file, from memory and as a checkpoint; or, where the bytes begin with '{', the
/// index of a checkpoint of two shards.
void safetensors(Bytes bytes);
/// A config.json.
void config(Bytes bytes);
/// A tokenizer.json, then a zero byte, then a text to encode; bytes that begin with '{' only. Other
/// bytes are a text for the tokenizer of examples/tiny_m3.
void tokenizer(Bytes bytes);
/// One operation through msa.h: a sound request, some of whose fields and numbers are changed.
void c_api(Bytes bytes);
/// A random small problem on every backend and SIMD target against the reference.
void differential(Bytes bytes);

struct Target {
  const char* name;  ///< also of its corpus folder
  void (*run)(Bytes);
};

inline constexpr std::array<Target, 5> kTargets = {{{"safetensors", safetensors},
                                                    {"config", config},
                                                    {"tokenizer", tokenizer},
                                                    {"c_api", c_api},
                                                    {"differential", differential}}};

}  // namespace msa::fuzz
