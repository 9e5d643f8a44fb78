// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <fstream>
#include <ios>
#include <nlohmann/json.hpp>

#include "core/check.hpp"

namespace msa::model {

/// The JSON of a file; throws Error naming the file and, for a syntax error, the place.
inline nlohmann::json read_json_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  MSA_CHECK(file.good(), path.string(), ": can't open");
  try {
    return nlohmann::json::parse(file);
  } catch (const nlohmann::json::exception& error) {
    throw Error(ErrorCode::invalid_argument, core::concat(path.string(), ": ", error.what()));
  } catch (const std::ios_base::failure& error) {  // a directory, or the disk
    throw Error(ErrorCode::invalid_argument,
                core::concat(path.string(), ": can't read: ", error.what()));
  }
}

}  // namespace msa::model
