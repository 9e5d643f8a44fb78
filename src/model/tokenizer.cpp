// SPDX-License-Identifier: Apache-2.0
#include "model/tokenizer.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <unordered_map>
#include <utility>

#include "model/added_tokens.hpp"
#include "model/bpe.hpp"
#include "model/json_node.hpp"
#include "model/pre_tokenizer.hpp"
#include "model/utf8.hpp"

namespace msa::model {
namespace {

constexpr int kMaxDepth = 16;  // of Sequences within Sequences; real files have one

/// The template of a TemplateProcessing: ids before and behind those of the text.
struct Template {
  struct Part {
    bool is_text = false;
    std::vector<std::int32_t> ids;
  };
  std::vector<Part> parts;
};

Template parse_template(const JsonNode& node) {
  Template result;
  int num_texts = 0;
  const JsonNode single = node["single"];
  const JsonNode special_tokens = node["special_tokens"];
  for (std::size_t i = 0; i < single.array_size(); ++i) {
    const JsonNode sequence = single[i]["Sequence"];
    const JsonNode special = single[i]["SpecialToken"];
    Template::Part part;
    if (!sequence.is_null()) {
      if (sequence["id"].text() != "A") sequence["id"].fail("expected \"A\"");
      part.is_text = true;
      ++num_texts;
    } else if (!special.is_null()) {
      const JsonNode ids = special_tokens[special["id"].text()]["ids"];
      for (std::size_t j = 0; j < ids.array_size(); ++j) part.ids.push_back(ids[j].id());
    } else {
      single[i].fail("expected \"Sequence\" or \"SpecialToken\"");
    }
    result.parts.push_back(std::move(part));
  }
  if (num_texts != 1) single.fail("expected exactly one \"Sequence\"");
  return result;
}

void add_templates(const JsonNode& node, int depth, std::vector<Template>& templates) {
  if (node.is_null()) return;
  const std::string& type = node["type"].text();
  if (type == "Sequence") {
    if (depth == kMaxDepth) node.fail("too many Sequences within Sequences");
    const JsonNode list = node["processors"];
    for (std::size_t i = 0; i < list.array_size(); ++i) {
      add_templates(list[i], depth + 1, templates);
    }
  } else if (type == "TemplateProcessing") {
    templates.push_back(parse_template(node));
  } else if (type != "ByteLevel") {  // which changes offsets only
    node.fail("unsupported post-processor \"" + type + "\"");
  }
}

std::vector<std::int32_t> apply_template(const Template& form,
                                         const std::vector<std::int32_t>& ids) {
  std::vector<std::int32_t> result;
  for (const Template::Part& part : form.parts) {
    const std::vector<std::int32_t>& source = part.is_text ? ids : part.ids;
    result.insert(result.end(), source.begin(), source.end());
  }
  return result;
}

/// Calls visit(element) for what is not a Sequence, or for the elements of one.
template <class Visit>
void visit_sequence(const JsonNode& node, const char* list_name, Visit visit) {
  if (node.is_null()) return;
  if (node["type"].text() != "Sequence") return visit(node);
  const JsonNode list = node[list_name];
  for (std::size_t i = 0; i < list.array_size(); ++i) visit(list[i]);
}

void check_normalizer(const JsonNode& node) {
  visit_sequence(node, "normalizers", [](const JsonNode& element) {
    element.fail("unsupported normalizer \"" + element["type"].text() + "\"");
  });
}

void check_decoder(const JsonNode& node) {
  int count = 0;
  visit_sequence(node, "decoders", [&](const JsonNode& element) {
    const std::string& type = element["type"].text();
    if (type != "ByteLevel") element.fail("unsupported decoder \"" + type + "\"");
    ++count;
  });
  if (count == 0) node.fail("expected a ByteLevel decoder");
}

/// A token is either spelled in stand-ins for bytes throughout or stands for itself.
std::string bytes_of_token(const std::string& token) {
  std::string bytes;
  for (std::size_t at = 0; at < token.size();) {
    const Utf8Step step = decode_utf8(token, at);
    const std::optional<unsigned char> byte = byte_of_character(step.code);
    if (!byte) return token;
    bytes += static_cast<char>(*byte);
    at += step.num_bytes;
  }
  return bytes;
}

}  // namespace

struct Tokenizer::Impl {
  struct Token {
    std::string bytes;
    bool special = false;
  };

  AddedTokens added_tokens;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  std::vector<Template> templates;
  std::unordered_map<std::string, std::int32_t> added_ids;
  std::unordered_map<std::int32_t, Token> tokens;
  std::int64_t vocab_size = 0;

