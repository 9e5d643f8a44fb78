// SPDX-License-Identifier: Apache-2.0
//
// Feeds given token ids to a checkpoint: a prompt, then the rest one token at a time. Writes the
// times to stdout as JSON and all logits to a file, so that bench/llama_cpp.py can compare two
// programs on the same tokens. `msa run` is the same model with a tokenizer and a sampler.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "model/config.hpp"
#include "model/generate.hpp"
#include "model/transformer.hpp"
#include "model/weights.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Options {
  std::string model, ids, logits, cache_dtype = "bf16";
  std::int64_t prefill = 0;
  std::int64_t chunk_tokens = 512;
};

std::vector<std::int32_t> read_ids(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  MSA_CHECK(file.good(), "--ids: can't read ", path);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(file.tellg()) / sizeof(std::int32_t));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(ids.data()),
            static_cast<std::streamsize>(ids.size() * sizeof(std::int32_t)));
  return ids;
}

msa::DType dtype_of(const std::string& name) {
  for (msa::DType dtype : {msa::DType::f32, msa::DType::f16, msa::DType::bf16}) {
    if (name == msa::name_of(dtype)) return dtype;
  }
  throw msa::Error(msa::ErrorCode::invalid_argument, "--cache-dtype is '" + name + "'");
}

nlohmann::json phase(const msa::model::PhaseTimes& times) {
  return {{"indexer", times.indexer},     {"selection", times.selection},
          {"attention", times.attention}, {"rest", times.rest()},
          {"seconds", times.total},       {"tokens", times.tokens}};
}

void run(const Options& options) {
  const std::vector<std::int32_t> ids = read_ids(options.ids);
  const auto total = static_cast<std::int64_t>(ids.size());
  MSA_CHECK(options.prefill >= 1 && options.prefill <= total, "--prefill is ", options.prefill,
            ", expected 1 to ", total, ", the tokens in ", options.ids);
  const msa::model::Config config = msa::model::load_config(options.model);
  msa::model::Transformer model(config, msa::model::load_weights(options.model, config),
                                {.max_context = total,
                                 .chunk_tokens = options.chunk_tokens,
                                 .cache_dtype = dtype_of(options.cache_dtype)});
  // Threads, pages of the weights and the first plans, as llama.cpp's own warm-up run does.
  model.forward(std::span(ids).first(static_cast<std::size_t>(std::min<std::int64_t>(total, 512))));
  model.reset();

  std::ofstream logits;
  if (!options.logits.empty()) logits.open(options.logits, std::ios::binary);
  const auto keep = [&](const msa::model::ForwardResult& result) {
    logits.write(reinterpret_cast<const char*>(result.logits.data()),
                 static_cast<std::streamsize>(result.logits.size_bytes()));
  };
  nlohmann::json report = {{"prefill", nlohmann::json::array()},
                           {"decode", nlohmann::json::array()}};
  const auto start = Clock::now();
  keep(model.forward(std::span(ids).first(static_cast<std::size_t>(options.prefill)),
                     {.on_chunk = [&](std::int64_t done, std::int64_t) {
                       report["prefill"].push_back(
                           {{"tokens", done}, {"seconds", seconds_since(start)}});
                     }}));
  // Where one chunk is all, on_chunk came before the logits.
  report["prefill"].back()["seconds"] = seconds_since(start);
  for (std::int64_t i = options.prefill; i < total; ++i) {
    const auto token_start = Clock::now();
    const auto result = model.forward(std::span(ids).subspan(static_cast<std::size_t>(i), 1));
    report["decode"].push_back(seconds_since(token_start));
    keep(result);
  }
  report["parts"] = {{"prefill", phase(model.timings().prefill)},
                     {"decode", phase(model.timings().decode)}};
  report["peak_memory_bytes"] = msa::model::peak_memory_bytes();
  std::printf("%s\n", report.dump().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Time a checkpoint on token ids");
  Options options;
  app.add_option("--model", options.model, "Hugging Face directory of the checkpoint")->required();
  app.add_option("--ids", options.ids, "File of i32 token ids")->required();
  app.add_option("--prefill", options.prefill, "Ids that are the prompt; the rest is decoded")
      ->required();
  app.add_option("--cache-dtype", options.cache_dtype, "f32, f16 or bf16")->capture_default_str();
  app.add_option("--chunk-tokens", options.chunk_tokens,
                 "Prompt tokens that pass through the layers together")
      ->capture_default_str();
  app.add_option("--logits", options.logits, "File for the f32 logits: [1 + decoded, vocab]");
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_tokens: %s\n", error.what());
    return 1;
  }
  return 0;
}
