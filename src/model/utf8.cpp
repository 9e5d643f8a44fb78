// SPDX-License-Identifier: Apache-2.0
#include "model/utf8.hpp"

namespace msa::model {
namespace {

unsigned byte_at(std::string_view text, std::size_t at) {
  return static_cast<unsigned char>(text[at]);
}

/// What a leading byte promises: the number of further bytes and the range of the first of them
/// (Unicode standard, table 3-7); the later ones are 0x80..0xBF.
struct Lead {
  int num_more;  // -1: not a leading byte
  unsigned low;
  unsigned high;
};

Lead lead_of(unsigned byte) {
  if (byte < 0x80) return {0, 0, 0};
  if (byte < 0xC2) return {-1, 0, 0};
  if (byte < 0xE0) return {1, 0x80, 0xBF};
  if (byte == 0xE0) return {2, 0xA0, 0xBF};
  if (byte == 0xED) return {2, 0x80, 0x9F};
  if (byte < 0xF0) return {2, 0x80, 0xBF};
  if (byte == 0xF0) return {3, 0x90, 0xBF};
  if (byte < 0xF4) return {3, 0x80, 0xBF};
  if (byte == 0xF4) return {3, 0x80, 0x8F};
  return {-1, 0, 0};
}

}  // namespace

Utf8Step decode_utf8(std::string_view text, std::size_t at) {
  const unsigned first = byte_at(text, at);
  const Lead lead = lead_of(first);
  if (lead.num_more < 0) return {kReplacementCharacter, 1, Utf8Status::invalid};
  if (lead.num_more == 0) return {first, 1, Utf8Status::valid};
  char32_t code = first & (0x3Fu >> lead.num_more);
  for (int i = 0; i < lead.num_more; ++i) {
    const std::size_t num_bytes = static_cast<std::size_t>(i) + 1;
    if (at + num_bytes >= text.size()) {
      return {kReplacementCharacter, num_bytes, Utf8Status::truncated};
    }
    const unsigned byte = byte_at(text, at + num_bytes);
    const unsigned low = i == 0 ? lead.low : 0x80;
    const unsigned high = i == 0 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {kReplacementCharacter, num_bytes, Utf8Status::invalid};
    code = (code << 6) | (byte & 0x3F);
  }
  return {code, static_cast<std::size_t>(lead.num_more) + 1, Utf8Status::valid};
}

void append_utf8(std::string& text, char32_t code) {
  const auto tail = [&](int shift) { text += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    text += static_cast<char>(code);
  } else if (code < 0x800) {
    text += static_cast<char>(0xC0 | (code >> 6));
    tail(0);
  } else if (code < 0x10000) {
    text += static_cast<char>(0xE0 | (code >> 12));
    tail(6);
    tail(0);
  } else {
    text += static_cast<char>(0xF0 | (code >> 18));
    tail(12);
    tail(6);
    tail(0);
  }
}

bool is_valid_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = decode_utf8(text, at);
    if (step.status != Utf8Status::valid) return false;
    at += step.num_bytes;
  }
  return true;
}

std::string take_complete_utf8(std::string& pending) {
  std::string text;
  std::size_t at = 0;
  while (at < pending.size()) {
    const Utf8Step step = decode_utf8(pending, at);
    if (step.status == Utf8Status::truncated) break;
    append_utf8(text, step.code);
    at += step.num_bytes;
  }
  pending.erase(0, at);
  return text;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string pending(text);
  std::string result = take_complete_utf8(pending);
  if (!pending.empty()) append_utf8(result, kReplacementCharacter);
  return result;
}

bool is_white_space(char32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

}  // namespace msa::model
