// SPDX-License-Identifier: Apache-2.0
#include "model/added_tokens.hpp"

#include <algorithm>
#include <unordered_set>

#include "model/utf8.hpp"

namespace msa::model {
namespace {

bool is_word_character(std::string_view character) {
  static const Regex word = Regex::pcre2(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])");
  return !word.find_all(character).empty();
}

std::string_view first_character(std::string_view text) {
  return text.empty() ? text : text.substr(0, decode_utf8(text, 0).num_bytes);
}

std::string_view last_character(std::string_view text) {
  std::size_t at = text.size();
  while (at > 0) {
    --at;
    const bool continues = (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80;
    if (!continues) break;
  }
  return text.substr(at);
}

bool touches_word(std::string_view left, std::string_view right) {
  return (!left.empty() && is_word_character(last_character(left))) ||
         (!right.empty() && is_word_character(first_character(right)));
}

std::size_t num_space_bytes_at_end(std::string_view text) {
  std::size_t size = text.size();
  while (size > 0) {
    const std::string_view last = last_character(text.substr(0, size));
    if (!is_white_space(decode_utf8(last, 0).code)) break;
    size -= last.size();
  }
  return text.size() - size;
}

std::size_t num_space_bytes_at_start(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    const Utf8Step step = decode_utf8(text, at);
    if (!is_white_space(step.code)) break;
    at += step.num_bytes;
  }
  return at;
}

}  // namespace

void AddedTokens::Finder::add(const std::string& content, std::size_t token) {
  std::uint32_t node = 0;
  for (const char c : content) {
    const std::uint64_t key = (std::uint64_t{node} << 8) | static_cast<unsigned char>(c);
    const auto [edge, is_new] = edges_.try_emplace(key, static_cast<std::uint32_t>(tokens_.size()));
    if (is_new) tokens_.push_back(-1);
    node = edge->second;
  }
  tokens_[node] = static_cast<std::ptrdiff_t>(token);
}

std::ptrdiff_t AddedTokens::Finder::longest_at(std::string_view text, std::size_t at) const {
  std::ptrdiff_t longest = -1;
  std::uint32_t node = 0;
  for (; at < text.size(); ++at) {
    const auto edge =
        edges_.find((std::uint64_t{node} << 8) | static_cast<unsigned char>(text[at]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (tokens_[node] >= 0) longest = tokens_[node];
  }
  return longest;
}

AddedTokens AddedTokens::parse(const JsonNode& node) {
  AddedTokens result;
  if (node.is_null()) return result;
  std::unordered_set<std::string> contents;
  for (std::size_t i = 0; i < node.array_size(); ++i) {
    const JsonNode entry = node[i];
    AddedToken token;
    token.content = entry["content"].text();
    token.id = entry["id"].id();
    token.special = entry["special"].boolean(false);
    token.single_word = entry["single_word"].boolean(false);
    token.lstrip = entry["lstrip"].boolean(false);
    token.rstrip = entry["rstrip"].boolean(false);
    token.normalized = entry["normalized"].boolean(!token.special);
    if (token.content.empty()) continue;
    if (!contents.insert(token.content).second) {
      entry["content"].fail("\"" + token.content + "\" is given twice");
    }
    Finder& finder = token.normalized ? result.second_ : result.first_;
    finder.add(token.content, result.tokens_.size());
    result.tokens_.push_back(std::move(token));
  }
  return result;
}

void AddedTokens::split(std::string_view text,
                        const std::function<void(std::string_view)>& take_text,
                        const std::function<void(std::int32_t)>& take_token) const {
  pass(
      first_, text, [&](std::string_view rest) { pass(second_, rest, take_text, take_token); },
      take_token);
}

void AddedTokens::pass(const Finder& finder, std::string_view text,
                       const std::function<void(std::string_view)>& take_text,
                       const std::function<void(std::int32_t)>& take_token) const {
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const std::ptrdiff_t found = finder.longest_at(text, at);
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<std::size_t>(found)];
    std::size_t begin = at;
    std::size_t end = at + token.content.size();
    // The search goes on behind the content even where the match is turned down or widened.
    at = end;
    if (token.single_word && touches_word(text.substr(0, begin), text.substr(end))) continue;
    if (token.lstrip) {
      begin = std::max(begin - num_space_bytes_at_end(text.substr(0, begin)), done);
    }
    if (token.rstrip) end += num_space_bytes_at_start(text.substr(end));
    if (done < begin) take_text(text.substr(done, begin - done));
    take_token(token.id);
    done = end;
  }
  if (done < text.size()) take_text(text.substr(done));
}

}  // namespace msa::model
