// SPDX-License-Identifier: Apache-2.0
//
// Exact ids against the `tokenizers` package: see make_tokenizer_fixtures.py for what the fixtures
// hold.
#include "model/tokenizer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/regex.hpp"
#include "model/utf8.hpp"
#include "msa/error.hpp"

namespace msa::model {
namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

std::filesystem::path fixture_path(const std::string& name) {
  return std::filesystem::path(MSA_SOURCE_DIR) / "tests/model/fixtures/tokenizer" / name;
}

const json& fixture(const std::string& name) {
  static std::map<std::string, json> files;
  const auto found = files.find(name);
  if (found != files.end()) return found->second;
  std::ifstream stream(fixture_path(name), std::ios::binary);
  return files[name] = json::parse(stream);
}

std::vector<std::string> strings(const std::string& field) {
  return fixture("texts.json").at(field).get<std::vector<std::string>>();
}

/// base.json with other members at the top level and in "model".
json changed_file(const std::string& file, const json& changes) {
  json result = fixture(file + ".json");
  for (const auto& [key, value] : changes.items()) {
    if (key == "model") {
      result[key].update(value);
    } else {
      result[key] = value;
    }
  }
  return result;
}

Tokenizer parse(const json& file) { return Tokenizer::parse(file.dump(), "test.json"); }

Tokenizer variant(const std::string& name) {
  for (const json& row : fixture("variants.json")) {
    if (row.at("name") == name) return parse(changed_file(row.at("file"), row.at("changes")));
  }
  throw std::logic_error("no variant " + name);
}

/// As in make_tokenizer_fixtures.py.
class Hash {
 public:
  void add(std::uint32_t word) {
    value_ = (value_ ^ word) * 0x01000193u;
    value_ ^= value_ >> 15;
  }
  void add(const Ids& ids) {
    for (const std::int32_t id : ids) add(static_cast<std::uint32_t>(id));
  }
  std::string text() const {
    std::ostringstream stream;
    stream << std::hex << std::setw(8) << std::setfill('0') << value_;
    return stream.str();
  }

 private:
  std::uint32_t value_ = 0x811C9DC5u;
};

std::string hash_of(const Ids& ids) {
  Hash hash;
  hash.add(ids);
  return hash.text();
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), std::istream_iterator<std::string>()};
}

std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

class Variants : public testing::TestWithParam<std::size_t> {
 protected:
  const json& row() const { return fixture("variants.json").at(GetParam()); }
};

TEST_P(Variants, GivesTheSameIds) {
  const Tokenizer tokenizer = parse(changed_file(row().at("file"), row().at("changes")));

  const std::string text = fixture("texts.json").at("text");
  const Ids ids = tokenizer.encode(text);
  const json& expected = row().at("text");
  if (expected.is_string()) {
    EXPECT_EQ(hash_of(ids), expected.get<std::string>());
  } else {
    EXPECT_EQ(ids, expected.get<Ids>());
  }
  EXPECT_EQ(tokenizer.decode(ids, false) == text, row().at("decoded").get<bool>());
  EXPECT_EQ(tokenizer.encode("a b", true), row().at("special").get<Ids>());

  const std::vector<std::string> lines = strings("lines");
  const std::vector<std::string> expected_lines = words(row().at("lines"));
  ASSERT_EQ(lines.size(), expected_lines.size());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    EXPECT_EQ(hash_of(tokenizer.encode(lines[i])), expected_lines[i]) << lines[i];
  }

  const std::vector<std::string> random = strings("strings");
  const std::vector<std::string> expected_random = words(row().at("strings"));
  const std::size_t per_hash = row().at("strings_per_hash");
  ASSERT_EQ(expected_random.size(), (random.size() + per_hash - 1) / per_hash);
  for (std::size_t i = 0; i < expected_random.size(); ++i) {
    Hash hash;
    std::string group;
    for (std::size_t j = i * per_hash; j < std::min(random.size(), (i + 1) * per_hash); ++j) {
      hash.add(tokenizer.encode(random[j]));
      hash.add(0xFFFFFFFFu);
      group += json(random[j]).dump(-1, ' ', true) + "\n";
    }
    EXPECT_EQ(hash.text(), expected_random[i]) << group;
  }
}

std::string variant_name(const testing::TestParamInfo<std::size_t>& test) {
  return fixture("variants.json").at(test.param).at("name");
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Variants,
                         testing::Range(std::size_t{0}, fixture("variants.json").size()),
                         variant_name);

TEST(TokenizerDecode, RandomIdsGiveTheSameText) {
  const Tokenizer tokenizer = variant(fixture("decode.json").at("variant"));
  for (const json& row : fixture("decode.json").at("cases")) {
    const Ids ids = row.at(0).get<Ids>();
    EXPECT_EQ(tokenizer.decode(ids, false), row.at(1).get<std::string>()) << row;
    EXPECT_EQ(tokenizer.decode(ids, true), row.at(2).get<std::string>()) << row;
  }
}

TEST(TokenizerDecode, StreamGivesTheSameTextInCompleteCharacters) {
  const Tokenizer tokenizer = variant(fixture("decode.json").at("variant"));
  for (const bool skip : {false, true}) {
    StreamDecoder stream(tokenizer, skip);
    for (const json& row : fixture("decode.json").at("cases")) {
      const Ids ids = row.at(0).get<Ids>();
      std::string text;
      for (const std::int32_t id : ids) {
        const std::string piece = stream.push(id);
        EXPECT_TRUE(is_valid_utf8(piece));
        text += piece;
      }
      text += stream.finish();
      EXPECT_EQ(text, tokenizer.decode(ids, skip)) << row;
    }
  }
}

