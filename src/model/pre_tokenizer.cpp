// SPDX-License-Identifier: Apache-2.0
#include "model/pre_tokenizer.hpp"

#include <algorithm>
#include <string>

namespace msa::model {
namespace {

constexpr int kMaxDepth = 16;  // of Sequences within Sequences; real files have one

// The pattern built into ByteLevel, that of GPT-2.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Written for PCRE2: the sets of Rust's char and regex crates, not Oniguruma's.
constexpr std::string_view kWhiteSpace = R"(\p{White_Space})";
constexpr std::string_view kWords =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}]+)"
    R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}\p{White_Space}]+)";

SplitBehavior parse_behavior(const JsonNode& node) {
  const std::string& name = node.text();
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  node.fail("unknown behavior \"" + name + "\"");
}

Regex parse_pattern(const JsonNode& node) {
  try {
    const JsonNode regex = node["Regex"];
    const JsonNode literal = node["String"];
    if (!regex.is_null()) return Regex::oniguruma(regex.text());
    if (!literal.is_null()) return Regex::literal(literal.text());
  } catch (const Error& error) {
    if (std::string_view(error.what()).starts_with("regex")) node.fail(error.what());
    throw;
  }
  node.fail("expected an object with \"Regex\" or \"String\"");
}

struct Part {
  Span span;
  bool matched;
};

/// `text` as matches and what lies between them, in order and without gaps.
std::vector<Part> parts_of(const Regex& pattern, bool invert, std::string_view text) {
  std::vector<Part> parts;
  std::size_t done = 0;
  for (const Span& match : pattern.find_all(text)) {
    if (done != match.begin) parts.push_back({{done, match.begin}, invert});
    parts.push_back({match, !invert});
    done = match.end;
  }
  if (done != text.size()) parts.push_back({{done, text.size()}, invert});
  return parts;
}

/// Each match joins what comes just before it in the order of `parts`, unless that is a match too.
std::vector<Span> merge_with_neighbor(const std::vector<Part>& parts) {
  std::vector<Span> pieces;
  bool previous_matched = false;
  for (const Part& part : parts) {
    if (part.matched && !previous_matched && !pieces.empty()) {
      pieces.back().begin = std::min(pieces.back().begin, part.span.begin);
      pieces.back().end = std::max(pieces.back().end, part.span.end);
    } else {
      pieces.push_back(part.span);
    }
    previous_matched = part.matched;
  }
  return pieces;
}

std::vector<Span> pieces_of(std::vector<Part> parts, SplitBehavior behavior) {
  std::vector<Span> pieces;
  switch (behavior) {
    case SplitBehavior::removed:
      for (const Part& part : parts) {
        if (!part.matched) pieces.push_back(part.span);
      }
      break;
    case SplitBehavior::isolated:
      for (const Part& part : parts) pieces.push_back(part.span);
      break;
    case SplitBehavior::merged_with_previous:
      pieces = merge_with_neighbor(parts);
      break;
    case SplitBehavior::merged_with_next:
      std::reverse(parts.begin(), parts.end());
      pieces = merge_with_neighbor(parts);
      std::reverse(pieces.begin(), pieces.end());
      break;
    case SplitBehavior::contiguous: {
      bool previous_matched = false;
      for (const Part& part : parts) {
        if (part.matched == previous_matched && !pieces.empty()) {
          pieces.back().end = part.span.end;
        } else {
          pieces.push_back(part.span);
        }
        previous_matched = part.matched;
      }
      break;
    }
  }
  return pieces;
}

}  // namespace

PreTokenizer PreTokenizer::parse(const JsonNode& node) {
  PreTokenizer result;
  if (node.is_null()) node.fail("null is not supported, expected ByteLevel");
  result.add_stages(node, 0);
  if (!result.is_byte_level_) node.fail("expected ByteLevel as the last pre-tokenizer");
  return result;
}

void PreTokenizer::add_stages(const JsonNode& node, int depth) {
  const std::string& type = node["type"].text();
  if (is_byte_level_) node.fail("\"" + type + "\" behind ByteLevel is not supported");
  const auto add = [&](Regex pattern, SplitBehavior behavior, bool invert) {
    stages_.push_back({std::move(pattern), behavior, invert, false});
  };
  if (type == "Sequence") {
    if (depth == kMaxDepth) node.fail("too many Sequences within Sequences");
    const JsonNode list = node["pretokenizers"];
    for (std::size_t i = 0; i < list.array_size(); ++i) add_stages(list[i], depth + 1);
  } else if (type == "ByteLevel") {
    add_byte_level(node);
  } else if (type == "Split") {
    add(parse_pattern(node["pattern"]), parse_behavior(node["behavior"]),
        node["invert"].boolean(false));
  } else if (type == "Digits") {
    add(Regex::pcre2(R"(\p{N})"),
        node["individual_digits"].boolean(false) ? SplitBehavior::isolated
                                                 : SplitBehavior::contiguous,
        false);
  } else if (type == "WhitespaceSplit") {
    add(Regex::pcre2(kWhiteSpace), SplitBehavior::removed, false);
  } else if (type == "Whitespace") {
    add(Regex::pcre2(kWords), SplitBehavior::removed, true);
  } else {
    node.fail("unsupported pre-tokenizer \"" + type + "\"");
  }
}

void PreTokenizer::add_byte_level(const JsonNode& node) {
  is_byte_level_ = true;
  const bool use_regex = node["use_regex"].boolean(true);
  const bool add_prefix_space = node["add_prefix_space"].boolean(true);
  // Without the pattern: one that matches all there is.
  if (use_regex || add_prefix_space) {
    stages_.push_back({use_regex ? Regex::oniguruma(kGpt2Pattern) : Regex::pcre2("(?s)\\A.*\\z"),
                       SplitBehavior::isolated, false, add_prefix_space});
  }
}

void PreTokenizer::split(std::string_view text,
                         const std::function<void(std::string_view)>& take) const {
  run(0, text, take);
}

void PreTokenizer::run(std::size_t stage, std::string_view text,
                       const std::function<void(std::string_view)>& take) const {
  if (text.empty()) return;
  if (stage == stages_.size()) {
    take(text);
    return;
  }
  const Stage& split = stages_[stage];
  std::string prefixed;
  if (split.add_prefix_space && !text.starts_with(' ')) {
    prefixed = ' ' + std::string(text);
    text = prefixed;
  }
  for (const Span& piece : pieces_of(parts_of(split.pattern, split.invert, text), split.behavior)) {
    run(stage + 1, text.substr(piece.begin, piece.end - piece.begin), take);
  }
}

}  // namespace msa::model
