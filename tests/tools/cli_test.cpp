// SPDX-License-Identifier: Apache-2.0
//
// The msa program as a user meets it: output, exit status, reports, Ctrl-C.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

const std::string kModel = std::string(MSA_SOURCE_DIR) + "/examples/tiny_m3";

struct Result {
  int status = -1;
  std::string output;  // stdout
  std::string errors;  // stderr
};

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

class Cli : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              ("msa_cli_" + std::to_string(getpid()) + "_" + test->name());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  /// Starts msa with stdout and stderr in files; returns its process id.
  pid_t start(const std::vector<std::string>& arguments) const {
    const pid_t child = fork();
    if (child != 0) return child;
    std::vector<char*> argv = {const_cast<char*>(MSA_PROGRAM)};
    for (const std::string& argument : arguments)
      argv.push_back(const_cast<char*>(argument.c_str()));
    argv.push_back(nullptr);
    if (std::freopen(path("out").c_str(), "w", stdout) == nullptr ||
        std::freopen(path("err").c_str(), "w", stderr) == nullptr) {
      _exit(127);
    }
    execv(MSA_PROGRAM, argv.data());
    _exit(127);
  }

  Result finish(pid_t child) const {
    int status = 0;
    waitpid(child, &status, 0);
    return {.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status),
            .output = read_file(path("out")),
            .errors = read_file(path("err"))};
  }

  Result msa(const std::vector<std::string>& arguments) const { return finish(start(arguments)); }

  nlohmann::json report(const std::string& name) const {
    return nlohmann::json::parse(read_file(path(name)));
  }

 private:
  std::filesystem::path folder_;
};

testing::AssertionResult has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "no \"" << part << "\" in:\n" << text;
}

void expect_head(const nlohmann::json& report, const std::string& schema) {
  EXPECT_EQ(report.at("schema"), schema);
  EXPECT_TRUE(report.at("msa_version").is_string());
  EXPECT_EQ(report.at("date").get<std::string>().size(), 20u);
  EXPECT_TRUE(report.at("device").is_string());
}

TEST_F(Cli, HelpHasExamples) {
  EXPECT_EQ(msa({"--help"}).status, 0);
  for (const char* command : {"info", "verify", "bench", "run"}) {
    const Result help = msa({command, "--help"});
    EXPECT_EQ(help.status, 0);
    EXPECT_TRUE(has(help.output, std::string("  msa ") + command));
    EXPECT_TRUE(has(help.output, "--json"));
  }
}

TEST_F(Cli, MistakesOnTheCommandLineExitAbove100) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{},
        {"fly"},
        {"run"},
        {"run", "--model", kModel},
        {"run", "--model", kModel, "--prompt", "a", "--prompt-file", "b"},
        {"run", "--model", kModel, "--prompt", "a", "--attention", "linear"},
        {"run", "--model", kModel, "--prompt", "a", "--top-p", "2"}}) {
    const Result result = msa(arguments);
    EXPECT_GE(result.status, 100);
    EXPECT_FALSE(result.errors.empty());
  }
}

TEST_F(Cli, InfoReports) {
  const Result result = msa({"info", "--model", kModel, "--json", path("info.json")});
  ASSERT_EQ(result.status, 0) << result.errors;
  EXPECT_TRUE(has(result.output, "top 16 of 128-token blocks"));
  const nlohmann::json json = report("info.json");
  expect_head(json, "msa.info/1");
  EXPECT_EQ(json.at("backends").back().at("name"), "reference");
  EXPECT_EQ(json.at("implementations").size(), 20u);
  EXPECT_EQ(json.at("model").at("num_sparse_layers"), 2);
  // 2 layers x (K and V of 2 heads x 128 + index K of 128) x 2 bytes
  EXPECT_EQ(json.at("model").at("cache_bytes_per_token_bf16"), 2 * (2 * 2 * 128 + 128) * 2);
}

