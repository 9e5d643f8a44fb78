// SPDX-License-Identifier: Apache-2.0
//
// Byte-level byte pair encoding: the "model" of a tokenizer.json.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model/json_node.hpp"

namespace msa::model {

/// The printable stand-in of a byte in byte-level vocabularies ("Ġ" for a space): 256 characters,
/// the same for every such tokenizer.
char32_t character_of_byte(unsigned char byte);
/// The inverse; none for characters that stand for no byte.
std::optional<unsigned char> byte_of_character(char32_t character);

class Bpe {
 public:
  static Bpe parse(const JsonNode& node);

  /// Appends the ids of one piece: `piece` as raw bytes. Time O(n log n) in the bytes of the piece.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const;

  /// Tokens as the file spells them, that is with stand-ins for bytes.
  const std::unordered_map<std::string, std::int32_t>& vocab() const { return vocab_; }

 private:
  struct Merge {
    std::int32_t rank;
    std::int32_t id;
  };
  void parse_vocab(const JsonNode& node);
  void parse_merges(const JsonNode& node);
  void parse_options(const JsonNode& node);
  std::vector<std::int32_t> symbols_of(std::string_view piece) const;
  const Merge* merge_of(std::int32_t left, std::int32_t right) const;

  std::unordered_map<std::string, std::int32_t> vocab_;
  std::unordered_map<std::uint64_t, Merge> merges_;  // by (left id << 32) | right id
  std::array<std::int32_t, 256> byte_ids_{};         // -1: no token for that byte
  std::int32_t unknown_id_ = -1;                     // -1: such bytes vanish
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
};

}  // namespace msa::model
