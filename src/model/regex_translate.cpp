// SPDX-License-Identifier: Apache-2.0
//
// Oniguruma's pattern syntax (its own default syntax, a relative of Ruby's) written as PCRE2's. The
// sets were compared character by character with the `tokenizers` package; tokenizer_test.cpp keeps
// samples of that.
#include <array>
#include <cctype>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "model/regex.hpp"
#include "model/utf8.hpp"

namespace msa::model {
namespace {

// Inner parts of character classes. PCRE2's own \s holds U+180E, which is no White_Space.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{D}\x{20}\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x{0}-\x{8}\x{E}-\x{1F}\x{21}-\x{84}\x{86}-\x{9F}\x{A1}-\x{167F}\x{1681}-\x{1FFF})"
    R"(\x{200B}-\x{2027}\x{202A}-\x{202E}\x{2030}-\x{205E}\x{2060}-\x{2FFF}\x{3001}-\x{10FFFF})";
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
// Outside of a class Oniguruma counts Latin-1's superscripts and fractions as word characters.
constexpr std::string_view kWordOutside =
    R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE})";
constexpr std::string_view kHexDigit = "0-9A-Fa-f";

// [:alpha:], [:alnum:] and [:lower:] are missing: between Unicode 14 and 16 old characters moved
// into them.
constexpr std::array<std::pair<std::string_view, std::string_view>, 5> kPosixSets{{
    {"space", kSpace},
    {"digit", R"(\p{Nd})"},
    {"punct", R"(\p{P}\p{S})"},
    {"upper", R"(\p{Uppercase})"},
    {"xdigit", kHexDigit},
}};

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// "L", "Lu", "L&"... as opposed to a script or another property.
bool is_general_category(std::string_view name) {
  return !name.empty() && name.size() <= 2 && name[0] >= 'A' && name[0] <= 'Z';
}

