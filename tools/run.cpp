// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "model/config.hpp"
#include "model/generate.hpp"
#include "model/memory.hpp"
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
  std::int64_t fill_context = 0;
  std::int64_t context = 0;
  bool dry_run = false;
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

Json memory_report(const model::MemoryPlan& plan, const std::string& attention) {
  Json caches = Json::array();
  for (const model::CacheMemory& cache : plan.caches) {
    caches.push_back({{"layers", cache.kind == model::AttentionKind::sparse ? "sparse" : "dense"},
                      {"num_layers", cache.num_layers},
                      {"k_bytes", cache.k},
                      {"v_bytes", cache.v},
                      {"index_k_bytes", cache.index_k}});
  }
  const model::WorkingMemory& working = plan.working;
  return {{"attention", attention},
          {"context", plan.max_context},
          {"chunk_tokens", plan.chunk_tokens},
          {"cache_dtype", name_of(plan.cache_dtype)},
          {"weight_bytes", plan.weights},
          {"caches", caches},
          {"cache_bytes", plan.cache_total()},
          {"working",
           {{"activation_bytes", working.activations},
            {"block_score_bytes", working.block_scores},
            {"expanded_weight_bytes", working.expanded_weights},
            {"workspace_bytes", working.workspaces},
            {"table_bytes", working.tables}}},
          {"working_bytes", working.total()}};
}

void print_mib(const char* indent, const std::string& name, const Json& bytes) {
  std::printf("%s%-*s %12.2f MiB\n", indent, 34 - static_cast<int>(std::strlen(indent)),
              name.c_str(), bytes.get<double>() / (1 << 20));
}

void print_memory(const Json& plan) {
  std::printf("%s attention, %lld tokens of context, chunks of %lld\n",
              plan["attention"].get<std::string>().c_str(), plan["context"].get<long long>(),
              plan["chunk_tokens"].get<long long>());
  print_mib("  ", "weights, mapped from their files", plan["weight_bytes"]);
  print_mib("  ", "caches in " + plan["cache_dtype"].get<std::string>(), plan["cache_bytes"]);
  for (const Json& cache : plan["caches"]) {
    const auto num_layers = cache["num_layers"].get<long long>();
    const std::string layers = core::concat(num_layers, " ", cache["layers"].get<std::string>(),
                                            num_layers == 1 ? " layer: " : " layers: ");
    print_mib("    ", layers + "K", cache["k_bytes"]);
    print_mib("    ", layers + "V", cache["v_bytes"]);
    print_mib("    ", layers + "index K", cache["index_k_bytes"]);
  }
  print_mib("  ", "working memory", plan["working_bytes"]);
  const Json& working = plan["working"];
  print_mib("    ", "activations of a chunk", working["activation_bytes"]);
  print_mib("    ", "block scores", working["block_score_bytes"]);
  print_mib("    ", "expanded weights", working["expanded_weight_bytes"]);
  print_mib("    ", "workspaces", working["workspace_bytes"]);
  print_mib("    ", "tables", working["table_bytes"]);
  print_mib("  ", "total",
            plan["weight_bytes"].get<double>() + plan["cache_bytes"].get<double>() +
                plan["working_bytes"].get<double>());
  std::printf("\n");
}

model::RuntimeOptions runtime_options(const RunOptions& options, const std::string& attention,
                                      std::int64_t max_context) {
  model::RuntimeOptions runtime{
      .max_context = max_context,
      .chunk_tokens = options.chunk_tokens,
      .attention = attention == "dense" ? model::AttentionMode::dense : model::AttentionMode::msa};
  if (!options.cache_dtype.empty()) runtime.cache_dtype = cache_dtype_of(options.cache_dtype);
  return runtime;
}

