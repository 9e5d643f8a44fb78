// SPDX-License-Identifier: Apache-2.0
#include "model/safetensors.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "tests/model/checkpoint_files.hpp"

namespace msa {
namespace {

using model::parse_safetensors;
using model::StoredTensor;
using model::TensorFiles;
using test::error_of;
using test::FileTensor;
using test::safetensors_file;
using test::TempDirectory;

std::map<std::string, StoredTensor> parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "a file");
}

std::string parse_error(const std::string& file) {
  return error_of({}, [&] { parse(file); });
}

/// The message for a header, "a file: " left out, with 8 bytes of data behind it.
std::string header_error(std::string_view header) {
  const std::string text = parse_error(safetensors_file(header, "12345678"));
  EXPECT_TRUE(text.starts_with("a file: ")) << text;
  return text.substr(std::min<std::size_t>(text.size(), 8));
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

TEST(Safetensors, ReadsNamesDtypesShapesAndBytes) {
  const std::vector<FileTensor> written = {
      {"a.weight", "F32", {2}, "abcdefgh"}, {"b", "BF16", {1, 3, 1}, "ABCDEF"},
      {"scalar", "I64", {}, "01234567"},    {"empty", "F16", {0, 5}, ""},
      {"four_bits", "F4", {2, 3}, "xyz"},   {"six_bits", "F6_E2M3", {4}, "uvw"}};
  const std::string file = safetensors_file(written);
  const auto tensors = parse(file);
  ASSERT_EQ(tensors.size(), written.size());
  for (const FileTensor& tensor : written) {
    const StoredTensor& stored = tensors.at(tensor.name);
    EXPECT_EQ(stored.dtype, tensor.dtype);
    EXPECT_EQ(stored.shape, tensor.shape);
    EXPECT_EQ(stored.file, "a file");
    EXPECT_EQ(text_of(stored.data), tensor.bytes);
  }
  EXPECT_TRUE(parse(safetensors_file("{}")).empty());
}

TEST(Safetensors, RefusesBrokenHeaders) {
  EXPECT_EQ(parse_error(""), "a file: 0 bytes are too few for a safetensors file");
  EXPECT_EQ(parse_error("1234567"), "a file: 7 bytes are too few for a safetensors file");
  const std::string longer =
      "a file: the header should have 9 bytes, but the file has 2 behind its "
      "length: truncated, or no safetensors file";
  EXPECT_EQ(parse_error(std::string("\x09\0\0\0\0\0\0\0{}", 10)), longer);
  EXPECT_EQ(parse_error(std::string(10, '\xff')),
            "a file: the header should have 18446744073709551615 bytes, but the file has 2 behind "
            "its length: truncated, or no safetensors file");
  EXPECT_TRUE(header_error("").starts_with("the header is no JSON: "));
  EXPECT_TRUE(header_error("{\"a\":").starts_with("the header is no JSON: "));
  EXPECT_TRUE(header_error("{\"\xff\":1}").starts_with("the header is no JSON: "));
  EXPECT_TRUE(header_error("{} {}").starts_with("the header is no JSON: "));
  EXPECT_EQ(header_error("[]"), "top level: expected an object, got array");
  EXPECT_EQ(header_error(std::string(100000, '[')), "the header is nested too deeply");
}

TEST(Safetensors, RefusesBrokenEntries) {
  const auto entry = [](const std::string& fields) {
    return header_error(core::concat("{\"a\":{", fields, "}}"));
  };
  EXPECT_EQ(header_error(R"({"a":1})"), "a: expected an object, got 1");
  EXPECT_EQ(entry(""), "a.dtype: expected a string, got null or nothing");
  EXPECT_EQ(entry(R"("dtype":"F33")"), "a.dtype: unknown dtype 'F33'");
  EXPECT_EQ(entry(R"("dtype":"F32")"), "a.shape: expected an array, got null or nothing");
  EXPECT_EQ(entry(R"("dtype":"F32","shape":[2])"),
            "a.data_offsets: expected an array, got null or nothing");
  const auto shape = [&](const std::string& sizes, const std::string& offsets) {
    return entry(R"("dtype":"F32","shape":)" + sizes + R"(,"data_offsets":)" + offsets);
  };
  EXPECT_EQ(shape("[-2]", "[0,8]"), "a.shape[0]: expected a size, got -2");
  EXPECT_EQ(shape("[1, 2.0]", "[0,8]"), "a.shape[1]: expected a size, got 2.0");
  EXPECT_EQ(shape("[18446744073709551615]", "[0,8]"),
            "a.shape[0]: expected a size, got 18446744073709551615");
  EXPECT_EQ(shape("[4294967296, 4294967296]", "[0,8]"),
            "a.shape: [4294967296,4294967296] has too many elements");
  EXPECT_EQ(shape("[0, 4294967296, 4294967296]", "[0,0]"),
            "a.shape: [0,4294967296,4294967296] has too many elements");
  EXPECT_EQ(shape("[2]", "[0]"), "a.data_offsets: expected [begin, end]");
  EXPECT_EQ(shape("[2]", "[-1,7]"), "a.data_offsets[0]: expected a size, got -1");
  EXPECT_EQ(shape("[2]", "[8,0]"),
            "a.data_offsets: bytes 8 to 0 of 8 bytes of data: the file is truncated or malformed");
  EXPECT_EQ(shape("[2]", "[4,12]"),
            "a.data_offsets: bytes 4 to 12 of 8 bytes of data: the file is truncated or malformed");
  EXPECT_EQ(shape("[2]", "[0,7]"),
            "a.data_offsets: holds 7 bytes, but dtype F32 and shape [2] need 8");
  EXPECT_EQ(entry(R"("dtype":"F4","shape":[3],"data_offsets":[0,2])"),
            "a: the elements do not fill whole bytes");
}

TEST(Safetensors, RefusesOverlapsAndDuplicates) {
  EXPECT_EQ(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[2,6]},)"
                         R"("b":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},)"
                         R"("c":{"dtype":"U8","shape":[3],"data_offsets":[5,8]}})"),
            "tensors a and c overlap");
  EXPECT_EQ(header_error(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                         R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})"),
            "tensor a is listed twice");
}

