// SPDX-License-Identifier: Apache-2.0
//
// Regular expressions over UTF-8 as tokenizer.json carries them. The `tokenizers` package runs them
// with Oniguruma; here they are translated to PCRE2 so that the same text gives the same matches:
//   \s \w \h \v \b and some POSIX brackets get Oniguruma's sets, X{n,m}+ means (?:X{n,m})+ and not
//   a possessive repeat, X{n}? means (?:X{n})?, {,m} is {0,m}, (?m) lets the dot match newlines,
//   \p{Script} means the script and not the script extensions.
// What would differ and cannot be translated is refused by name (class intersection and nested
// classes, absent operators, options in the middle of a pattern). Two differences stay: (?i:ss)
// does not match "ß" and the like (one character for several), and characters that are newer than
// the Unicode tables of the installed PCRE2 (Debian 12: Unicode 14) count as unassigned.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace msa::model {

/// Bytes [begin, end) of a text.
struct Span {
  std::size_t begin = 0;
  std::size_t end = 0;
};

class Regex {
 public:
  /// Throws Error(invalid_argument) with the pattern, the position and the reason.
  static Regex oniguruma(std::string_view pattern);
  static Regex pcre2(std::string_view pattern);
  static Regex literal(std::string_view text);

  /// All matches from left to right, `text` being valid UTF-8. An empty match right behind another
  /// match is passed over. Throws where the matcher's step limit ends a search. Thread-safe.
  std::vector<Span> find_all(std::string_view text) const;

 private:
  struct Program;
  explicit Regex(std::shared_ptr<const Program> program) : program_(std::move(program)) {}
  std::shared_ptr<const Program> program_;
};

/// The PCRE2 pattern for an Oniguruma pattern; throws Error(invalid_argument). For tests.
std::string translate_oniguruma(std::string_view pattern);

}  // namespace msa::model
