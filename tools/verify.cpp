// SPDX-License-Identifier: Apache-2.0
#include "tests/support/verify.hpp"

#include <cstdio>
#include <memory>
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

int run_verify(const VerifyOptions& options) {
  Json report = report_head("msa.verify/1");
  report["rows"] = Json::array();
  int num_passed = 0;
  int num_failed = 0;
  int num_declined = 0;
  for (const std::string& backend : backends_to_check(options.backend)) {
    std::printf("%s against the reference\n", backend.c_str());
    for (const testing::Case& spec : testing::all_cases()) {
      if (cancelled) break;
      if (spec.name.find(options.filter) == std::string::npos) continue;
      testing::Inputs inputs(spec);
      testing::verify_all(inputs, backend.c_str(),
                          [&](const char* operation, const testing::Outcome& outcome) {
                            using Status = testing::Outcome::Status;
                            if (outcome.status == Status::not_applicable) return;
                            num_passed += outcome.status == Status::passed ? 1 : 0;
                            num_failed += outcome.status == Status::failed ? 1 : 0;
                            num_declined += outcome.status == Status::declined ? 1 : 0;
                            report["rows"].push_back({{"op", operation},
                                                      {"case", spec.name},
                                                      {"backend", backend},
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
  report["num_passed"] = num_passed;
  report["num_failed"] = num_failed;
  report["num_declined"] = num_declined;
  write_report(options.json, report);
  MSA_CHECK(cancelled || !report["rows"].empty(), "--filter '", options.filter,
            "' matches no case");
  std::printf("%d passed, %d failed, %d declined\n", num_passed, num_failed, num_declined);
  if (cancelled) return kExitCancelled;
  return num_failed == 0 ? 0 : 1;
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