TEST(Safetensors, RefusesEveryTruncation) {
  const std::vector<FileTensor> tensors = {{"a", "F32", {2}, "abcdefgh"}, {"b", "U8", {1}, "x"}};
  const std::string file = safetensors_file(tensors);
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes) {
    EXPECT_FALSE(parse_error(file.substr(0, bytes)).empty()) << bytes;
  }
}

/// What comes out of a changed file is either an Error or tensors that lie inside the file.
TEST(Safetensors, SurvivesRandomChanges) {
  const std::vector<FileTensor> tensors = {{"a", "F32", {2, 1}, "abcdefgh"},
                                           {"layers.0.b", "BF16", {3}, "123456"},
                                           {"c", "I32", {0}, ""}};
  const std::string file = safetensors_file(tensors);
  std::mt19937 random(7);
  int num_parsed = 0;
  for (int round = 0; round < 20000; ++round) {
    const std::string changed = test::changed(file, random);
    const std::vector<char> exact(changed.begin(), changed.end());  // ASan guards its end
    try {
      const auto parsed = parse_safetensors(std::as_bytes(std::span(exact)), "a file");
      ++num_parsed;
      for (const auto& [name, tensor] : parsed) {
        if (tensor.data.empty()) continue;
        EXPECT_GE(reinterpret_cast<const char*>(tensor.data.data()), exact.data());
        EXPECT_LE(reinterpret_cast<const char*>(tensor.data.data()) + tensor.data.size(),
                  exact.data() + exact.size());
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    }
  }
  EXPECT_GT(num_parsed, 100);  // changes of data and names
  EXPECT_LT(num_parsed, 10000);
}

TEST(TensorFiles, ViewsAreOfTheFileUnlessMisaligned) {
  const TempDirectory directory;
  const std::vector<FileTensor> tensors = {{"f32", "F32", {2, 1}, "abcdefgh"},
                                           {"i32", "I32", {1}, "ijkl"},
                                           {"bf16", "BF16", {3}, "mnopqr"},
                                           {"f16", "F16", {1, 1, 1}, "st"}};
  for (const std::size_t data_shift : {std::size_t{0}, std::size_t{1}, std::size_t{2}}) {
    directory.write("model.safetensors", safetensors_file(tensors, data_shift));
    TensorFiles files(directory.path());
    const std::size_t num_maps = files.maps().size();
    for (const FileTensor& tensor : tensors) {
      const TensorView view = files.view(tensor.name);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype), 0u);
      EXPECT_EQ(view.rank, static_cast<int>(tensor.shape.size()));
      EXPECT_TRUE(std::equal(tensor.shape.begin(), tensor.shape.end(), view.shape.begin()));
      EXPECT_EQ(test::bytes_of(view), tensor.bytes);
      EXPECT_EQ(name_of(view.dtype), tensor.name);
    }
    // The 4-byte types don't fit a shift by 2, nothing fits one by 1: so many copies are kept.
    const std::size_t num_copies = data_shift == 0 ? 0 : data_shift == 1 ? 4 : 2;
    EXPECT_EQ(files.maps().size() - num_maps, num_copies) << data_shift;
  }
}

