// SPDX-License-Identifier: Apache-2.0
//
// The little of UTF-8 and Unicode that the tokenizer needs beside its regular expressions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace msa::model {

inline constexpr char32_t kReplacementCharacter = 0xFFFD;

enum class Utf8Status : std::uint8_t {
  valid,
  invalid,    ///< No continuation of the text can make these bytes valid.
  truncated,  ///< The text ends inside a sequence that is valid so far.
};

struct Utf8Step {
  char32_t code = kReplacementCharacter;
  std::size_t num_bytes = 0;  ///< At least 1; where not valid, the maximal subpart.
  Utf8Status status = Utf8Status::invalid;
};

/// Decodes the character at text[at], at < text.size(). Surrogates, overlong forms and values above
/// U+10FFFF are invalid.
Utf8Step decode_utf8(std::string_view text, std::size_t at);

void append_utf8(std::string& text, char32_t code);

bool is_valid_utf8(std::string_view text);

/// Each maximal ill-formed subpart becomes one U+FFFD, as with Python's errors="replace".
std::string replace_invalid_utf8(std::string_view text);

/// Moves all that is complete from `pending` into the result, with replacement of what is invalid;
/// keeps a sequence that further bytes may complete.
std::string take_complete_utf8(std::string& pending);

/// Unicode property White_Space, which is the same in all versions since 6.3.
bool is_white_space(char32_t code);

}  // namespace msa::model
