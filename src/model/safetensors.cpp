// SPDX-License-Identifier: Apache-2.0
#include "model/safetensors.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>
#include <system_error>
#include <utility>

#include "core/check.hpp"
#include "model/json_file.hpp"
#include "model/json_node.hpp"

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

namespace msa::model {
namespace {

struct StoredDType {
  const char* name;
  int bits;
};

// Every dtype of the format, so that a file with tensors that we don't use still loads.
constexpr std::array<StoredDType, 22> kStoredDTypes = {
    {{"BOOL", 8},        {"U8", 8},      {"I8", 8},      {"F4", 4},      {"F6_E2M3", 6},
     {"F6_E3M2", 6},     {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
     {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
     {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
     {"I64", 64},        {"U64", 64}}};

int bits_of(const std::string& dtype) {
  const auto* found = std::find_if(kStoredDTypes.begin(), kStoredDTypes.end(),
                                   [&](const StoredDType& known) { return dtype == known.name; });
  return found == kStoredDTypes.end() ? 0 : found->bits;
}

/// A non-negative integer below 2^63.
std::int64_t size_at(const JsonNode& node) {
  const nlohmann::json& value = node.value();
  if (!value.is_number_unsigned() ||
      value.get<std::uint64_t>() >
          static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    node.fail(core::concat("expected a size, got ", node.brief()));
  }
  return value.get<std::int64_t>();
}

/// Bytes of a tensor; fails where the product does not fit, sizes of 0 left out, so that strides
/// fit as well.
std::int64_t bytes_of(const JsonNode& node, const std::vector<std::int64_t>& shape, int bits) {
  constexpr std::int64_t kMostElements = std::numeric_limits<std::int64_t>::max() / 64;
  std::int64_t count = 1;
  bool is_empty = false;
  for (std::int64_t size : shape) {
    is_empty |= size == 0;
    if (size == 0) continue;
    if (count > kMostElements / size) {
      node["shape"].fail(core::concat(node["shape"].value().dump(), " has too many elements"));
    }
    count *= size;
  }
  if (is_empty) return 0;
  if (count * bits % 8 != 0) node.fail("the elements do not fill whole bytes");
  return count * bits / 8;
}

StoredTensor parse_tensor(const JsonNode& node, std::span<const std::byte> data,
                          const std::string& file) {
  StoredTensor tensor{.dtype = node["dtype"].text(), .shape = {}, .data = {}, .file = file};
  const int bits = bits_of(tensor.dtype);
  if (bits == 0) node["dtype"].fail(core::concat("unknown dtype '", tensor.dtype, "'"));
  const JsonNode shape = node["shape"];
  for (std::size_t i = 0; i < shape.array_size(); ++i) tensor.shape.push_back(size_at(shape[i]));
  const JsonNode offsets = node["data_offsets"];
  if (offsets.array_size() != 2) offsets.fail("expected [begin, end]");
  const std::int64_t begin = size_at(offsets[0]);
  const std::int64_t end = size_at(offsets[1]);
  const auto available = static_cast<std::int64_t>(data.size());
  if (begin > end || end > available) {
    offsets.fail(core::concat("bytes ", begin, " to ", end, " of ", available,
                              " bytes of data: the file is truncated or malformed"));
  }
  const std::int64_t expected = bytes_of(node, tensor.shape, bits);
  if (expected != end - begin) {
    offsets.fail(core::concat("holds ", end - begin, " bytes, but dtype ", tensor.dtype,
                              " and shape ", shape.value().dump(), " need ", expected));
  }
  tensor.data =
      data.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  return tensor;
}

void check_no_overlap(const std::map<std::string, StoredTensor>& tensors, const std::string& file) {
  std::vector<std::pair<const std::byte*, const std::string*>> order;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor.data.empty()) order.emplace_back(tensor.data.data(), &name);
  }
  std::sort(order.begin(), order.end());
  for (std::size_t i = 1; i < order.size(); ++i) {
    const StoredTensor& before = tensors.at(*order[i - 1].second);
    MSA_CHECK(before.data.data() + before.data.size() <= order[i].first, file, ": tensors ",
              *order[i - 1].second, " and ", *order[i].second, " overlap");
  }
}

/// The JSON of a header; duplicate names are refused, which the parser alone would pass over.
nlohmann::json parse_header(std::string_view text, const std::string& file) {
  std::set<std::string> names;
  const auto on_event = [&](int depth, nlohmann::json::parse_event_t event,
                            nlohmann::json& parsed) {
    if (depth == 1 && event == nlohmann::json::parse_event_t::key) {
      MSA_CHECK(names.insert(parsed.get<std::string>()).second, file, ": tensor ",
                parsed.get<std::string>(), " is listed twice");
    }
    MSA_CHECK(depth <= 8, file, ": the header is nested too deeply");
    return true;
  };
  try {
    return nlohmann::json::parse(text, on_event);
  } catch (const nlohmann::json::exception& error) {
    throw Error(ErrorCode::invalid_argument,
                core::concat(file, ": the header is no JSON: ", error.what()));
  }
}

}  // namespace

std::map<std::string, StoredTensor> parse_safetensors(std::span<const std::byte> file,
                                                      const std::string& name) {
  std::uint64_t header_bytes = 0;
  MSA_CHECK(file.size() >= sizeof(header_bytes), name, ": ", file.size(),
            " bytes are too few for a safetensors file");
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  MSA_CHECK(header_bytes <= file.size() - sizeof(header_bytes), name, ": the header should have ",
            header_bytes, " bytes, but the file has ", file.size() - sizeof(header_bytes),
            " behind its length: truncated, or no safetensors file");
  const auto text = file.subspan(sizeof(header_bytes), header_bytes);
  const nlohmann::json header =
      parse_header({reinterpret_cast<const char*>(text.data()), text.size()}, name);
  const JsonNode root(name, header);
  std::map<std::string, StoredTensor> tensors;
  for (const auto& entry : root.object().items()) {
    if (entry.key() == "__metadata__") continue;
    tensors.emplace(
        entry.key(),
        parse_tensor(root[entry.key()], file.subspan(sizeof(header_bytes) + header_bytes), name));
  }
  check_no_overlap(tensors, name);
  return tensors;
}

void TensorFiles::add_file(const std::filesystem::path& file) {
  const std::string name = file.string();
  const int descriptor = open(name.c_str(), O_RDONLY | O_CLOEXEC);
  MSA_CHECK(descriptor >= 0, name, ": can't open: ", std::strerror(errno));
  struct stat status{};
  const bool known = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  const auto bytes = known ? static_cast<std::size_t>(status.st_size) : 0;
  void* data =
      bytes == 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
  close(descriptor);
  MSA_CHECK(data != MAP_FAILED, name, ": can't map ", bytes, " bytes (empty or no regular file?)");
  maps_.push_back(std::shared_ptr<const void>(
      data, [bytes](const void* mapped) { munmap(const_cast<void*>(mapped), bytes); }));
  for (auto& [tensor_name, tensor] :
       parse_safetensors({static_cast<const std::byte*>(data), bytes}, name)) {
    const auto [place, is_new] = tensors_.emplace(tensor_name, tensor);
    MSA_CHECK(is_new, "tensor ", tensor_name, " is in both ", place->second.file, " and ", name);
  }
}

TensorFiles::TensorFiles(const std::filesystem::path& directory) {
  const std::filesystem::path single = directory / "model.safetensors";
  const std::filesystem::path index = directory / "model.safetensors.index.json";
  std::error_code ignored;  // what can't be looked up does not exist
  if (std::filesystem::exists(single, ignored)) {
    add_file(single);
    return;
  }
  MSA_CHECK(std::filesystem::exists(index, ignored), directory.string(),
            ": has neither model.safetensors nor model.safetensors.index.json");
  const std::string name = index.string();
  const nlohmann::json json = read_json_file(index);
  const JsonNode map = JsonNode(name, json)["weight_map"];
  std::set<std::string> shards;
  for (const auto& entry : map.object().items()) {
    const std::string& shard = map[entry.key()].text();
    if (std::filesystem::path(shard).filename() != shard) {
      map[entry.key()].fail(core::concat("'", shard, "' is no file name"));
    }
    shards.insert(shard);
  }
  for (const std::string& shard : shards) add_file(directory / shard);
  for (const auto& entry : map.object().items()) {
    const auto found = tensors_.find(entry.key());
    MSA_CHECK(found != tensors_.end(), name, ": tensor ", entry.key(), " should be in ",
              map[entry.key()].text(), ", but is not");
  }
}

TensorView TensorFiles::view(const std::string& name) {
  const auto found = tensors_.find(name);
  MSA_CHECK(found != tensors_.end(), "there is no tensor ", name);
  const StoredTensor& tensor = found->second;
  constexpr std::array<std::pair<const char*, DType>, 4> kUsable = {
      {{"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}, {"I32", DType::i32}}};
  const auto* dtype = std::find_if(kUsable.begin(), kUsable.end(),
                                   [&](const auto& known) { return tensor.dtype == known.first; });
  MSA_CHECK(dtype != kUsable.end(), tensor.file, ": tensor ", name, " has dtype ", tensor.dtype,
            ", expected F32, F16 or BF16");
  MSA_CHECK(tensor.shape.size() <= kMaxRank, tensor.file, ": tensor ", name, " has ",
            tensor.shape.size(), " dimensions, expected ", kMaxRank, " at most");
  // The runtime never writes to weights; TensorView just has no read-only form.
  TensorView view{.data = const_cast<std::byte*>(tensor.data.data()),
                  .dtype = dtype->second,
                  .rank = static_cast<int>(tensor.shape.size())};
  if (reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) != 0) {
    auto copy = std::make_shared<std::vector<std::byte>>(tensor.data.begin(), tensor.data.end());
    view.data = copy->data();
    maps_.push_back(std::move(copy));
  }
  std::int64_t stride = 1;
  for (std::size_t axis = tensor.shape.size(); axis-- > 0;) {
    view.shape[axis] = tensor.shape[axis];
    view.stride[axis] = stride;
    stride *= tensor.shape[axis];
  }
  return view;
}

}  // namespace msa::model
