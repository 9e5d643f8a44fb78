// SPDX-License-Identifier: Apache-2.0
//
// msa_bench_cuda: the operations on a GPU, as prefill and decoding run them. A program of its own
// beside `msa bench`: a GPU machine may have none of the libraries that msa is linked with.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bench/cuda/append.hpp"
#include "bench/cuda/backward.hpp"
#include "bench/cuda/cases.hpp"
#include "bench/cuda/ceilings.hpp"
#include "bench/cuda/decode.hpp"
#include "bench/cuda/timing.hpp"
#include "cuda/common/device.hpp"
#include "msa/backend.hpp"
#include "msa/error.hpp"

namespace msa::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kUsage =
    "msa_bench_cuda [options]: times the operations on cuda:0\n"
    "  --filter TEXT[,TEXT...]  only cases whose name contains one of these texts\n"
    "  --skip TEXT[,TEXT...]    not those whose name contains one of these\n"
    "  --backend NAME           for example cuda_generic; default: the best that takes a case\n"
    "  --max-tokens N           only contexts up to N tokens\n"
    "  --seconds N              begin no case after this time\n"
    "  --json FILE              write the rows (schema msa.bench_cuda/1)\n"
    "  --list                   print the cases and end\n";

struct Arguments {
  std::vector<std::string> filters;
  std::vector<std::string> skipped;
  std::string backend;
  std::string json;
  std::int64_t max_tokens = INT64_MAX;
  double seconds = 1e9;
  bool list = false;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--list") {
      arguments.list = true;
      continue;
    }
    MSA_CHECK(i + 1 < argc, "'", name, "' is unknown or lacks its value\n", kUsage);
    const std::string value = argv[++i];
    if (name == "--filter") {
      arguments.filters = split(value);
    } else if (name == "--skip") {
      arguments.skipped = split(value);
    } else if (name == "--backend") {
      arguments.backend = value;
    } else if (name == "--max-tokens") {
      arguments.max_tokens = std::stoll(value);
    } else if (name == "--seconds") {
      arguments.seconds = std::stod(value);
    } else if (name == "--json") {
      arguments.json = value;
    } else {
      MSA_CHECK(false, "there is no option '", name, "'\n", kUsage);
    }
  }
  return arguments;
}

bool contains_any(const std::string& name, const std::vector<std::string>& texts) {
  return std::any_of(texts.begin(), texts.end(),
                     [&](const std::string& text) { return name.find(text) != std::string::npos; });
}

Json row_of(const BenchCase& bench_case, const Options& options, const DeviceCeilings& ceilings) {
  Json row = {{"case", bench_case.name}};
  try {
    const PreparedCase prepared = bench_case.prepare(options);
    const Timing timing =
        time_on_device(prepared.enqueue, {.min_seconds = 0.2, .repeats = prepared.repeats});
    const SelectionFacts selection =
        prepared.selection_after_run ? prepared.selection_after_run() : prepared.selection;
    const double tflops = prepared.flops / timing.median_ms * 1e-9;
    const double tbytes = prepared.bytes / timing.median_ms * 1e-9;
    row["implementation"] = prepared.implementation;
    row["time_ms"] = timing.median_ms;
    row["mad_ms"] = timing.mad_ms;
    row["min_ms"] = timing.min_ms;
    row["max_ms"] = timing.max_ms;
    row["num_runs"] = timing.num_runs;
    row["tflops"] = tflops;
    row["tbytes_per_s"] = tbytes;
    if (ceilings.tensor_tflops > 0.0) {
      const double least_ms = (prepared.flops - prepared.e4m3_flops) / ceilings.tensor_tflops +
                              prepared.e4m3_flops / ceilings.e4m3_tflops;
      row["percent_of_tensor_ceiling"] = 100.0 * 1e-9 * least_ms / timing.median_ms;
    }
    row["percent_of_copy_ceiling"] = 100.0 * tbytes / ceilings.copy_tbytes_per_s;
    row["extra_memory_gb"] = static_cast<double>(prepared.extra_bytes) * 1e-9;
    row["overlap2"] = selection.overlap2;
    row["overlap4"] = selection.overlap4;
    row["overlap8"] = selection.overlap8;
  } catch (const Error& error) {
    row["time_ms"] = nullptr;
    row["note"] = error.what();
    cudaGetLastError();  // what failed is in the note; out of memory is not the next case's fault
  }
  return row;
}