TEST(TensorFiles, RefusesWhatTheRuntimeCannotUse) {
  const TempDirectory directory;
  const std::vector<FileTensor> tensors = {{"wide", "F64", {1}, "abcdefgh"},
                                           {"deep", "F32", {1, 1, 1, 1, 1, 1}, "abcd"}};
  directory.write("model.safetensors", safetensors_file(tensors));
  TensorFiles files(directory.path());
  const auto view_error = [&](const char* name) {
    return error_of(directory.path(), [&] { files.view(name); });
  };
  EXPECT_EQ(view_error("wide"),
            "DIR/model.safetensors: tensor wide has dtype F64, expected F32, F16 or BF16");
  EXPECT_EQ(view_error("deep"),
            "DIR/model.safetensors: tensor deep has 6 dimensions, expected 5 at most");
  EXPECT_EQ(view_error("none"), "there is no tensor none");
}

TEST(TensorFiles, RefusesBrokenDirectories) {
  const TempDirectory directory;
  const auto open_error = [&] {
    return error_of(directory.path(), [&] { const TensorFiles files(directory.path()); });
  };
  const char* const index = "model.safetensors.index.json";
  EXPECT_EQ(open_error(), "DIR: has neither model.safetensors nor model.safetensors.index.json");
  std::filesystem::create_directory(directory.path() / index);
  EXPECT_TRUE(open_error().starts_with("DIR/model.safetensors.index.json: can't read: "));
  std::filesystem::remove(directory.path() / index);
  directory.write(index, "{");
  EXPECT_TRUE(open_error().starts_with("DIR/model.safetensors.index.json: "));
  directory.write(index, "{}");
  EXPECT_EQ(
      open_error(),
      "DIR/model.safetensors.index.json: weight_map: expected an object, got null or nothing");
  directory.write(index, R"({"weight_map":{"a":1}})");
  EXPECT_EQ(open_error(),
            "DIR/model.safetensors.index.json: weight_map.a: expected a string, got 1");
  directory.write(index, R"({"weight_map":{"a":"../one"}})");
  EXPECT_EQ(open_error(),
            "DIR/model.safetensors.index.json: weight_map.a: '../one' is no file name");
  directory.write(index, R"({"weight_map":{"a":"one","b":"two"}})");
  EXPECT_EQ(open_error(), "DIR/one: can't open: No such file or directory");
  const std::vector<FileTensor> one = {{"a", "U8", {1}, "x"}};
  directory.write("one", safetensors_file(one));
  directory.write("two", safetensors_file("{}"));
  EXPECT_EQ(open_error(),
            "DIR/model.safetensors.index.json: tensor b should be in two, but is not");
  directory.write("two", safetensors_file(one));
  EXPECT_EQ(open_error(), "tensor a is in both DIR/one and DIR/two");
  directory.write("two", "");
  EXPECT_EQ(open_error(), "DIR/two: can't map 0 bytes (empty or no regular file?)");
  directory.write("two", "12345678");
  EXPECT_TRUE(open_error().starts_with("DIR/two: the header should have ")) << open_error();
  std::filesystem::create_directory(directory.path() / "model.safetensors");
  EXPECT_EQ(open_error(), "DIR/model.safetensors: can't map 0 bytes (empty or no regular file?)");
}

}  // namespace
}  // namespace msa
