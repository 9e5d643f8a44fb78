// SPDX-License-Identifier: Apache-2.0
#include "model/bpe.hpp"

#include <algorithm>
#include <functional>
#include <queue>
#include <tuple>
#include <unordered_set>

#include "model/utf8.hpp"

namespace msa::model {
namespace {

/// Bytes that stand for themselves: the printable ones of ASCII and Latin-1.
constexpr bool is_printable(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

/// The others get 256, 257, ... in order.
constexpr std::array<char32_t, 256> make_characters() {
  std::array<char32_t, 256> characters{};
  char32_t next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    characters[byte] = is_printable(byte) ? byte : next++;
  }
  return characters;
}
constexpr std::array<char32_t, 256> kCharacters = make_characters();
constexpr char32_t kEndOfCharacters = 256 + 68;  // 68 bytes are not printable

std::string spelling_of(unsigned char byte) {
  std::string text;
  append_utf8(text, character_of_byte(byte));
  return text;
}

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
         static_cast<std::uint32_t>(right);
}

}  // namespace

char32_t character_of_byte(unsigned char byte) { return kCharacters[byte]; }

std::optional<unsigned char> byte_of_character(char32_t character) {
  if (character >= kEndOfCharacters) return std::nullopt;
  static const std::array<int, kEndOfCharacters> bytes = [] {
    std::array<int, kEndOfCharacters> table{};
    table.fill(-1);
    for (unsigned byte = 0; byte < 256; ++byte) table[kCharacters[byte]] = static_cast<int>(byte);
    return table;
  }();
  const int byte = bytes[character];
  if (byte < 0) return std::nullopt;
  return static_cast<unsigned char>(byte);
}

Bpe Bpe::parse(const JsonNode& node) {
  const JsonNode type = node["type"];
  // Old files leave the type out.
  if (type.text("BPE") != "BPE") type.fail("unsupported model \"" + type.text() + "\"");
  Bpe bpe;
  bpe.parse_vocab(node["vocab"]);
  bpe.parse_merges(node["merges"]);
  bpe.parse_options(node);
  return bpe;
}

void Bpe::parse_vocab(const JsonNode& node) {
  std::unordered_set<std::int32_t> ids;
  vocab_.reserve(node.object().size());
  for (const auto& [token, value] : node.object().items()) {
    const JsonNode entry = node[token];
    const std::int32_t id = entry.id();
    if (!ids.insert(id).second) entry.fail(core::concat("id ", id, " is given twice"));
    vocab_.emplace(token, id);
  }
  for (unsigned byte = 0; byte < 256; ++byte) {
    const auto found = vocab_.find(spelling_of(static_cast<unsigned char>(byte)));
    byte_ids_[byte] = found == vocab_.end() ? -1 : found->second;
  }
}

void Bpe::parse_merges(const JsonNode& node) {
  const std::size_t count = node.array_size();
  if (count > INT32_MAX) node.fail(core::concat(count, " merges are too many"));
  merges_.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const nlohmann::json& entry = node.value()[i];
    std::string left;
    std::string right;
    if (entry.is_string()) {
      const std::string& text = entry.get_ref<const std::string&>();
      if (text.starts_with("#version")) continue;
      const std::size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
        node[i].fail("expected two tokens with one space between them");
      }
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2) {
      left = node[i][std::size_t{0}].text();
      right = node[i][std::size_t{1}].text();
    } else {
      node[i].fail("expected \"a b\" or [\"a\", \"b\"]");
    }
    const auto id_of = [&](const std::string& token) {
      const auto found = vocab_.find(token);
      if (found == vocab_.end()) node[i].fail("\"" + token + "\" is not in the vocabulary");
      return found->second;
    };
    const std::int32_t left_id = id_of(left);
    const std::int32_t right_id = id_of(right);
    const std::int32_t merged_id = id_of(left + right);
    // Of a merge that is listed twice the later place counts.
    merges_[pair_key(left_id, right_id)] = {static_cast<std::int32_t>(i), merged_id};
  }
}