class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  std::string run() {
    while (at_ < in_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorCode::invalid_argument,
                core::concat("regex \"", in_, "\": ", what, " at offset ", at_));
  }

  char peek(std::size_t ahead = 0) const {
    return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0';
  }
  bool starts(std::string_view text) const { return in_.substr(at_).starts_with(text); }

  void copy(std::size_t num_bytes) {
    out_ += in_.substr(at_, num_bytes);
    at_ += num_bytes;
  }

  void step() {
    switch (in_[at_]) {
      case '\\':
        atom_ = out_.size();
        escape();
        return;
      case '[':
        atom_ = out_.size();
        character_class();
        return;
      case '(':
        open_group();
        return;
      case ')':
        if (groups_.empty()) refuse("unmatched )");
        atom_ = groups_.back();
        groups_.pop_back();
        copy(1);
        return;
      case '{':
        interval();
        return;
      case '*':
      case '+':
      case '?':
        copy(1);
        if (peek() == '?' || peek() == '+') copy(1);
        return;
      case '|':
      case '^':
      case '$':
      case '.':
        atom_ = out_.size();
        copy(1);
        return;
      default:
        atom_ = out_.size();
        copy(decode_utf8(in_, at_).num_bytes);
    }
  }

  /// "{n}", "{n,}", "{,m}", "{n,m}", else a literal brace.
  void interval() {
    std::size_t end = at_ + 1;
    std::string low;
    std::string high;
    while (end < in_.size() && is_digit(in_[end])) low += in_[end++];
    const bool has_comma = end < in_.size() && in_[end] == ',';
    if (has_comma) {
      ++end;
      while (end < in_.size() && is_digit(in_[end])) high += in_[end++];
    }
    const bool is_interval = end < in_.size() && in_[end] == '}' && !(low.empty() && high.empty());
    if (!is_interval) {
      atom_ = out_.size();
      out_ += R"(\{)";
      ++at_;
      return;
    }
    at_ = end + 1;
    out_ += '{' + (low.empty() ? std::string("0") : low) + (has_comma ? "," + high : "") + '}';
    // No possessive or, for a fixed count, lazy interval: the sign is a quantifier of its own.
    const bool lazy = has_comma && peek() == '?';
    if (lazy) {
      copy(1);
    } else if (peek() == '+' || peek() == '?') {
      out_.insert(atom_, "(?:");
      out_ += ')';
    }
  }

  void open_group() {
    if (starts("(*")) refuse("(* is not supported");
    groups_.push_back(out_.size());
    if (!starts("(?")) {
      copy(1);
      return;
    }
    for (const std::string_view head : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"}) {
      if (starts(head)) {
        copy(head.size());
        return;
      }
    }
    if (starts("(?<") && is_letter(peek(3))) {
      copy(3);
      return;
    }
    if (starts("(?#")) {
      const std::size_t end = in_.find(')', at_);
      if (end == std::string_view::npos) refuse("comment without an end");
      at_ = end + 1;
      groups_.pop_back();
      return;
    }
    options();
  }

  /// "(?i-m:" and, at the very start of the pattern, "(?i)".
  void options() {
    const bool at_start = at_ == 0;
    std::size_t end = at_ + 2;
    std::string text = "(?";
    for (; end < in_.size() && (in_[end] == 'i' || in_[end] == 'm' || in_[end] == '-'); ++end) {
      text += in_[end] == 'm' ? 's' : in_[end];
    }
    const char last = end < in_.size() ? in_[end] : '\0';
    if (last == ')' && !at_start) refuse("options in the middle of a pattern are not supported");
    if (last != ':' && last != ')') refuse("this kind of group is not supported");
    out_ += text + last;
    at_ = end + 1;
    if (last == ')') groups_.pop_back();
  }

  /// Outside of a class; `at_` is at the backslash.
  void escape() {
    const char c = peek(1);
    const auto set = [&](std::string_view inner, bool negated) {
      out_ += core::concat(negated ? "[^" : "[", inner, "]");
      at_ += 2;
    };
    switch (c) {
      case 's':
        return set(kSpace, false);
      case 'S':
        return set(kSpace, true);
      case 'w':
        return set(kWordOutside, false);
      case 'W':
        return set(kWordOutside, true);
      case 'h':
        return set(kHexDigit, false);
      case 'H':
        return set(kHexDigit, true);
      case 'b':
      case 'B': {
        const std::string word = core::concat("[", kWordOutside, "]");
        out_ +=
            c == 'b'
                ? core::concat("(?:(?<=", word, ")(?!", word, ")|(?<!", word, ")(?=", word, "))")
                : core::concat("(?:(?<=", word, ")(?=", word, ")|(?<!", word, ")(?!", word, "))");
        at_ += 2;
        return;
      }
      case 'A':
      case 'G':
      case 'K':
      case 'N':
      case 'R':
      case 'Z':
      case 'k':
      case 'g':
      case 'z':
        copy(2);
        return;
      case 'O':
        out_ += "(?s:.)";
        at_ += 2;
        return;
      default:
        if (is_digit(c) && c != '0') {
          copy(2);
          return;
        }
        common_escape();
    }
  }

  /// What means the same inside and outside of a class.
  void common_escape() {
    const char c = peek(1);
    switch (c) {
      case '\0':
        refuse("\\ at the end");
      case 'p':
      case 'P':
        property();
        return;
      case 'd':
      case 'D':
      case 'a':
      case 'e':
      case 'f':
      case 'n':
      case 'r':
      case 't':
      case '0':
        copy(2);
        return;
      case 'v':
        out_ += R"(\x{B})";
        at_ += 2;
        return;
      case 'x':
      case 'u':
        code_point();
        return;
      default:
        if (is_letter(c) || is_digit(c)) refuse(core::concat("\\", c, " is not supported"));
        copy(1 + decode_utf8(in_, at_ + 1).num_bytes);
    }
  }

  void code_point() {
    const bool braced = starts(R"(\x{)");
    std::string digits;
    std::size_t end = at_ + (braced ? 3 : 2);
    const std::size_t max_digits = braced ? 8 : (peek(1) == 'u' ? 4 : 2);
    while (end < in_.size() && digits.size() < max_digits &&
           std::isxdigit(static_cast<unsigned char>(in_[end])) != 0) {
      digits += in_[end++];
    }
    if (digits.empty() || (peek(1) == 'u' && digits.size() != 4)) {
      refuse("escape without enough hexadecimal digits");
    }
    if (braced) {
      if (end >= in_.size() || in_[end] != '}') refuse("\\x{ without }");
      ++end;
    }
    // A two-digit \x is a byte of the UTF-8 text in Oniguruma.
    if (max_digits == 2 && digits.size() == 2 && digits[0] >= '8')
      refuse("a byte that is not ASCII");
    out_ += core::concat("\\x{", digits, "}");
    at_ = end;
  }

  /// "\p{Lu}", "\p{^Lu}", "\P{Han}", "\pL".
  void property() {
    const std::size_t open = at_ + 2;
    if (peek(2) != '{') refuse("\\p without {");
    const std::size_t close = in_.find('}', open);
    if (close == std::string_view::npos) refuse("\\p{ without }");
    std::string_view name = in_.substr(open + 1, close - open - 1);
    bool negated = peek(1) == 'P';
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    for (const char c : name) {
      if (!is_letter(c) && !is_digit(c) && c != '_' && c != ' ') refuse("unknown property");
    }
    std::string_view script = "sc:";
    if (is_general_category(name) || name == "Any" || name == "Alphabetic" || name == "Uppercase" ||
        name == "Lowercase" || name == "White_Space") {
      script = "";
    }
    out_ += core::concat(negated ? "\\P{" : "\\p{", script, name, "}");
    at_ = close + 1;
  }

  void character_class() {
    copy(1);
    if (peek() == '^') copy(1);
    bool first = true;
    for (;; first = false) {
      if (at_ >= in_.size()) refuse("[ without ]");
      if (starts("&&")) refuse("class intersection (&&) is not supported");
      const char c = in_[at_];
      if (c == ']' && !first) {
        copy(1);
        return;
      }
      if (c == ']') {
        out_ += R"(\])";
        ++at_;
      } else if (c == '[') {
        posix_set();
      } else if (c == '\\') {
        class_escape();
      } else {
        copy(decode_utf8(in_, at_).num_bytes);
      }
    }
  }

  void posix_set() {
    for (const auto& [name, inner] : kPosixSets) {
      const std::string spelled = core::concat("[:", name, ":]");
      if (starts(spelled)) {
        out_ += inner;
        at_ += spelled.size();
        return;
      }
    }
    refuse("nested character class or POSIX bracket is not supported");
  }

  void class_escape() {
    const auto set = [&](std::string_view inner) {
      out_ += inner;
      at_ += 2;
    };
    switch (peek(1)) {
      case 's':
        return set(kSpace);
      case 'S':
        return set(kNotSpace);
      case 'w':
        return set(kWord);
      case 'h':
        return set(kHexDigit);
      case 'b':
        return set(R"(\x{8})");
      default:
        common_escape();
    }
  }

  std::string_view in_;
  std::string out_;
  std::size_t at_ = 0;
  std::size_t atom_ = 0;             // where in out_ the last atom starts
  std::vector<std::size_t> groups_;  // where in out_ the open groups start
};

}  // namespace

std::string translate_oniguruma(std::string_view pattern) {
  MSA_CHECK(is_valid_utf8(pattern), "regex: the pattern is not valid UTF-8");
  return Translator(pattern).run();
}

}  // namespace msa::model
