// SPDX-License-Identifier: Apache-2.0
//
// What the tokenizer refuses, and that it does so by an Error that names file and field, whatever
// the file holds.
#include <gtest/gtest.h>

#include <cstddef>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "model/regex.hpp"
#include "model/tokenizer.hpp"
#include "msa/error.hpp"

namespace msa::model {
namespace {

using nlohmann::json;

/// A tokenizer.json with every supported part and a vocabulary of a few tokens.
const json& small_file() {
  static const json file = json::parse(R"({
    "version": "1.0", "truncation": null, "padding": null,
    "added_tokens": [
      {"id": 6, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": true,
       "normalized": false, "special": true},
      {"id": 7, "content": "<x>", "single_word": true, "lstrip": true, "rstrip": false,
       "normalized": true, "special": false}],
    "normalizer": {"type": "Sequence", "normalizers": []},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "\\p{L}+|[^\\s]"}, "behavior": "Isolated",
       "invert": false},
      {"type": "Split", "pattern": {"String": "-"}, "behavior": "MergedWithNext", "invert": true},
      {"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}]},
    "post_processor": {"type": "Sequence", "processors": [
      {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
      {"type": "TemplateProcessing",
       "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                  {"Sequence": {"id": "A", "type_id": 0}}],
       "pair": [],
       "special_tokens": {"<s>": {"id": "<s>", "ids": [6], "tokens": ["<s>"]}}}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null,
              "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false,
              "ignore_merges": true,
              "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4, "1": 5},
              "merges": [["a", "b"], "Ġ ab"]}
  })");
  return file;
}

Tokenizer parse(const json& file) { return Tokenizer::parse(file.dump(), "tokenizer.json"); }

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(TokenizerErrors, TheSmallFileIsSound) {
  const Tokenizer tokenizer = parse(small_file());
  EXPECT_EQ(tokenizer.encode("<s> ab <x> 1", true),
            (std::vector<std::int32_t>{6, 6, 4, 7, 3, 3, 5}));
}

struct Case {
  const char* pointer;  // where in the file
  const char* value;    // new JSON; null: the member is removed
  const char* message;
};

TEST(TokenizerErrors, NameFileAndField) {
  const std::vector<Case> cases = {
      {"/model", nullptr, "model: expected an object, got null or nothing"},
      {"/model", "[]", "model: expected an object, got array"},
      {"/model/type", "\"Unigram\"", "model.type: unsupported model \"Unigram\""},
      {"/model/vocab", nullptr, "model.vocab: expected an object, got null or nothing"},
      {"/model/vocab/a", "-1", "model.vocab.a: expected a token id, got -1"},
      {"/model/vocab/a", "1.5", "model.vocab.a: expected a token id, got 1.5"},
      {"/model/vocab/a", "2147483648", "model.vocab.a: expected a token id, got 2147483648"},
      {"/model/vocab/b", "0", "model.vocab.b: id 0 is given twice"},
      {"/model/merges", "7", "model.merges: expected an array, got 7"},
      {"/model/merges/1", "\"a\"",
       "model.merges[1]: expected two tokens with one space between them"},
      {"/model/merges/1", "[\"a\"]", "model.merges[1]: expected \"a b\" or [\"a\", \"b\"]"},
      {"/model/merges/1", "[\"a\", 3]", "model.merges[1][1]: expected a string, got 3"},
      {"/model/merges/1", "\"a c\"", "model.merges[1]: \"c\" is not in the vocabulary"},
      {"/model/merges/1", "\"b a\"", "model.merges[1]: \"ba\" is not in the vocabulary"},
      {"/model/unk_token", "\"?\"", "model.unk_token: \"?\" is not in the vocabulary"},
      {"/model/dropout", "0.1", "model.dropout: is not supported"},
      {"/model/end_of_word_suffix", "\"</w>\"", "model.end_of_word_suffix: is not supported"},
      {"/model/continuing_subword_prefix", "\"##\"",
       "model.continuing_subword_prefix: is not supported"},
      {"/model/byte_fallback", "true",
       "model.byte_fallback: is not supported where the vocabulary lacks some of the 256 bytes"},
      {"/model/ignore_merges", "1", "model.ignore_merges: expected a boolean, got 1"},
      {"/normalizer", R"({"type": "NFC"})", "normalizer: unsupported normalizer \"NFC\""},
      {"/normalizer/normalizers", R"([{"type": "Lowercase"}])",
       "normalizer.normalizers[0]: unsupported normalizer \"Lowercase\""},
      {"/pre_tokenizer", nullptr, "pre_tokenizer: null is not supported, expected ByteLevel"},
      {"/pre_tokenizer/pretokenizers/0/type", "\"Metaspace\"",
       "pre_tokenizer.pretokenizers[0]: unsupported pre-tokenizer \"Metaspace\""},
      {"/pre_tokenizer/pretokenizers/3", R"({"type": "Digits"})",
       "pre_tokenizer: expected ByteLevel as the last pre-tokenizer"},
      {"/pre_tokenizer/pretokenizers/2", R"({"type": "ByteLevel"})",
       "pre_tokenizer.pretokenizers[3]: \"ByteLevel\" behind ByteLevel is not supported"},
      {"/pre_tokenizer/pretokenizers/0/behavior", "\"Sideways\"",
       "pre_tokenizer.pretokenizers[0].behavior: unknown behavior \"Sideways\""},
      {"/pre_tokenizer/pretokenizers/0/pattern", "{}",
       "pre_tokenizer.pretokenizers[0].pattern: expected an object with \"Regex\" or \"String\""},
      {"/pre_tokenizer/pretokenizers/0/pattern/Regex", "\"a&b)\"",
       "pre_tokenizer.pretokenizers[0].pattern: regex \"a&b)\": unmatched ) at offset 3"},
      {"/post_processor/processors/0/type", "\"BertProcessing\"",
       "post_processor.processors[0]: unsupported post-processor \"BertProcessing\""},
      {"/post_processor/processors/1/single/1", "{}",
       "post_processor.processors[1].single[1]: expected \"Sequence\" or \"SpecialToken\""},
      {"/post_processor/processors/1/single/1/Sequence/id", "\"B\"",
       "post_processor.processors[1].single[1].Sequence.id: expected \"A\""},
      {"/post_processor/processors/1/special_tokens/<s>/ids/0", "99",
       "post_processor: id 99 has no token"},
      {"/decoder", nullptr, "decoder: expected a ByteLevel decoder"},
      {"/decoder/type", "\"WordPiece\"", "decoder: unsupported decoder \"WordPiece\""},
      {"/added_tokens/0/id", "0",
       "added_tokens: \"<s>\" has id 0, which contradicts the vocabulary"},
      {"/added_tokens/1/content", "\"a\"",
       "added_tokens: \"a\" has id 7, which contradicts the vocabulary"},
      {"/added_tokens/1/content", "\"<s>\"", "added_tokens[1].content: \"<s>\" is given twice"},
      {"/added_tokens/1", "7", "added_tokens[1]: expected an object, got 7"},
  };
  for (const Case& test : cases) {
    json file = small_file();
    const json::json_pointer pointer(test.pointer);
    if (test.value != nullptr) {
      file[pointer] = json::parse(test.value);
    } else {
      file[pointer.parent_pointer()].erase(pointer.back());
    }
    EXPECT_EQ(message_of([&] { parse(file); }), std::string("tokenizer.json: ") + test.message)
        << test.pointer;
  }
}

TEST(TokenizerErrors, NameWhatIsNotJson) {
  for (const char* text : {"", "{", "{\"a\": \"\xFF\"}", "nul", "[1,]", "{\"a\": \"\\ud800\"}"}) {
    const std::string message = message_of([&] { Tokenizer::parse(text, "tokenizer.json"); });
    EXPECT_TRUE(message.starts_with("tokenizer.json: not valid JSON: ")) << message;
  }
  EXPECT_EQ(message_of([] { Tokenizer::parse("[]", "tokenizer.json"); }),
            "tokenizer.json: top level: expected an object, got array");
}

TEST(TokenizerErrors, EndDeepNesting) {
  json stage = {{"type", "Split"}};
  for (int i = 0; i < 1000; ++i) stage = {{"type", "Sequence"}, {"pretokenizers", {stage}}};
  json file = small_file();
  file["pre_tokenizer"] = stage;
  EXPECT_NE(message_of([&] { parse(file); }).find("too many Sequences"), std::string::npos);
  const std::string brackets(1 << 20, '[');
  EXPECT_NE(message_of([&] { Tokenizer::parse(brackets, "x"); }).find("not valid JSON"),
            std::string::npos);
}

TEST(RegexErrors, NameWhatCannotBeTranslated) {
  for (const char* pattern :
       {"[a&&b]",  "[a[bc]]", "[[:alpha:]]", "[^\\W]",  "a(?i)b",   "(?s:.)",
        "(?x: a)", "(?~ab)",  "(?P<n>a)",    "(*FAIL)", "\\",       "(",
        ")",       "[",       "[]",          "a**",     "*",        "\\p{Nonsense}",
        "\\p{L",   "\\pL",    "\\X",         "\\y",     "\\Qa\\E",  "\\C",
        "\\M-a",   "\\xE4",   "\\x{110000}", "\\x{",    "(?<=a*)b", "(?#",
        "\\u12",   "\\1",     "(?<a",        "x{3,1}",  "a{70000}"}) {
    const std::string message = message_of([&] { Regex::oniguruma(pattern); });
    EXPECT_TRUE(message.starts_with("regex \"")) << pattern << ": " << message;
  }
}

TEST(RegexErrors, EndRunawaySearches) {
  const Regex regex = Regex::oniguruma("(?:a|aa)+$");
  const std::string text = std::string(200, 'a') + "b";
  EXPECT_NE(message_of([&] { (void)regex.find_all(text); }).find("limit"), std::string::npos);
}

/// All nodes of a JSON value, by pointer.
void collect(const json& node, const json::json_pointer& at, std::vector<json::json_pointer>& all) {
  all.push_back(at);
  if (node.is_object()) {
    for (const auto& [key, value] : node.items()) collect(value, at / key, all);
  } else if (node.is_array()) {
    for (std::size_t i = 0; i < node.size(); ++i) collect(node[i], at / i, all);
  }
}

/// Either works or throws Error; other exceptions and crashes fail the test.
void try_everything(const std::string& text) {
  try {
    const Tokenizer tokenizer = Tokenizer::parse(text, "fuzz");
    for (const char* input : {"", "ab 1-2 <s> <x> \xFF é\n", "aaaa----    1111"}) {
      const auto ids = tokenizer.encode(input, true);
      (void)tokenizer.decode(ids, false);
    }
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()), "");
  }
}

