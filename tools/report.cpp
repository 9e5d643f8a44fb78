// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>

#include "core/check.hpp"
#include "cpu/cpu.hpp"
#include "msa/backend.hpp"
#include "tools/cli.hpp"

namespace msa::tools {
namespace {

std::string cpu_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line;
  while (std::getline(cpuinfo, line)) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown CPU";
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm calendar{};
  gmtime_r(&now, &calendar);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &calendar);
  return text.data();
}

}  // namespace

std::string device_text() {
  return core::concat(cpu_model(), ", ", num_threads(), " threads, ", cpu::simd_target());
}

Json report_head(const char* schema) {
  return {{"schema", schema},
          {"msa_version", version()},
          {"date", utc_now()},
          {"device", device_text()}};
}

void write_report(const std::string& path, const Json& report) {
  if (path.empty()) return;
  std::ofstream file(path, std::ios::trunc);
  file << report.dump(2) << '\n';
  file.close();
  MSA_CHECK(file.good(), "can't write ", path, ": ", std::strerror(errno));
}

std::string bytes_text(double bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (bytes >= 1024.0 && unit + 1 < kUnits.size()) {
    bytes /= 1024.0;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 || bytes >= 100.0 ? "%.0f %s" : "%.1f %s",
                bytes, kUnits[unit]);
  return text.data();
}

}  // namespace msa::tools