Json run_once(const RunOptions& options, const std::string& attention, const model::Config& config,
              const model::Tokenizer& tokenizer, const std::vector<std::int32_t>& prompt) {
  const model::RuntimeOptions runtime = runtime_options(
      options, attention,
      options.fill_context + static_cast<std::int64_t>(prompt.size()) + options.max_tokens);
  model::Weights weights = model::load_weights(options.model, config);
  const Json memory = memory_report(model::plan_memory(config, weights, runtime), attention);
  model::Transformer transformer(config, std::move(weights), runtime);

  auto filling = std::make_unique<Progress>(attention + " filling the cache", options.quiet);
  auto progress = std::make_unique<Progress>(attention + " prefill", options.quiet);
  TextPrinter printer(tokenizer, options.quiet);
  const model::GenerateResult result =
      model::generate(transformer, prompt,
                      {.max_tokens = options.max_tokens,
                       .fill_context = options.fill_context,
                       .sampling = {.temperature = options.temperature,
                                    .top_p = options.top_p,
                                    .top_k = options.top_k,
                                    .seed = options.seed},
                       .eos_token_ids = config.eos_token_ids,
                       .cancel = &cancelled,
                       .on_fill_progress =
                           [&](std::int64_t done, std::int64_t total) {
                             filling->update(done, total);
                             if (done == total) filling.reset();
                           },
                       .on_prefill_progress =
                           [&](std::int64_t done, std::int64_t total) {
                             progress->update(done, total);
                             if (done == total) progress.reset();
                           },
                       .on_token = [&](std::int32_t id) { printer.add(id); }});
  filling.reset();
  progress.reset();
  const std::string text = printer.finish();
  Json run = {{"attention", attention},
              {"finish_reason", model::name_of(result.finish_reason)},
              {"tokens", result.tokens},
              {"text", text},
              {"prefill", phase_report(result.timings.prefill)},
              {"decode", phase_report(result.timings.decode)},
              {"memory", memory},
              {"cache_bytes", result.cache_bytes},
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

std::vector<std::string> modes_of(const RunOptions& options) {
  if (options.attention == "both") return {"msa", "dense"};
  return {options.attention};
}

model::Tokenizer load_tokenizer(const RunOptions& options) {
  return model::Tokenizer::load(std::filesystem::path(options.model) / "tokenizer.json");
}

std::vector<std::int32_t> prompt_tokens(const RunOptions& options,
                                        const model::Tokenizer& tokenizer) {
  std::vector<std::int32_t> prompt = tokenizer.encode(read_prompt(options));
  MSA_CHECK(!prompt.empty(), "the prompt has no tokens");
  if (options.max_prompt_tokens > 0) {
    prompt.resize(std::min(prompt.size(), static_cast<std::size_t>(options.max_prompt_tokens)));
  }
  return prompt;
}

/// Tokens of context that the run would provide for.
std::int64_t context_of(const RunOptions& options) {
  if (options.context > 0) return options.context;
  std::int64_t prompt = options.max_prompt_tokens;
  if (!options.prompt.empty() || !options.prompt_file.empty()) {
    prompt = static_cast<std::int64_t>(prompt_tokens(options, load_tokenizer(options)).size());
  }
  MSA_CHECK(prompt > 0,
            "--dry-run needs --context, --max-prompt-tokens or a prompt: how long is the context?");
  return options.fill_context + prompt + options.max_tokens;
}

int dry_run(const RunOptions& options) {
  const model::Config config = model::load_config(options.model);
  // Maps the files and reads their headers; no weight is read.
  const model::Weights weights = model::load_weights(options.model, config);
  const std::int64_t context = context_of(options);
  Json report = report_head("msa.dry_run/1");
  report["model"] = options.model;
  report["plans"] = Json::array();
  for (const std::string& mode : modes_of(options)) {
    report["plans"].push_back(memory_report(
        model::plan_memory(config, weights, runtime_options(options, mode, context)), mode));
    print_memory(report["plans"].back());
  }
  write_report(options.json, report);
  return 0;
}

int run_model(const RunOptions& options) {
  const model::Config config = model::load_config(options.model);
  const model::Tokenizer tokenizer = load_tokenizer(options);
  const std::vector<std::int32_t> prompt = prompt_tokens(options, tokenizer);
  if (!config.note.empty()) std::printf("note: %s\n\n", config.note.c_str());
  if (options.fill_context > 0) {
    std::printf("note: %lld tokens of random keys and values stand before the prompt\n\n",
                static_cast<long long>(options.fill_context));
  }

  Json report = report_head("msa.run/1");
  report["model"] = options.model;
  report["prompt_tokens"] = prompt.size();
  report["fill_context"] = options.fill_context;
  report["max_tokens"] = options.max_tokens;
  report["seed"] = options.seed;
  report["runs"] = Json::array();
  for (const std::string& mode : modes_of(options)) {
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
  auto* prompt = command->add_option_group("prompt")->require_option(0, 1);
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
      ->add_option("--fill-context", options->fill_context,
                   "For timing: put this many tokens of random keys and values before the prompt")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{1} << 30));
  auto* dry = command->add_flag("--dry-run", options->dry_run,
                                "Print the memory that the run would take, and end");
  command
      ->add_option("--context", options->context,
                   "With --dry-run: tokens of context; default: --fill-context, the prompt "
                   "(--max-prompt-tokens where no prompt is given) and --max-tokens")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 30))
      ->needs(dry);
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
      "  msa run --model DIR --prompt-file book.txt --attention both --json run.json\n"
      "  msa run --model DIR --dry-run --context 131072");
  command->callback([options, prompt, &status] {
    if (!options->dry_run && prompt->count_all() == 0) {
      throw CLI::RequiredError("--prompt or --prompt-file");
    }
    status = options->dry_run ? dry_run(*options) : run_model(*options);
  });
}

}  // namespace msa::tools
