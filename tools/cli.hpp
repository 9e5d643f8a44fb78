// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <atomic>
#include <nlohmann/json.hpp>
#include <string>

namespace msa::tools {

/// Ordered, so that reports read in the order in which they were written.
using Json = nlohmann::ordered_json;

/// Set by Ctrl-C and SIGTERM; long work looks at it and ends cleanly.
inline std::atomic<bool> cancelled{false};
inline constexpr int kExitCancelled = 130;  // 128 + SIGINT, as shells report it

/// Each adds one subcommand; its callback stores the exit status of the program.
void add_info(CLI::App& app, int& status);
void add_verify(CLI::App& app, int& status);
void add_bench(CLI::App& app, int& status);
void add_run(CLI::App& app, int& status);

/// A report's common head: schema, program version, date, device. docs/cli.md has the schemas.
Json report_head(const char* schema);
/// Writes the report to `path`; throws Error naming the path where that fails. "" writes nothing.
void write_report(const std::string& path, const Json& report);

/// "AMD EPYC ..., 2 threads, AVX3"
std::string device_text();

/// "1.5 GiB", "812 KiB"
std::string bytes_text(double bytes);

}  // namespace msa::tools