  Impl(const JsonNode& root)
      : added_tokens(AddedTokens::parse(root["added_tokens"])),
        pre_tokenizer(PreTokenizer::parse(root["pre_tokenizer"])),
        bpe(Bpe::parse(root["model"])) {
    check_normalizer(root["normalizer"]);
    check_decoder(root["decoder"]);
    add_templates(root["post_processor"], 0, templates);
    tokens.reserve(bpe.vocab().size() + added_tokens.tokens().size());
    for (const auto& [token, id] : bpe.vocab()) tokens[id].bytes = bytes_of_token(token);
    add_added_tokens(root);
    for (const auto& [id, token] : tokens) {
      vocab_size = std::max<std::int64_t>(vocab_size, std::int64_t{id} + 1);
    }
    for (const Template& form : templates) check_template(root, form);
  }

  void add_added_tokens(const JsonNode& root) {
    for (const AddedToken& token : added_tokens.tokens()) {
      const auto known = bpe.vocab().find(token.content);
      const bool in_vocab = known != bpe.vocab().end();
      // An id is free, or belongs to the same text in the model's vocabulary.
      if (in_vocab ? known->second != token.id : tokens.contains(token.id)) {
        root["added_tokens"].fail(core::concat("\"", token.content, "\" has id ", token.id,
                                               ", which contradicts the vocabulary"));
      }
      added_ids.emplace(token.content, token.id);
      tokens[token.id] = {bytes_of_token(token.content), token.special};
    }
  }

  void check_template(const JsonNode& root, const Template& form) const {
    for (const Template::Part& part : form.parts) {
      for (const std::int32_t id : part.ids) {
        if (!tokens.contains(id)) {
          root["post_processor"].fail(core::concat("id ", id, " has no token"));
        }
      }
    }
  }
};

Tokenizer Tokenizer::load(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  MSA_CHECK(stream && !std::filesystem::is_directory(file), file.string(),
            ": cannot open the tokenizer file");
  const std::string text{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  MSA_CHECK(!stream.bad(), file.string(), ": cannot read the tokenizer file");
  return parse(text, file.string());
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& name) {
  nlohmann::json root;
  try {
    root = nlohmann::json::parse(json);
  } catch (const nlohmann::json::exception& error) {
    throw Error(ErrorCode::invalid_argument,
                core::concat(name, ": not valid JSON: ", error.what()));
  }
  return Tokenizer(std::make_shared<const Impl>(JsonNode(name, root)));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = replace_invalid_utf8(text);
    text = repaired;
  }
  std::vector<std::int32_t> ids;
  // Words come again and again: about nine of ten pieces of a long text are found here.
  std::unordered_map<std::string, std::vector<std::int32_t>> cache;
  constexpr std::size_t kLongestCached = 64;
  const auto take_piece = [&](std::string_view piece) {
    if (piece.size() > kLongestCached) {
      impl_->bpe.encode(piece, ids);
      return;
    }
    const auto [entry, is_new] = cache.try_emplace(std::string(piece));
    if (is_new) impl_->bpe.encode(piece, entry->second);
    ids.insert(ids.end(), entry->second.begin(), entry->second.end());
  };
  impl_->added_tokens.split(
      text, [&](std::string_view rest) { impl_->pre_tokenizer.split(rest, take_piece); },
      [&](std::int32_t id) { ids.push_back(id); });
  if (add_special_tokens) {
    for (const Template& form : impl_->templates) ids = apply_template(form, ids);
  }
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const std::int32_t id : ids) {
    if (!(skip_special_tokens && is_special(id))) bytes += bytes_of(id);
  }
  return replace_invalid_utf8(bytes);
}

std::int64_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  const std::string key(token);
  for (const auto* table : {&impl_->added_ids, &impl_->bpe.vocab()}) {
    const auto found = table->find(key);
    if (found != table->end()) return found->second;
  }
  return std::nullopt;
}

bool Tokenizer::is_special(std::int32_t id) const {
  const auto found = impl_->tokens.find(id);
  return found != impl_->tokens.end() && found->second.special;
}

std::string_view Tokenizer::bytes_of(std::int32_t id) const {
  const auto found = impl_->tokens.find(id);
  return found == impl_->tokens.end() ? std::string_view() : found->second.bytes;
}

std::string StreamDecoder::push(std::int32_t id) {
  if (skip_special_tokens_ && tokenizer_.is_special(id)) return "";
  pending_ += tokenizer_.bytes_of(id);
  return take_complete_utf8(pending_);
}

std::string StreamDecoder::finish() {
  const std::string rest = replace_invalid_utf8(pending_);
  pending_.clear();
  return rest;
}

}  // namespace msa::model