TEST_F(Cli, VerifyReports) {
  const Result result =
      msa({"verify", "--backend", "cpu", "--filter", "paged", "--json", path("verify.json")});
  ASSERT_EQ(result.status, 0) << result.output << result.errors;
  const nlohmann::json json = report("verify.json");
  expect_head(json, "msa.verify/1");
  EXPECT_GT(json.at("num_passed"), 0);
  EXPECT_EQ(json.at("num_failed"), 0);
  for (const auto& row : json.at("rows")) EXPECT_LE(row.at("max_error_over_bound"), 1.0);
  // The table counts every row once: 8 operations in 3 dtypes.
  EXPECT_EQ(json.at("summary").size(), 24u);
  for (const auto& counts : json.at("summary")) {
    int num_passed = 0;
    for (const auto& row : json.at("rows")) {
      const bool same = row.at("op") == counts.at("op") && row.at("dtype") == counts.at("dtype") &&
                        row.at("backend") == counts.at("backend");
      num_passed += same && row.at("status") == "passed" ? 1 : 0;
    }
    EXPECT_GT(num_passed, 0);
    EXPECT_EQ(counts.at("num_passed"), num_passed);
    EXPECT_EQ(counts.at("num_failed"), 0);
    EXPECT_EQ(counts.at("backend"), "cpu");
  }
  EXPECT_TRUE(has(result.output, "passed / failed"));
  EXPECT_TRUE(has(result.output, "DenseAttentionForward   cpu"));
  EXPECT_TRUE(
      has(result.output, "not checked on cpu: SparseAttentionBackward, IndexerKlBackward\n"));
  EXPECT_EQ(msa({"verify", "--filter", "no such case"}).status, 1);
  EXPECT_TRUE(has(msa({"verify", "--backend", "abacus"}).errors, "--backend is 'abacus'"));
}

TEST_F(Cli, BenchReportsAndCompares) {
  const std::vector<std::string> bench = {"bench",      "--filter", "SelectTopK m3.chunk512.8k",
                                          "--min-time", "0",        "--json"};
  auto first = bench;
  first.push_back(path("old.json"));
  ASSERT_EQ(msa(first).status, 0);
  nlohmann::json json = report("old.json");
  expect_head(json, "msa.bench/1");
  ASSERT_EQ(json.at("rows").size(), 1u);
  for (const char* key : {"time_ms", "mad_ms", "gflops", "gbytes_per_s", "percent_of_roofline"}) {
    EXPECT_TRUE(json.at("rows")[0].at(key).is_number()) << key;
  }
  for (const char* key : {"op", "case", "backend", "device"}) {
    EXPECT_TRUE(json.at("rows")[0].at(key).is_string()) << key;
  }
  for (const char* key : {"fma_gflops", "read_gbytes_per_s", "copy_gbytes_per_s"}) {
    EXPECT_GT(json.at("ceilings").at(key), 0.0) << key;
  }

  // Against a run a thousand times slower it is an improvement, against one as much faster it
  // fails.
  for (const double factor : {1e3, 1e-3}) {
    nlohmann::json other = json;
    other["rows"][0]["time_ms"] = json["rows"][0]["time_ms"].get<double>() * factor;
    std::ofstream(path("other.json")) << other;
    auto second = bench;
    second.insert(second.end(), {path("new.json"), "--compare", path("other.json")});
    EXPECT_EQ(msa(second).status, factor > 1.0 ? 0 : 1);
  }

  // One case a thousand times slower is one too many, even where the mean is better.
  const std::vector<std::string> decode = {"bench",      "--filter", "SelectTopK m3.decode",
                                           "--min-time", "0",        "--json"};
  auto several = decode;
  several.push_back(path("old.json"));
  ASSERT_EQ(msa(several).status, 0);
  json = report("old.json");
  ASSERT_GE(json.at("rows").size(), 2u);
  for (std::size_t i = 0; i < json["rows"].size(); ++i) {
    auto& time = json["rows"][i]["time_ms"];
    time = time.get<double>() * (i == 0 ? 1e-3 : 1e6);
  }
  std::ofstream(path("other.json")) << json;
  several = decode;
  several.insert(several.end(), {path("new.json"), "--compare", path("other.json")});
  EXPECT_EQ(msa(several).status, 1);
  EXPECT_TRUE(has(msa({"bench", "--filter", "no such case"}).errors, "matches no case"));
}

