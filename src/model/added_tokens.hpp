// SPDX-License-Identifier: Apache-2.0
//
// The "added_tokens" of a tokenizer.json: texts that are found ahead of all other tokenization.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/json_node.hpp"
#include "model/regex.hpp"

namespace msa::model {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool special = false;      ///< Left out by decoding with skip_special_tokens.
  bool single_word = false;  ///< Only where no word character touches it.
  bool lstrip = false;       ///< Takes the white space on its left along.
  bool rstrip = false;       ///< Takes the white space on its right along.
  bool normalized = false;   ///< Looked for in a second pass, in what the first pass has left.
};

class AddedTokens {
 public:
  /// Null or a list.
  static AddedTokens parse(const JsonNode& node);

  const std::vector<AddedToken>& tokens() const { return tokens_; }

  /// Cuts `text` into added tokens, of which the leftmost and then longest wins, and the rest.
  void split(std::string_view text, const std::function<void(std::string_view)>& take_text,
             const std::function<void(std::int32_t)>& take_token) const;

 private:
  /// A byte trie of token contents.
  class Finder {
   public:
    void add(const std::string& content, std::size_t token);
    /// The longest content at text[at], as an index of tokens_; -1: none.
    std::ptrdiff_t longest_at(std::string_view text, std::size_t at) const;

   private:
    std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // (node << 8 | byte) -> node
    std::vector<std::ptrdiff_t> tokens_ = {-1};               // by node
  };
  void pass(const Finder& finder, std::string_view text,
            const std::function<void(std::string_view)>& take_text,
            const std::function<void(std::int32_t)>& take_token) const;

  std::vector<AddedToken> tokens_;
  Finder first_;
  Finder second_;
};

}  // namespace msa::model