void print(const Json& row) {
  if (row["time_ms"].is_null()) {
    std::printf("%-30s %s\n", row["case"].get<std::string>().c_str(),
                row["note"].get<std::string>().c_str());
  } else {
    const auto number = [&](const char* key) { return row.value(key, 0.0); };
    std::printf(
        "%-30s %-22s %10.4f %8.4f %4d %7.1f %6.1f %8.3f %7.3f %5.2f %5.2f %5.2f\n",
        row["case"].get<std::string>().c_str(), row["implementation"].get<std::string>().c_str(),
        number("time_ms"), number("mad_ms"), row["num_runs"].get<int>(), number("tflops"),
        number("percent_of_tensor_ceiling"), number("tbytes_per_s"), number("extra_memory_gb"),
        number("overlap2"), number("overlap4"), number("overlap8"));
  }
  std::fflush(stdout);
}

std::vector<BenchCase> all_cases() {
  std::vector<BenchCase> cases = gpu_cases();
  for (const BenchCase& decode : decode_cases()) cases.push_back(decode);
  for (const BenchCase& append : append_cases()) cases.push_back(append);
  for (const BenchCase& backward : backward_cases()) cases.push_back(backward);
  return cases;
}

int run(const Arguments& arguments) {
  if (arguments.list) {
    for (const BenchCase& bench_case : all_cases()) std::printf("%s\n", bench_case.name.c_str());
    return 0;
  }
  std::string why_none;
  const std::vector<cuda::DeviceInfo> devices = cuda::devices(why_none);
  MSA_CHECK(!devices.empty(), "no CUDA device: ", why_none);
  const auto begin = std::chrono::steady_clock::now();
  const DeviceCeilings ceilings = measure_device_ceilings();
  std::printf(
      "%s\nceilings of this run: %.1f TFLOP/s (bf16 wgmma), %.1f (e4m3), %.3f TB/s (copy)\n\n",
      devices[0].name.c_str(), ceilings.tensor_tflops, ceilings.e4m3_tflops,
      ceilings.copy_tbytes_per_s);
  std::printf("%-30s %-22s %10s %8s %4s %7s %6s %8s %7s %5s %5s %5s\n", "case", "implementation",
              "ms", "mad", "runs", "TFLOP/s", "%", "TB/s", "GB +", "of 2", "of 4", "of 8");
  Json report = {{"schema", "msa.bench_cuda/1"},
                 {"version", version()},
                 {"device", devices[0].name},
                 {"ceilings",
                  {{"tensor_tflops", ceilings.tensor_tflops},
                   {"e4m3_tflops", ceilings.e4m3_tflops},
                   {"copy_tbytes_per_s", ceilings.copy_tbytes_per_s}}},
                 {"rows", Json::array()}};
  const Options options{.backend = arguments.backend.empty() ? nullptr : arguments.backend.c_str()};
  for (const BenchCase& bench_case : all_cases()) {
    if (!arguments.filters.empty() && !contains_any(bench_case.name, arguments.filters)) continue;
    if (contains_any(bench_case.name, arguments.skipped)) continue;
    if (bench_case.num_tokens > arguments.max_tokens) continue;
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    if (spent.count() > arguments.seconds) {
      report["rows"].push_back(
          {{"case", bench_case.name}, {"time_ms", nullptr}, {"note", "no time left for it"}});
    } else {
      report["rows"].push_back(row_of(bench_case, options, ceilings));
    }
    print(report["rows"].back());
    // Written after each case: a run that is cut short keeps what it has.
    if (!arguments.json.empty()) std::ofstream(arguments.json) << report.dump(1) << '\n';
  }
  MSA_CHECK(!report["rows"].empty(), "no case is left; --list shows them");
  return 0;
}

}  // namespace
}  // namespace msa::bench

int main(int argc, char** argv) {
  if (argc > 1 && (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0)) {
    std::printf("%s", msa::bench::kUsage);
    return 0;
  }
  try {
    return msa::bench::run(msa::bench::parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "msa_bench_cuda: %s\n", error.what());
    return 2;
  }
}