TEST_F(Cli, RunContinuesAPromptWithBothAttentions) {
  const Result result =
      msa({"run", "--model", kModel, "--prompt", "The blocks of a query", "--max-tokens", "5",
           "--attention", "both", "--json", path("run.json")});
  ASSERT_EQ(result.status, 0) << result.errors;
  EXPECT_TRUE(has(result.output, "note: random weights"));
  const std::string last =
      result.output.substr(result.output.rfind('\n', result.output.size() - 2) + 1);
  const nlohmann::json json = report("run.json");
  expect_head(json, "msa.run/1");
  const auto prompt_tokens = json.at("prompt_tokens").get<int>();
  EXPECT_EQ(last.rfind("prefill " + std::to_string(prompt_tokens) + " tokens: MSA ", 0), 0u)
      << last;
  ASSERT_EQ(json.at("runs").size(), 2u);
  for (const auto& run : json.at("runs")) {
    EXPECT_EQ(run.at("tokens").size(), 5u);
    EXPECT_EQ(run.at("finish_reason"), "length");
    EXPECT_EQ(run.at("prefill").at("tokens"), prompt_tokens);
    EXPECT_EQ(run.at("decode").at("tokens"), 4);
    EXPECT_GT(run.at("peak_memory_bytes"), 0);
    for (const char* part : {"seconds", "indexer", "selection", "attention", "rest"}) {
      EXPECT_GE(run.at("prefill").at(part), 0.0) << part;
    }
  }
  // One block of context: everything is selected, so both must say the same.
  EXPECT_EQ(json["runs"][0]["tokens"], json["runs"][1]["tokens"]);
}

TEST_F(Cli, DryRunPrintsTheMemoryOfARun) {
  const Result result = msa({"run", "--model", kModel, "--dry-run", "--context", "131072",
                             "--attention", "both", "--json", path("dry.json")});
  ASSERT_EQ(result.status, 0) << result.errors;
  // 131072 tokens x 2 heads x 128 x 2 bytes in each of 2 layers
  EXPECT_TRUE(has(result.output, "2 sparse layers: K                   128.00 MiB"));
  EXPECT_TRUE(has(result.output, "working memory"));
  const nlohmann::json json = report("dry.json");
  expect_head(json, "msa.dry_run/1");
  ASSERT_EQ(json.at("plans").size(), 2u);
  const nlohmann::json& sparse = json.at("plans")[0];
  // Both are of the file: its tensors and, before them, the length and the header.
  std::ifstream file(kModel + "/model.safetensors", std::ios::binary);
  std::uint64_t header = 0;
  file.read(reinterpret_cast<char*>(&header), sizeof(header));
  EXPECT_EQ(sparse.at("weight_bytes"),
            std::filesystem::file_size(kModel + "/model.safetensors") - 8 - header);
  EXPECT_EQ(sparse.at("cache_bytes"), 131072 * 2 * (2 * 2 * 128 + 128) * 2);
  EXPECT_EQ(json.at("plans")[1].at("caches")[0].at("index_k_bytes"), 0);
  std::int64_t sum = 0;
  for (const auto& part : sparse.at("working")) sum += part.get<std::int64_t>();
  EXPECT_EQ(sparse.at("working_bytes"), sum);
  EXPECT_TRUE(
      has(msa({"run", "--model", kModel, "--dry-run"}).errors, "--dry-run needs --context"));
  EXPECT_GE(msa({"run", "--model", kModel, "--prompt", "a", "--context", "9"}).status, 100);
}

