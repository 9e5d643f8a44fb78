// SPDX-License-Identifier: Apache-2.0
#include "tests/support/verify.hpp"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <sstream>
#include <vector>

#include "core/check.hpp"
#include "msa/backend.hpp"
#include "tests/cases.hpp"
#include "tools/cli.hpp"

namespace msa::tools {
namespace {

struct VerifyOptions {
  std::string filter;
  std::string backend;
  std::string json;
};

/// Every available backend but the reference, or the one asked for.
std::vector<std::string> backends_to_check(const std::string& wanted) {
  std::vector<std::string> names;
  std::string known;
  for (const BackendInfo& backend : backends()) {
    known += std::string(known.empty() ? "" : ", ") + backend.name;
    if (!wanted.empty() ? wanted == backend.name
                        : backend.available && std::string(backend.name) != "reference") {
      names.emplace_back(backend.name);
    }
  }
  MSA_CHECK(!names.empty(), "--backend is '", wanted, "', there are: ", known);
  return names;
}

/// Outcomes of one operation, backend and dtype.
struct Counts {
  std::string operation;
  std::string backend;
  DType dtype = DType::f32;
  int num_passed = 0;
  int num_failed = 0;
  int num_declined = 0;

  void add(testing::Outcome::Status status) {
    using Status = testing::Outcome::Status;
    num_passed += status == Status::passed ? 1 : 0;
    num_failed += status == Status::failed ? 1 : 0;
    num_declined += status == Status::declined ? 1 : 0;
  }
};

/// The rows of the closing table, in the order in which they were met.
class Summary {
 public:
  void add(const char* operation, const std::string& backend, DType dtype,
           testing::Outcome::Status status) {
    auto row = std::find_if(rows_.begin(), rows_.end(), [&](const Counts& counts) {
      return counts.operation == operation && counts.backend == backend && counts.dtype == dtype;
    });
    if (row == rows_.end()) row = rows_.insert(row, {operation, backend, dtype});
    row->add(status);
    total_.add(status);
  }

  const Counts& total() const { return total_; }
  bool empty() const { return rows_.empty(); }

  Json json() const {
    Json json = Json::array();
    for (const Counts& row : rows_) {
      json.push_back({{"op", row.operation},
                      {"backend", row.backend},
                      {"dtype", name_of(row.dtype)},
                      {"num_passed", row.num_passed},
                      {"num_failed", row.num_failed},
                      {"num_declined", row.num_declined}});
    }
    return json;
  }

  /// One line per operation and backend, a column per dtype; then what the backends lack.
  void print(const std::vector<std::string>& backends) const {
    std::vector<DType> dtypes;
    std::set<std::pair<std::string, std::string>> met;
    for (const Counts& row : rows_) {
      if (std::find(dtypes.begin(), dtypes.end(), row.dtype) == dtypes.end()) {
        dtypes.push_back(row.dtype);
      }
      met.emplace(row.operation, row.backend);
    }
    std::printf("\n%-24s%-14s", "passed / failed", "backend");
    for (const DType dtype : dtypes) std::printf("%14s", name_of(dtype));
    std::printf("\n");
    for (const std::string& backend : backends) {
      std::string missing;
      for (const std::string& operation : operations()) {
        if (!met.contains({operation, backend})) {
          missing += (missing.empty() ? "" : ", ") + operation;
          continue;
        }
        std::printf("%-24s%-14s", operation.c_str(), backend.c_str());
        for (const DType dtype : dtypes) {
          std::printf("%14s", cell(operation, backend, dtype).c_str());
        }
        std::printf("\n");
      }
      if (!missing.empty())
        std::printf("not checked on %s: %s\n", backend.c_str(), missing.c_str());
    }
  }

 private:
  /// "96 / 0", with declined cases "90 / 0 (6)".
  std::string cell(const std::string& operation, const std::string& backend, DType dtype) const {
    for (const Counts& row : rows_) {
      if (row.operation != operation || row.backend != backend || row.dtype != dtype) continue;
      std::string text = core::concat(row.num_passed, " / ", row.num_failed);
      if (row.num_declined != 0) text += core::concat(" (", row.num_declined, ")");
      return text;
    }
    return "-";
  }

  /// Every operation of the library, in the order of the support matrix.
  static std::vector<std::string> operations() {
    std::vector<std::string> names;
    for (const ImplementationInfo& row : implementations()) {
      if (std::find(names.begin(), names.end(), row.operation) == names.end()) {
        names.emplace_back(row.operation);
      }
    }
    return names;
  }

  std::vector<Counts> rows_;
  Counts total_;
};

int run_verify(const VerifyOptions& options) {
  Json report = report_head("msa.verify/1");
  report["rows"] = Json::array();
  Summary summary;
  const std::vector<std::string> names = backends_to_check(options.backend);
  for (const std::string& backend : names) {
    std::printf("%s against the reference\n", backend.c_str());
    for (const testing::Case& spec : testing::all_cases()) {
      if (cancelled) break;
      if (spec.name.find(options.filter) == std::string::npos) continue;
      testing::Inputs inputs(spec);
      testing::verify_all(inputs, backend.c_str(),
                          [&](const char* operation, const testing::Outcome& outcome) {
                            using Status = testing::Outcome::Status;
                            if (outcome.status == Status::not_applicable) return;
                            summary.add(operation, backend, spec.dtype, outcome.status);
                            report["rows"].push_back({{"op", operation},
                                                      {"case", spec.name},
                                                      {"backend", backend},
                                                      {"dtype", name_of(spec.dtype)},
                                                      {"status", testing::name_of(outcome.status)},
                                                      {"max_error", outcome.max_error},
                                                      {"max_error_over_bound", outcome.max_ratio},
                                                      {"detail", outcome.detail}});
                            if (outcome.status == Status::failed) {
                              std::ostringstream text;
                              text << spec;
                              std::printf("FAILED %s: %s\n  %s\n", operation,
                                          outcome.detail.c_str(), text.str().c_str());
                            }
                          });
    }
  }
  const Counts& total = summary.total();
  report["summary"] = summary.json();
  report["num_passed"] = total.num_passed;
  report["num_failed"] = total.num_failed;
  report["num_declined"] = total.num_declined;
  write_report(options.json, report);
  MSA_CHECK(cancelled || !summary.empty(), "--filter '", options.filter, "' matches no case");
  summary.print(names);
  std::printf("%d passed, %d failed, %d declined\n", total.num_passed, total.num_failed,
              total.num_declined);
  if (cancelled) return kExitCancelled;
  return total.num_failed == 0 ? 0 : 1;
}

}  // namespace

void add_verify(CLI::App& app, int& status) {
  auto options = std::make_shared<VerifyOptions>();
  CLI::App* command =
      app.add_subcommand("verify", "Compare every backend with the reference on this machine");
  command->add_option("--filter", options->filter, "Only cases whose name contains this text");
  command->add_option("--backend", options->backend, "Only this backend, for example cpu");
  command->add_option("--json", options->json, "Write the rows to this file (schema msa.verify/1)");
  command->footer(
      "Examples:\n  msa verify\n  msa verify --backend cpu --filter paged --json v.json");
  command->callback([options, &status] { status = run_verify(*options); });
}

}  // namespace msa::tools