TEST(TokenizerErrors, BrokenFilesThrowNothingElse) {
  std::mt19937 generator(1);
  const auto below = [&](std::size_t count) {
    return std::uniform_int_distribution<std::size_t>(0, count - 1)(generator);
  };
  const std::string text = small_file().dump();
  for (int i = 0; i < 3000; ++i) {
    std::string changed = text;
    for (std::size_t n = below(3); n < 3; ++n) {
      const std::size_t at = below(changed.size());
      switch (below(3)) {
        case 0:
          changed[at] = static_cast<char>(below(256));
          break;
        case 1:
          changed.erase(at, below(20));
          break;
        default:
          changed.insert(at, changed.substr(below(changed.size()), below(20)));
      }
    }
    try_everything(changed);
  }

  const std::vector<json> values = {nullptr,
                                    true,
                                    -1,
                                    0,
                                    7,
                                    1e300,
                                    "",
                                    "a",
                                    "ByteLevel",
                                    "Sequence",
                                    "\\",
                                    "(a*)*\\1",
                                    json::array(),
                                    json::object(),
                                    std::string(100, '('),
                                    "\u0000",
                                    UINT64_MAX};
  std::vector<json::json_pointer> nodes;
  collect(small_file(), json::json_pointer(), nodes);
  for (const json::json_pointer& node : nodes) {
    for (const json& value : values) {
      json changed = small_file();
      changed[node] = value;
      try_everything(changed.dump());
      if (node.empty()) continue;
      json& parent = changed[node.parent_pointer()];
      if (parent.is_object()) parent.erase(node.back());
      try_everything(changed.dump());
    }
    for (std::size_t i = 0; i < 20; ++i) {
      json changed = small_file();
      changed[node] = small_file()[nodes[below(nodes.size())]];
      try_everything(changed.dump());
    }
  }
}

}  // namespace
}  // namespace msa::model