TEST(TokenizerDecode, StreamHoldsBackIncompleteCharacters) {
  const Tokenizer tokenizer = variant("qwen");
  const auto id_of_byte = [&](const char* spelled) { return tokenizer.id_of(spelled).value(); };
  StreamDecoder stream(tokenizer);  // U+20AC is E2 82 AC
  EXPECT_EQ(stream.push(id_of_byte("â")), "");
  EXPECT_EQ(stream.push(id_of_byte("Ĥ")), "");
  EXPECT_EQ(stream.push(id_of_byte("¬")), "€");
  EXPECT_EQ(stream.push(id_of_byte("â")), "");
  EXPECT_EQ(stream.push(id_of_byte("a")), "\uFFFDa");
  EXPECT_EQ(stream.push(id_of_byte("â")), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
  EXPECT_EQ(stream.finish(), "");
}

TEST(TokenizerDecode, IdsWithoutTokenGiveNothing) {
  const Tokenizer tokenizer = variant("minimax");
  const auto size = static_cast<std::int32_t>(tokenizer.vocab_size());
  EXPECT_EQ(tokenizer.decode(Ids{-1, size, INT32_MAX, INT32_MIN}, false), "");
  EXPECT_EQ(tokenizer.bytes_of(size), "");
  EXPECT_FALSE(tokenizer.is_special(size));
}

TEST(Tokenizer, KnowsItsVocabulary) {
  const Tokenizer tokenizer = variant("minimax");
  const auto base = static_cast<std::int64_t>(fixture("base.json").at("model").at("vocab").size());
  EXPECT_EQ(tokenizer.vocab_size(), base + 7);
  EXPECT_EQ(tokenizer.id_of("]~!b["), base);
  EXPECT_EQ(tokenizer.id_of("no such token"), std::nullopt);
  EXPECT_TRUE(tokenizer.is_special(static_cast<std::int32_t>(base)));
  EXPECT_FALSE(tokenizer.is_special(static_cast<std::int32_t>(base) + 6));
  EXPECT_EQ(tokenizer.bytes_of(tokenizer.id_of("Ġ").value()), " ");
}

TEST(Tokenizer, InvalidUtf8CountsAsReplacementCharacters) {
  const Tokenizer tokenizer = variant("minimax");
  // Python 3: each of these bytes.decode(errors="replace").
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"a\xFFz", "a\uFFFDz"},
      {"\xE2\x82", "\uFFFD"},
      {"\xE2\x28\xA1", "\uFFFD(\uFFFD"},
      {"\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xF0\x9F\x92z", "\uFFFDz"},
      {"\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
      {"\xC0\xAF\x80", "\uFFFD\uFFFD\uFFFD"},
      {"\xF0\x80\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD"},
  };
  for (const auto& [bytes, replaced] : cases) {
    EXPECT_EQ(replace_invalid_utf8(bytes), replaced);
    EXPECT_EQ(tokenizer.encode(bytes), tokenizer.encode(replaced));
  }
}

TEST(Tokenizer, EmptyTextGivesOnlyTheTemplate) {
  for (const json& row : fixture("variants.json")) {
    const Tokenizer tokenizer = variant(row.at("name"));
    EXPECT_EQ(tokenizer.encode(""), Ids{});
  }
  EXPECT_EQ(variant("cl100k").encode("", true).size(), 2u);
}

TEST(Tokenizer, LoadsAFileAndNamesAMissingOne) {
  EXPECT_EQ(Tokenizer::load(fixture_path("gaps.json")).vocab_size(),
            static_cast<std::int64_t>(fixture("gaps.json").at("model").at("vocab").size()));
  for (const char* name : {"missing.json", "."}) {
    const auto path = fixture_path(name);
    EXPECT_EQ(message_of([&] { Tokenizer::load(path); }),
              path.string() + ": cannot open the tokenizer file");
  }
}

TEST(Tokenizer, LoadsTheDemoCheckpoint) {
  const auto folder = std::filesystem::path(MSA_SOURCE_DIR) / "examples/tiny_m3";
  const Tokenizer tokenizer = Tokenizer::load(folder / "tokenizer.json");
  const json config = json::parse(std::ifstream(folder / "config.json"));
  EXPECT_EQ(tokenizer.vocab_size(), config.at("vocab_size").get<std::int64_t>());
  EXPECT_EQ(tokenizer.id_of("[e~["), config.at("eos_token_id").get<std::int32_t>());
  const std::string text = fixture("texts.json").at("text");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text), false), text);
}

/// A quarter of a megabyte must not take a time that grows with the square of a piece's length.
TEST(Tokenizer, LongPiecesAreCutInReasonableTime) {
  const std::size_t size = 1 << 18;
  std::string words;
  while (words.size() < size) words += std::to_string(words.size() * 2654435761u % 100003) + " xy";
  const std::vector<std::string> texts = {std::string(size, 'a'),
                                          std::string(size, ' '),
                                          std::string(size, '\n'),
                                          std::string(size, '!'),
                                          std::string(size / 2, ' ') + std::string(size / 2, 'B'),
                                          words};
  for (const char* name : {"minimax", "gpt2", "no_split"}) {
    const Tokenizer tokenizer = variant(name);
    for (const std::string& text : texts) {
      const auto start = std::chrono::steady_clock::now();
      const Ids ids = tokenizer.encode(text);
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      EXPECT_EQ(tokenizer.decode(ids, false), text);
      // Quadratic merging of 2^18 symbols would take 2^36 steps: more than a minute. Here it is
      // about 0.1 s, and some seconds with sanitizers on a busy machine.
      EXPECT_LT(time.count(), 60.0) << name << ": " << text.substr(0, 8);
    }
  }
}

}  // namespace
}  // namespace msa::model