void Bpe::parse_options(const JsonNode& node) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!node[key].text("").empty()) node[key].fail("is not supported");
  }
  const JsonNode dropout = node["dropout"];
  if (!dropout.is_null() && !(dropout.value().is_number() && dropout.value() == 0)) {
    dropout.fail("is not supported");
  }
  fuse_unknown_ = node["fuse_unk"].boolean(false);
  ignore_merges_ = node["ignore_merges"].boolean(false);
  const bool all_bytes =
      std::all_of(byte_ids_.begin(), byte_ids_.end(), [](std::int32_t id) { return id >= 0; });
  const bool byte_fallback = node["byte_fallback"].boolean(false);
  const JsonNode unknown = node["unk_token"];
  const std::string unknown_token = unknown.text("");
  // With a token for each of the 256 bytes nothing is ever unknown.
  if (all_bytes) return;
  if (byte_fallback) {
    node["byte_fallback"].fail("is not supported where the vocabulary lacks some of the 256 bytes");
  }
  if (unknown.is_null()) return;
  const auto found = vocab_.find(unknown_token);
  if (found == vocab_.end()) unknown.fail("\"" + unknown_token + "\" is not in the vocabulary");
  unknown_id_ = found->second;
}

const Bpe::Merge* Bpe::merge_of(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

std::vector<std::int32_t> Bpe::symbols_of(std::string_view piece) const {
  std::vector<std::int32_t> symbols;
  symbols.reserve(piece.size());
  bool previous_unknown = false;
  for (const char c : piece) {
    const std::int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id >= 0) {
      symbols.push_back(id);
    } else if (unknown_id_ >= 0 && !(previous_unknown && fuse_unknown_)) {
      symbols.push_back(unknown_id_);
    }
    previous_unknown = id < 0;
  }
  return symbols;
}

void Bpe::encode(std::string_view piece, std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    std::string spelled;
    for (const char c : piece) {
      append_utf8(spelled, character_of_byte(static_cast<unsigned char>(c)));
    }
    const auto found = vocab_.find(spelled);
    if (found != vocab_.end()) {
      ids.push_back(found->second);
      return;
    }
  }

  // A doubly linked list of symbols and a heap of possible merges; the lowest rank goes first, the
  // leftmost of equal ones. An entry is stale when one of its two symbols has changed since.
  constexpr std::int32_t kGone = -1;
  struct Link {
    std::int32_t id;
    std::ptrdiff_t previous;
    std::ptrdiff_t next;
  };
  struct Candidate {
    std::int32_t rank;
    std::ptrdiff_t at;
    std::int32_t left;
    std::int32_t right;
    std::int32_t merged;
    bool operator>(const Candidate& other) const {
      return std::tie(rank, at) > std::tie(other.rank, other.at);
    }
  };
  const std::vector<std::int32_t> symbols = symbols_of(piece);
  const auto count = static_cast<std::ptrdiff_t>(symbols.size());
  std::vector<Link> links;
  links.reserve(symbols.size());
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    links.push_back({symbols[static_cast<std::size_t>(i)], i - 1, i + 1});
  }
  const auto link = [&](std::ptrdiff_t i) -> Link& { return links[static_cast<std::size_t>(i)]; };
  std::vector<Candidate> storage;
  storage.reserve(symbols.size());
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap(std::greater<>{},
                                                                              std::move(storage));
  const auto consider = [&](std::ptrdiff_t left, std::ptrdiff_t right) {
    if (left < 0 || right >= count) return;
    const Merge* merge = merge_of(link(left).id, link(right).id);
    if (merge != nullptr) {
      heap.push({merge->rank, left, link(left).id, link(right).id, merge->id});
    }
  };
  for (std::ptrdiff_t i = 0; i + 1 < count; ++i) consider(i, i + 1);
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Link& left = link(best.at);
    if (left.id != best.left || left.next >= count || link(left.next).id != best.right) continue;
    link(left.next).id = kGone;
    left.id = best.merged;
    left.next = link(left.next).next;
    if (left.next < count) link(left.next).previous = best.at;
    consider(left.previous, best.at);
    consider(best.at, left.next);
  }
  for (std::ptrdiff_t i = 0; i < count; i = link(i).next) ids.push_back(link(i).id);
}

}  // namespace msa::model
