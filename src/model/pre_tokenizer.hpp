// SPDX-License-Identifier: Apache-2.0
//
// The "pre_tokenizer" of a tokenizer.json: cuts a text into the pieces that BPE merges within.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "model/json_node.hpp"
#include "model/regex.hpp"

namespace msa::model {

enum class SplitBehavior : std::uint8_t {
  removed,
  isolated,
  merged_with_previous,
  merged_with_next,
  contiguous,
};

class PreTokenizer {
 public:
  /// Takes ByteLevel, alone or as the last element of a Sequence behind Split, Digits, Whitespace
  /// and WhitespaceSplit. Throws Error naming the field for anything else.
  static PreTokenizer parse(const JsonNode& node);

  /// Calls `take` with each piece that is not empty, in order; a piece is valid during the call.
  void split(std::string_view text, const std::function<void(std::string_view)>& take) const;

 private:
  struct Stage {
    Regex pattern;
    SplitBehavior behavior;
    bool invert;
    bool add_prefix_space;  // before the split; ByteLevel only
  };
  void add_stages(const JsonNode& node, int depth);
  void add_byte_level(const JsonNode& node);
  void run(std::size_t stage, std::string_view text,
           const std::function<void(std::string_view)>& take) const;

  std::vector<Stage> stages_;
  bool is_byte_level_ = false;
};

}  // namespace msa::model
