// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <vector>

#include "core/check.hpp"
#include "model/config.hpp"
#include "model/generate.hpp"
#include "model/tokenizer.hpp"
#include "model/transformer.hpp"
#include "model/weights.hpp"
#include "tools/cli.hpp"
#include "tools/progress.hpp"

namespace msa::tools {
namespace {

struct RunOptions {
  std::string model;
  std::string prompt;
  std::string prompt_file;
  std::int64_t max_tokens = 128;
  std::int64_t max_prompt_tokens = 0;
  std::string attention = "msa";
  std::string cache_dtype;
  std::int64_t chunk_tokens = 512;
  double temperature = 0.0;
  double top_p = 1.0;
  std::int64_t top_k = 0;
  std::uint64_t seed = 0;
  bool quiet = false;
  std::string json;
};

std::string read_prompt(const RunOptions& options) {
  if (options.prompt_file.empty()) return options.prompt;
  std::ifstream file(options.prompt_file, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  MSA_CHECK(file.good() && !std::filesystem::is_directory(options.prompt_file),
            "--prompt-file: can't read ", options.prompt_file);
  return text.str();
}

Json phase_report(const model::PhaseTimes& times) {
  return {
      {"tokens", times.tokens},
      {"seconds", times.total},
      {"tokens_per_s", times.total > 0.0 ? static_cast<double>(times.tokens) / times.total : 0.0},
      {"indexer", times.indexer},
      {"selection", times.selection},
      {"attention", times.attention},
      {"rest", times.rest()}};
}

void print_phase(const char* name, const Json& phase) {
  const auto tokens = phase["tokens"].get<long long>();
  if (tokens == 0) return;
  const double seconds = phase["seconds"].get<double>();
  std::printf("  %-8s %7lld tokens  %9.3f s  %9.1f tokens/s  ", name, tokens, seconds,
              phase["tokens_per_s"].get<double>());
  for (const char* part : {"indexer", "selection", "attention", "rest"}) {
    std::printf(" %s %.1f%%", part, 100.0 * phase[part].get<double>() / seconds);
  }
  std::printf("\n");
}

/// Prints tokens as text while they come, whole characters only.
class TextPrinter {
 public:
  TextPrinter(const model::Tokenizer& tokenizer, bool quiet) : decoder_(tokenizer), quiet_(quiet) {}

  void add(std::int32_t id) { print(decoder_.push(id)); }
  std::string finish() {
    print(decoder_.finish());
    if (!quiet_) std::printf("\n");
    return text_;
  }

 private:
  void print(const std::string& piece) {
    text_ += piece;
    if (quiet_) return;
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  }

  model::StreamDecoder decoder_;
  bool quiet_;
  std::string text_;
};

DType cache_dtype_of(const std::string& name) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw Error(ErrorCode::invalid_argument, core::concat("--cache-dtype is '", name, "'"));
}

Json run_once(const RunOptions& options, const std::string& attention, const model::Config& config,
              const model::Tokenizer& tokenizer, const std::vector<std::int32_t>& prompt) {
  model::RuntimeOptions runtime{
      .max_context = static_cast<std::int64_t>(prompt.size()) + options.max_tokens,
      .chunk_tokens = options.chunk_tokens,
      .attention = attention == "dense" ? model::AttentionMode::dense : model::AttentionMode::msa};
  if (!options.cache_dtype.empty()) runtime.cache_dtype = cache_dtype_of(options.cache_dtype);
  model::Transformer transformer(config, model::load_weights(options.model, config), runtime);

  const std::string label = attention + " prefill";
  auto progress = std::make_unique<Progress>(label, options.quiet);
  TextPrinter printer(tokenizer, options.quiet);
  const model::GenerateResult result =
      model::generate(transformer, prompt,
                      {.max_tokens = options.max_tokens,
                       .sampling = {.temperature = options.temperature,
                                    .top_p = options.top_p,
                                    .top_k = options.top_k,
                                    .seed = options.seed},
                       .eos_token_ids = config.eos_token_ids,
                       .cancel = &cancelled,
                       .on_prefill_progress =
                           [&](std::int64_t done, std::int64_t total) {
                             progress->update(done, total);
                             if (done == total) progress.reset();
                           },
                       .on_token = [&](std::int32_t id) { printer.add(id); }});
  progress.reset();
  const std::string text = printer.finish();
  Json run = {{"attention", attention},
              {"finish_reason", model::name_of(result.finish_reason)},
              {"tokens", result.tokens},
              {"text", text},
              {"prefill", phase_report(result.timings.prefill)},
              {"decode", phase_report(result.timings.decode)},
              {"peak_memory_bytes", result.peak_memory_bytes}};
  std::printf("\n%s attention, %lld prompt tokens, ended by %s\n", attention.c_str(),
              static_cast<long long>(prompt.size()),
              run["finish_reason"].get<std::string>().c_str());
  print_phase("prefill", run["prefill"]);
  print_phase("decode", run["decode"]);
  std::printf("  peak memory %s\n\n",
              bytes_text(static_cast<double>(result.peak_memory_bytes)).c_str());
  std::fflush(stdout);
  return run;
}

int run_model(const RunOptions& options) {
  const model::Config config = model::load_config(options.model);
  const auto tokenizer =
      model::Tokenizer::load(std::filesystem::path(options.model) / "tokenizer.json");
  std::vector<std::int32_t> prompt = tokenizer.encode(read_prompt(options));
  MSA_CHECK(!prompt.empty(), "the prompt has no tokens");
  if (options.max_prompt_tokens > 0) {
    prompt.resize(std::min(prompt.size(), static_cast<std::size_t>(options.max_prompt_tokens)));
  }
  if (!config.note.empty()) std::printf("note: %s\n\n", config.note.c_str());

  Json report = report_head("msa.run/1");
  report["model"] = options.model;
  report["prompt_tokens"] = prompt.size();
  report["max_tokens"] = options.max_tokens;
  report["seed"] = options.seed;
  report["runs"] = Json::array();
  const std::vector<std::string> modes = options.attention == "both"
                                             ? std::vector<std::string>{"msa", "dense"}
                                             : std::vector<std::string>{options.attention};
  for (const std::string& mode : modes) {
    if (cancelled && !report["runs"].empty()) break;  // the first says itself that it was cancelled
    report["runs"].push_back(run_once(options, mode, config, tokenizer, prompt));
  }
  write_report(options.json, report);
  if (cancelled) return kExitCancelled;
  if (report["runs"].size() == 2) {
    const double msa_s = report["runs"][0]["prefill"]["seconds"].get<double>();
    const double dense_s = report["runs"][1]["prefill"]["seconds"].get<double>();
    std::printf("prefill %zu tokens: MSA %.1f s, dense %.1f s, %.1fx\n", prompt.size(), msa_s,
                dense_s, dense_s / msa_s);
  }
  return 0;
}

}  // namespace

void add_run(CLI::App& app, int& status) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command =
      app.add_subcommand("run", "Continue a prompt with a MiniMax-M3 checkpoint on the CPU");
  command->add_option("--model", options->model, "Hugging Face directory of the checkpoint")
      ->required();
  auto* prompt = command->add_option_group("prompt")->require_option(1);
  prompt->add_option("--prompt", options->prompt, "The prompt itself");
  prompt->add_option("--prompt-file", options->prompt_file, "A file with the prompt, UTF-8");
  command->add_option("--max-tokens", options->max_tokens, "Tokens to generate at most")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{1} << 30))
      ->capture_default_str();
  command
      ->add_option("--max-prompt-tokens", options->max_prompt_tokens,
                   "Cut the prompt after this many tokens; 0: keep all")
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--attention", options->attention,
                   "msa: as the model says; dense: every layer dense; both: one after the other")
      ->check(CLI::IsMember({"msa", "dense", "both"}))
      ->capture_default_str();
  command
      ->add_option("--cache-dtype", options->cache_dtype,
                   "KV cache; default: f32 for f32 weights, else bf16")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  command
      ->add_option("--chunk-tokens", options->chunk_tokens,
                   "Prompt tokens that pass through the layers together")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{65536}))
      ->capture_default_str();
  command->add_option("--temperature", options->temperature, "0: greedy")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command->add_option("--top-p", options->top_p, "Nucleus sampling: probability mass to keep")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--top-k", options->top_k, "Likeliest tokens to keep; 0: all")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--seed", options->seed, "Of the sampler")->capture_default_str();
  command->add_flag("--quiet", options->quiet, "No progress and no text, only the summary");
  command->add_option("--json", options->json, "Write the report to this file (schema msa.run/1)");
  command->footer(
      "Examples:\n"
      "  msa run --model examples/tiny_m3 --prompt \"Once upon a time\" --max-tokens 32\n"
      "  msa run --model DIR --prompt-file book.txt --attention both --json run.json");
  command->callback([options, &status] { status = run_model(*options); });
}

}  // namespace msa::tools
