// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <memory>

#include "core/check.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "msa/backend.hpp"
#include "tools/cli.hpp"

namespace msa::tools {
namespace {

struct InfoOptions {
  std::string model;
  std::string json;
};

template <class Kind>
std::int64_t count_of(const std::vector<Kind>& kinds, Kind kind) {
  return std::count(kinds.begin(), kinds.end(), kind);
}

/// K, V and, in sparse layers, index K of one token in all layers, in bf16.
std::int64_t cache_bytes_per_token(const model::Config& config) {
  const Problem& problem = config.attention;
  const std::int64_t kv = std::int64_t{2} * problem.num_kv_heads * problem.head_dim;
  const std::int64_t sparse = count_of(config.attention_kinds, model::AttentionKind::sparse);
  return 2 * (config.num_layers * kv + sparse * problem.index_dim);
}

Json model_report(const std::string& directory) {
  const model::Config config = model::load_config(directory);
  const model::Weights weights = model::load_weights(directory, config);
  const Problem& problem = config.attention;
  return {{"directory", directory},
          {"model_type", config.model_type},
          {"tensor_names", weights.naming},
          {"unused_tensors", weights.unused},
          {"num_parameters", weights.num_parameters},
          {"weight_bytes", weights.num_bytes},
          {"hidden_size", config.hidden_size},
          {"vocab_size", config.vocab_size},
          {"num_layers", config.num_layers},
          {"num_sparse_layers", count_of(config.attention_kinds, model::AttentionKind::sparse)},
          {"num_moe_layers", count_of(config.mlp_kinds, model::MlpKind::moe)},
          {"num_experts", config.num_experts},
          {"num_experts_per_token", config.num_experts_per_token},
          {"num_q_heads", problem.num_q_heads},
          {"num_kv_heads", problem.num_kv_heads},
          {"head_dim", problem.head_dim},
          {"index_dim", problem.index_dim},
          {"block_size", problem.block_size},
          {"top_k", problem.top_k},
          {"num_init_blocks", problem.num_init_blocks},
          {"num_local_blocks", problem.num_local_blocks},
          {"max_context", config.max_position_embeddings},
          {"cache_bytes_per_token_bf16", cache_bytes_per_token(config)}};
}

void print_model(const Json& m) {
  std::printf("\nmodel %s (%s, %s tensor names)\n", m["directory"].get<std::string>().c_str(),
              m["model_type"].get<std::string>().c_str(),
              m["tensor_names"].get<std::string>().c_str());
  const auto number = [&](const char* key) { return m[key].get<long long>(); };
  std::printf("  %lld parameters, %s of weights\n", number("num_parameters"),
              bytes_text(m["weight_bytes"].get<double>()).c_str());
  for (const Json& name : m["unused_tensors"]) {
    std::printf("  not used: tensor %s\n", name.get<std::string>().c_str());
  }
  std::printf("  %lld layers (%lld sparse attention, %lld MoE), hidden %lld, vocabulary %lld\n",
              number("num_layers"), number("num_sparse_layers"), number("num_moe_layers"),
              number("hidden_size"), number("vocab_size"));
  std::printf("  %lld query / %lld KV heads of %lld; index keys of %lld\n", number("num_q_heads"),
              number("num_kv_heads"), number("head_dim"), number("index_dim"));
  std::printf(
      "  top %lld of %lld-token blocks (%lld init, %lld local); context up to %lld tokens\n",
      number("top_k"), number("block_size"), number("num_init_blocks"), number("num_local_blocks"),
      number("max_context"));
  std::printf("  bf16 cache: %s at 32K tokens, %s at 128K, %s at 1M\n",
              bytes_text(m["cache_bytes_per_token_bf16"].get<double>() * 32768).c_str(),
              bytes_text(m["cache_bytes_per_token_bf16"].get<double>() * 131072).c_str(),
              bytes_text(m["cache_bytes_per_token_bf16"].get<double>() * 1048576).c_str());
}

void run_info(const InfoOptions& options) {
  Json report = report_head("msa.info/1");
  std::printf("msa %s on %s\n\nbackends, best first\n", version(), device_text().c_str());
  for (const BackendInfo& backend : backends()) {
    std::printf("  %-13s %-4s %s\n", backend.name, backend.available ? "yes" : "no",
                backend.detail.c_str());
    report["backends"].push_back(
        {{"name", backend.name}, {"available", backend.available}, {"detail", backend.detail}});
  }
  std::printf("\nimplementations, in the order in which plan() asks them\n");
  for (const ImplementationInfo& row : implementations()) {
    std::printf("  %-24s %-13s %s\n", row.operation, row.implementation, row.dtypes);
    report["implementations"].push_back({{"operation", row.operation},
                                         {"implementation", row.implementation},
                                         {"dtypes", row.dtypes}});
  }
  if (!options.model.empty()) {
    report["model"] = model_report(options.model);
    print_model(report["model"]);
  }
  write_report(options.json, report);
}

}  // namespace

void add_info(CLI::App& app, int& status) {
  auto options = std::make_shared<InfoOptions>();
  CLI::App* command =
      app.add_subcommand("info", "Show backends, implementations and, if asked, a checkpoint");
  command->add_option("--model", options->model,
                      "Hugging Face directory of a MiniMax-M3 checkpoint");
  command->add_option("--json", options->json, "Write the report to this file (schema msa.info/1)");
  command->footer("Examples:\n  msa info\n  msa info --model examples/tiny_m3 --json info.json");
  command->callback([options, &status] {
    run_info(*options);
    status = 0;
  });
}

}  // namespace msa::tools
