// SPDX-License-Identifier: Apache-2.0
//
// The readers of a checkpoint's files.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <string_view>
#include <system_error>
#include <utility>

#include "model/config.hpp"
#include "model/safetensors.hpp"
#include "model/tokenizer.hpp"
#include "model/utf8.hpp"
#include "msa/error.hpp"
#include "tests/fuzz/targets.hpp"

namespace msa::fuzz {
namespace {

/// One folder per process, removed when it ends.
class Folder {
 public:
  using File = std::pair<const char*, std::string_view>;
  explicit Folder(std::initializer_list<File> files = {})
      : path_((std::filesystem::temp_directory_path() / "msa_fuzz_XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp: " + path_);
    for (const auto& [name, text] : files) write(name, text);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::filesystem::path path() const { return path_; }
  void write(const char* name, std::string_view text) const {
    std::ofstream(path() / name, std::ios::binary) << text;
  }

 private:
  std::string path_;
};

std::string_view text_of(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

volatile unsigned sink;

/// Reads every byte, so that a sanitizer sees ranges that lie outside of the file.
void read_all(std::span<const std::byte> data) {
  unsigned sum = 0;
  for (const std::byte byte : data) sum = sum * 31 + std::to_integer<unsigned>(byte);
  sink = sum;
}

void check_tensor(const std::string& name, const model::StoredTensor& tensor,
                  std::size_t file_bytes) {
  std::size_t count = 1;
  for (const std::int64_t size : tensor.shape) {
    expect(size >= 0, name, ": negative size");
    count *= static_cast<std::size_t>(size);
  }
  // Elements are half a byte to 8 bytes; with a product that wraps around, this fails too.
  expect(tensor.data.size() <= file_bytes, name, " is larger than its file");
  expect(tensor.data.size() * 2 >= count && tensor.data.size() <= count * 8, name, " has ", count,
         " elements in ", tensor.data.size(), " bytes");
  read_all(tensor.data);
}

/// All views of a checkpoint that can be had.
void read_views(const std::filesystem::path& folder) {
  model::TensorFiles files(folder);
  for (const auto& [name, tensor] : files.tensors()) {
    accepts([&] {
      const TensorView view = files.view(name);
      expect(view.num_elements() * static_cast<std::int64_t>(size_of(view.dtype)) ==
                     static_cast<std::int64_t>(tensor.data.size()) ||
                 view.rank == 0,
             name, ": view and file differ in size");
      read_all({static_cast<const std::byte*>(view.data), tensor.data.size()});
    });
  }
}

template <std::size_t kSize>
constexpr std::string_view with_zeros(const char (&text)[kSize]) {
  return {text, kSize - 1};
}
constexpr std::string_view kShard1 = with_zeros(
    "\x36\0\0\0\0\0\0\0{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}abcdefgh");
constexpr std::string_view kShard2 = with_zeros(
    "\x39\0\0\0\0\0\0\0{\"b\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[0,4]}}ABCD");

}  // namespace

bool accepts(const std::function<void()>& read) {
  try {
    read();
    return true;
  } catch (const Error& error) {
    expect(error.code() == ErrorCode::invalid_argument, "error of another kind: ", error.what());
    expect(*error.what() != '\0', "an error without a text");
    return false;
  }
}

void safetensors(Bytes bytes) {
  static const Folder single;
  static const Folder sharded({{"1.safetensors", kShard1}, {"2.safetensors", kShard2}});
  const auto file = std::as_bytes(bytes);
  const bool is_sound = accepts([&] {
    for (const auto& [name, tensor] : model::parse_safetensors(file, "memory")) {
      check_tensor(name, tensor, file.size());
    }
  });
  if (is_sound) {
    single.write("model.safetensors", text_of(bytes));
    expect(accepts([] { read_views(single.path()); }),
           "what is sound in memory is refused as a file");
  }
  if (!bytes.empty() && bytes[0] == '{') {
    sharded.write("model.safetensors.index.json", text_of(bytes));
    accepts([] { read_views(sharded.path()); });
  }
}

void config(Bytes bytes) {
  static const Folder folder;
  folder.write("config.json", text_of(bytes));
  accepts([] {
    const model::Config c = model::load_config(folder.path());
    const Problem& p = c.attention;
    const auto layers = static_cast<std::size_t>(c.num_layers);
    expect(c.num_layers >= 1 && c.attention_kinds.size() == layers && c.mlp_kinds.size() == layers,
           "kinds of ", c.num_layers, " layers");
    expect(c.hidden_size > 0 && c.vocab_size > 0 && c.max_position_embeddings > 0, "sizes");
    expect(p.num_kv_heads >= 1 && p.num_q_heads % p.num_kv_heads == 0, "heads");
    expect(p.head_dim >= 1 && p.index_dim >= 1 && p.block_size >= 16, "dims");
    expect(p.num_local_blocks >= 1 && p.num_init_blocks >= 0 &&
               p.num_init_blocks <= p.top_k - p.num_local_blocks,
           "forced blocks");
    expect(c.rotary_dim >= 0 && c.rotary_dim % 2 == 0 && c.rotary_dim <= p.head_dim, "rotary_dim");
    expect(c.rope_theta > 0.0 && c.rms_norm_eps > 0.0 && c.swiglu_limit > 0.0, "constants");
    expect(c.num_experts_per_token >= 1 && c.num_experts_per_token <= c.num_experts, "experts");
  });
}

namespace {

void check_text(const model::Tokenizer& tokenizer, std::string_view text, bool is_lossless) {
  for (const bool add_special_tokens : {false, true}) {
    const std::vector<std::int32_t> ids = tokenizer.encode(text, add_special_tokens);
    for (const std::int32_t id : ids) {
      expect(id >= 0 && id < tokenizer.vocab_size(), "id ", id, " is outside of the vocabulary");
    }
    for (const bool skip_special_tokens : {false, true}) {
      const std::string whole = tokenizer.decode(ids, skip_special_tokens);
      expect(model::is_valid_utf8(whole), "decoded text is no UTF-8");
      model::StreamDecoder stream(tokenizer, skip_special_tokens);
      std::string pieces;
      for (const std::int32_t id : ids) pieces += stream.push(id);
      pieces += stream.finish();
      expect(pieces == whole, "streamed text differs");
      if (is_lossless && !add_special_tokens && !skip_special_tokens) {
        expect(whole == model::replace_invalid_utf8(text), "the text did not survive");
      }
    }
  }
}

}  // namespace

void tokenizer(Bytes bytes) {
  const std::string_view all = text_of(bytes);
  if (all.empty() || all[0] != '{') {
    static const model::Tokenizer tiny =
        model::Tokenizer::load(std::string(MSA_SOURCE_DIR) + "/examples/tiny_m3/tokenizer.json");
    check_text(tiny, all, /*is_lossless=*/true);
    return;
  }
  const std::size_t end = std::min(all.find('\0'), all.size());
  accepts([&] {
    const model::Tokenizer parsed = model::Tokenizer::parse(all.substr(0, end), "memory");
    const std::string_view rest = all.substr(std::min(end + 1, all.size()));
    check_text(parsed, rest.empty() ? "Hello, wide world! 12345\n" : rest, false);
  });
}

}  // namespace msa::fuzz
