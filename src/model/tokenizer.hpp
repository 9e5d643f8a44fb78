// SPDX-License-Identifier: Apache-2.0
//
// Text to token ids and back, as a Hugging Face tokenizer.json describes it: byte-level BPE,
// checked for equal ids against the `tokenizers` package.
//
// Supported
//   model           BPE; merges as "a b" or ["a", "b"]; ignore_merges; unk_token, fuse_unk
//   pre_tokenizer   ByteLevel, alone or behind Split, Digits, Whitespace, WhitespaceSplit
//   normalizer      none (null or an empty Sequence)
//   post_processor  ByteLevel, TemplateProcessing ("single"), Sequence of them
//   decoder         ByteLevel
//   added_tokens    with all their flags
// Everything else is refused by an Error that names file and field. "truncation" and "padding" are
// ignored, as transformers does unless asked for them. Regexes: see regex.hpp. Chat templates are
// not part of tokenizer.json and not supported.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace msa::model {

/// Immutable; cheap to copy; all members are thread-safe.
class Tokenizer {
 public:
  /// Throws Error naming the file and the field.
  static Tokenizer load(const std::filesystem::path& file);
  /// The same from memory; `name` stands for the file in errors.
  static Tokenizer parse(std::string_view json, const std::string& name);

  /// Ids of `text`. What is not valid UTF-8 counts as U+FFFD, one for each maximal ill-formed part
  /// (Python's errors="replace"). Special tokens written out in the text become their ids;
  /// `add_special_tokens` adds those of the post-processor's template, for example a leading bos.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens = false) const;

  /// Always valid UTF-8: bytes that are not become U+FFFD. Ids without a token are passed over: a
  /// model's vocabulary is often padded beyond the tokenizer's.
  std::string decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const;

  /// 1 + the largest id: the rows that an embedding must have at least.
  std::int64_t vocab_size() const;
  /// By the spelling of the file: ordinary tokens with byte stand-ins ("Ġthe"), added ones as is.
  std::optional<std::int32_t> id_of(std::string_view token) const;
  bool is_special(std::int32_t id) const;
  /// The bytes that `id` stands for, not always whole characters; empty for ids without a token.
  std::string_view bytes_of(std::int32_t id) const;

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

/// Decodes ids as they come and hands out complete characters only. All results of push() and
/// finish(), one behind the other, are what Tokenizer::decode gives for the same ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = true)
      : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

  std::string push(std::int32_t id);
  /// U+FFFD where the last character is incomplete, else nothing. Starts over.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;  // at most 3 bytes
};

}  // namespace msa::model