TEST_F(Cli, DryRunAgreesWithTheRun) {
  const std::vector<std::string> request = {
      "run",          "--model", kModel,           "--prompt", "The blocks of a query",
      "--max-tokens", "4",       "--fill-context", "5000",     "--json"};
  auto run = request;
  run.push_back(path("run.json"));
  const Result ran = msa(run);
  ASSERT_EQ(ran.status, 0) << ran.errors;
  EXPECT_TRUE(has(ran.output, "5000 tokens of random keys and values stand before the prompt"));
  auto dry = request;
  dry.insert(dry.end(), {path("dry.json"), "--dry-run"});
  ASSERT_EQ(msa(dry).status, 0);
  const nlohmann::json plan = report("dry.json").at("plans")[0];
  const nlohmann::json json = report("run.json");
  EXPECT_EQ(json.at("runs")[0].at("memory"), plan);
  EXPECT_EQ(json.at("runs")[0].at("cache_bytes"), plan.at("cache_bytes"));
  EXPECT_EQ(plan.at("context"), 5000 + json.at("prompt_tokens").get<int>() + 4);
  EXPECT_EQ(json.at("runs")[0].at("prefill").at("tokens"), json.at("prompt_tokens"));
  EXPECT_EQ(json.at("runs")[0].at("decode").at("tokens"), 3);
}

TEST_F(Cli, RunIsRepeatableForASeed) {
  const auto sample = [&](const std::string& seed) {
    const Result result =
        msa({"run", "--model", kModel, "--prompt", "a", "--max-tokens", "12", "--temperature", "1",
             "--top-p", "0.95", "--seed", seed, "--json", path("sample.json")});
    EXPECT_EQ(result.status, 0) << result.errors;
    return report("sample.json").at("runs")[0].at("tokens");
  };
  EXPECT_EQ(sample("1"), sample("1"));
  EXPECT_NE(sample("1"), sample("2"));
}

TEST_F(Cli, RunSaysWhatIsWrong) {
  EXPECT_TRUE(
      has(msa({"run", "--model", path("none"), "--prompt", "a"}).errors, "is no directory"));
  EXPECT_TRUE(has(msa({"run", "--model", kModel, "--prompt-file", path("none")}).errors,
                  "--prompt-file: can't read"));
  EXPECT_TRUE(
      has(msa({"run", "--model", kModel, "--prompt", ""}).errors, "the prompt has no tokens"));
  const Result context =
      msa({"run", "--model", kModel, "--prompt", "a", "--max-tokens", "2000000"});
  EXPECT_EQ(context.status, 1);
  EXPECT_TRUE(has(context.errors, "1048576"));
  const Result unwritable = msa({"info", "--json", path("no/such/folder.json")});
  EXPECT_EQ(unwritable.status, 1);
  EXPECT_TRUE(has(unwritable.errors, "can't write"));
}

TEST_F(Cli, CtrlCEndsCleanly) {
  std::ofstream(path("prompt")) << std::string(200000, 'x');  // minutes, were it not stopped
  const pid_t child = start(
      {"run", "--model", kModel, "--prompt-file", path("prompt"), "--json", path("run.json")});
  // The first line of progress, 5 s into the prefill on a free machine: a fixed sleep would race
  // with a slow start, before the handler is there.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(120);
  while (!has(read_file(path("err")), "prefill [") && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  kill(child, SIGINT);
  const Result result = finish(child);
  EXPECT_TRUE(has(result.errors, "prefill ["));
  EXPECT_EQ(result.status, 130) << result.output << result.errors;
  EXPECT_TRUE(has(result.output, "ended by cancelled"));
  EXPECT_EQ(report("run.json").at("runs")[0].at("finish_reason"), "cancelled");
}

}  // namespace
