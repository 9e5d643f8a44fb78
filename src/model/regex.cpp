// SPDX-License-Identifier: Apache-2.0
#include "model/regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <cctype>
#include <cstdint>
#include <ios>
#include <utility>

#include "core/check.hpp"
#include "model/utf8.hpp"

namespace msa::model {
namespace {

// Backtracking steps for one match. Oniguruma gives up at 10,000,000 as well; no pattern of a real
// tokenizer comes near it on real text.
constexpr std::uint32_t kMatchLimit = 10'000'000;
constexpr std::uint32_t kHeapLimitKibibytes = 256 * 1024;

template <auto Free>
struct Release {
  template <class T>
  void operator()(T* object) const {
    Free(object);
  }
};
using Code = std::unique_ptr<pcre2_code, Release<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Release<pcre2_compile_context_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Release<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Release<pcre2_match_data_free>>;

std::string pcre2_text(int error) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

PCRE2_SPTR units(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

/// Null with the reason where the pattern does not compile.
Code compile(std::string_view pattern, std::string* reason) {
  const CompileContext context(pcre2_compile_context_create(nullptr));
  if (!context) throw Error(ErrorCode::out_of_memory, "regex: out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  // Without PCRE2_NEVER_BACKSLASH_C one could leave a match in the middle of a character.
  Code code(pcre2_compile(units(pattern), pattern.size(),
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &error,
                          &offset, context.get()));
  if (!code) *reason = core::concat(pcre2_text(error), " at offset ", offset);
  return code;
}

}  // namespace

struct Regex::Program {
  std::string pattern;  // as written by the user
  Code code;
};

Regex Regex::pcre2(std::string_view pattern) {
  std::string reason;
  auto program = std::make_shared<Program>();
  program->pattern = pattern;
  program->code = compile(pattern, &reason);
  MSA_CHECK(program->code, "regex \"", pattern, "\": ", reason);
  // Where there is no JIT (or no executable memory) pcre2_match interprets.
  pcre2_jit_compile(program->code.get(), PCRE2_JIT_COMPLETE);
  return Regex(std::move(program));
}

Regex Regex::oniguruma(std::string_view pattern) {
  const std::string translated = translate_oniguruma(pattern);
  std::string reason;
  auto program = std::make_shared<Program>();
  program->pattern = pattern;
  program->code = compile(translated, &reason);
  MSA_CHECK(program->code, "regex \"", pattern, "\": ", reason, " of \"", translated, "\"");
  pcre2_jit_compile(program->code.get(), PCRE2_JIT_COMPLETE);
  return Regex(std::move(program));
}

Regex Regex::literal(std::string_view text) {
  std::string pattern;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && std::isalnum(static_cast<unsigned char>(c)) == 0) {
      pattern += core::concat("\\x{", std::hex, static_cast<int>(c), "}");
    } else {
      pattern += c;
    }
  }
  return pcre2(pattern);
}

std::vector<Span> Regex::find_all(std::string_view text) const {
  const MatchContext context(pcre2_match_context_create(nullptr));
  const MatchData data(pcre2_match_data_create(1, nullptr));
  if (!context || !data) throw Error(ErrorCode::out_of_memory, "regex: out of memory");
  pcre2_set_match_limit(context.get(), kMatchLimit);
  pcre2_set_heap_limit(context.get(), kHeapLimitKibibytes);

  std::vector<Span> matches;
  std::size_t from = 0;
  while (from <= text.size()) {
    const auto search = [&](std::uint32_t options) {
      return pcre2_match(program_->code.get(), units(text), text.size(), from,
                         PCRE2_NO_UTF_CHECK | options, data.get(), context.get());
    };
    int found = search(0);
    // The JIT's stack is small and fixed; the interpreter's grows.
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = search(PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) break;
    MSA_CHECK(found >= 0, "regex \"", program_->pattern, "\": ", pcre2_text(found), " at byte ",
              from, " of a text of ", text.size(), " bytes");
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(data.get());
    // \K in a lookaround can turn the two around or reach back behind the last match.
    MSA_CHECK(ends[0] >= from && ends[1] >= ends[0], "regex \"", program_->pattern,
              "\": match with its start before the search position");
    const bool repeated = ends[0] == ends[1] && !matches.empty() && matches.back().end == ends[1];
    if (repeated) {
      from = from < text.size() ? from + decode_utf8(text, from).num_bytes : from + 1;
    } else {
      matches.push_back({ends[0], ends[1]});
      from = ends[1];
    }
  }
  return matches;
}

}  // namespace msa::model
