// SPDX-License-Identifier: Apache-2.0
//
// A JSON value that knows where it comes from, so that every complaint names file and field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "core/check.hpp"

namespace msa::model {

class JsonNode {
 public:
  /// `file` and `value` must outlive the node.
  JsonNode(const std::string& file, const nlohmann::json& value)
      : file_(&file), value_(&value), path_() {}

  const nlohmann::json& value() const { return *value_; }
  const std::string& path() const { return path_; }
  /// True also for a field that is missing.
  bool is_null() const { return value_->is_null(); }

  /// The field of an object; null where it is missing.
  JsonNode operator[](const std::string& key) const {
    static const nlohmann::json null;
    const nlohmann::json& object = expect(nlohmann::json::value_t::object, "an object");
    const auto found = object.find(key);
    return {file_, found == object.end() ? &null : &*found,
            path_.empty() ? key : path_ + '.' + key};
  }
  JsonNode operator[](std::size_t index) const {
    return {file_, &value_->at(index), core::concat(path_, '[', index, ']')};
  }

  std::size_t array_size() const {
    return expect(nlohmann::json::value_t::array, "an array").size();
  }
  const nlohmann::json& object() const {
    return expect(nlohmann::json::value_t::object, "an object");
  }
  const std::string& text() const {
    return expect(nlohmann::json::value_t::string, "a string").get_ref<const std::string&>();
  }
  std::string text(const char* fallback) const { return is_null() ? fallback : text(); }
  bool boolean(bool fallback) const {
    return is_null() ? fallback : expect(nlohmann::json::value_t::boolean, "a boolean").get<bool>();
  }
  /// A token id: 0 .. 2^31 - 1.
  std::int32_t id() const {
    const bool fits = value_->is_number_unsigned() && value_->get<std::uint64_t>() <= INT32_MAX;
    if (!fits) fail(core::concat("expected a token id, got ", brief()));
    return value_->get<std::int32_t>();
  }

  /// The value for a message; only its type where it is long, or nested, as dump() recurses.
  std::string brief() const {
    if (is_null()) return "null or nothing";
    if (value_->is_structured()) return value_->type_name();
    const std::string text = value_->dump();
    constexpr std::size_t kLongest = 60;
    return text.size() <= kLongest ? text : core::concat("a ", value_->type_name());
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorCode::invalid_argument,
                core::concat(*file_, ": ", path_.empty() ? "top level" : path_, ": ", what));
  }

 private:
  JsonNode(const std::string* file, const nlohmann::json* value, std::string path)
      : file_(file), value_(value), path_(std::move(path)) {}

  const nlohmann::json& expect(nlohmann::json::value_t type, const char* name) const {
    if (value_->type() != type) fail(core::concat("expected ", name, ", got ", brief()));
    return *value_;
  }

  const std::string* file_;
  const nlohmann::json* value_;
  std::string path_;
};

}  // namespace msa::model
