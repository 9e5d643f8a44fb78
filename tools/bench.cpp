// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <vector>

#include "core/check.hpp"
#include "cpu/ceilings.hpp"
#include "msa/backend.hpp"
#include "tools/bench_cases.hpp"
#include "tools/cli.hpp"

namespace msa::tools {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  std::string filter;
  std::string backend;
  std::string json;
  std::string compare;
  double min_time = 0.5;
  bool list = false;
};

double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

struct Timing {
  double median_ms = 0.0;
  double mad_ms = 0.0;  ///< median absolute deviation from the median
  std::size_t num_runs = 0;
};

/// One warm-up, then at least 5 runs and at least min_time seconds.
Timing time_runs(const std::function<void()>& run, double min_time) {
  run();
  std::vector<double> samples;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    run();
    samples.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  } while (!cancelled && (samples.size() < 5 ||
                          std::chrono::duration<double>(Clock::now() - begin).count() < min_time));
  Timing timing{.median_ms = median_of(samples), .num_runs = samples.size()};
  for (double& sample : samples) sample = std::abs(sample - timing.median_ms);
  timing.mad_ms = median_of(samples);
  return timing;
}

/// Ratios new / old of the cases in both reports; true where none is more than 5% slower and the
/// geometric mean is not worse.
bool compare_with(const std::string& path, const Json& rows) {
  std::ifstream file(path);
  MSA_CHECK(file.good(), "--compare: can't read ", path);
  Json old;
  try {
    old = Json::parse(file);
  } catch (const Json::exception& error) {
    throw Error(ErrorCode::invalid_argument, core::concat("--compare: ", path, ": ", error.what()));
  }
  MSA_CHECK(old.value("schema", "") == "msa.bench/1", "--compare: ", path,
            " is no report of schema msa.bench/1");
  double log_sum = 0.0;
  int count = 0;
  bool fine = true;
  std::printf("\nagainst %s (%s)\n", path.c_str(), old.value("date", "no date").c_str());
  for (const Json& row : rows) {
    for (const Json& before : old["rows"]) {
      if (before["op"] != row["op"] || before["case"] != row["case"] ||
          before["backend"] != row["backend"]) {
        continue;
      }
      const double ratio = row["time_ms"].get<double>() / before["time_ms"].get<double>();
      log_sum += std::log(ratio);
      ++count;
      fine = fine && ratio <= 1.05;
      std::printf("  %-24s %-26s %6.3fx%s\n", row["op"].get<std::string>().c_str(),
                  row["case"].get<std::string>().c_str(), ratio, ratio > 1.05 ? "  slower" : "");
    }
  }
  MSA_CHECK(count > 0, "--compare: ", path, " has none of these cases");
  const double mean = std::exp(log_sum / count);
  std::printf("  geometric mean of %d cases: %.3fx\n", count, mean);
  return fine && mean <= 1.0;
}

int run_bench(const BenchOptions& options) {
  const std::vector<BenchCase> cases = bench_cases();
  if (options.list) {
    for (const BenchCase& bench_case : cases) {
      std::printf("%-24s %s\n", bench_case.operation, bench_case.name.c_str());
    }
    return 0;
  }
  Json report = report_head("msa.bench/1");
  const cpu::Ceilings ceilings = cpu::measure_ceilings();
  report["ceilings"] = {{"fma_gflops", ceilings.fma_gflops},
                        {"read_gbytes_per_s", ceilings.read_gbytes_per_s},
                        {"copy_gbytes_per_s", ceilings.copy_gbytes_per_s}};
  report["rows"] = Json::array();
  std::printf(
      "%s\nceilings of this run: %.1f GFLOP/s (f32 FMA), %.1f GB/s (read), %.1f GB/s (copy)\n\n",
      device_text().c_str(), ceilings.fma_gflops, ceilings.read_gbytes_per_s,
      ceilings.copy_gbytes_per_s);
  std::printf("%-24s %-26s %-10s %10s %8s %9s %8s %10s\n", "op", "case", "backend", "time ms",
              "mad", "GFLOP/s", "GB/s", "% roofline");
  for (const BenchCase& bench_case : cases) {
    const std::string full_name = core::concat(bench_case.operation, " ", bench_case.name);
    if (full_name.find(options.filter) == std::string::npos) continue;
    if (cancelled) break;
    const Options plan_options{.backend =
                                   options.backend.empty() ? nullptr : options.backend.c_str()};
    const PreparedBench prepared = bench_case.prepare(plan_options);
    const Timing timing = time_runs(prepared.run, options.min_time);
    if (cancelled) break;
    const double seconds = timing.median_ms * 1e-3;
    const double bound_s = std::max(prepared.flops / (ceilings.fma_gflops * 1e9),
                                    prepared.bytes / (ceilings.read_gbytes_per_s * 1e9));
    Json row = {{"op", bench_case.operation},
                {"case", bench_case.name},
                {"backend", prepared.implementation},
                {"device", report["device"]},
                {"time_ms", timing.median_ms},
                {"mad_ms", timing.mad_ms},
                {"num_runs", timing.num_runs},
                {"gflops", prepared.flops / seconds * 1e-9},
                {"gbytes_per_s", prepared.bytes / seconds * 1e-9},
                {"percent_of_roofline", 100.0 * bound_s / seconds}};
    if (prepared.overlap4 > 0.0) row["distinct_blocks_of_4_tokens"] = prepared.overlap4;
    std::printf("%-24s %-26s %-10s %10.3f %8.3f %9.1f %8.2f %10.1f\n", bench_case.operation,
                bench_case.name.c_str(), prepared.implementation, timing.median_ms, timing.mad_ms,
                row["gflops"].get<double>(), row["gbytes_per_s"].get<double>(),
                row["percent_of_roofline"].get<double>());
    std::fflush(stdout);
    report["rows"].push_back(std::move(row));
  }
  write_report(options.json, report);
  if (cancelled) return kExitCancelled;
  MSA_CHECK(!report["rows"].empty(), "--filter '", options.filter,
            "' matches no case; msa bench --list shows them");
  if (!options.compare.empty() && !compare_with(options.compare, report["rows"])) return 1;
  return 0;
}

}  // namespace

void add_bench(CLI::App& app, int& status) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand(
      "bench", "Time the operations and relate them to what this machine can do");
  command->add_option("--filter", options->filter,
                      "Only cases whose \"op case\" contains this text");
  command->add_option("--backend", options->backend,
                      "Implementation to time, for example reference");
  command->add_option("--min-time", options->min_time, "Seconds to spend on each case at least")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command->add_flag("--list", options->list, "Print the cases and end");
  command->add_option("--json", options->json, "Write the rows to this file (schema msa.bench/1)");
  command->add_option("--compare", options->compare,
                      "An earlier report: print ratios; exit 1 if a case is > 5% slower");
  command->footer(
      "Examples:\n  msa bench --filter Indexer\n  msa bench --json new.json --compare old.json");
  command->callback([options, &status] { status = run_bench(*options); });
}

}  // namespace msa::tools
