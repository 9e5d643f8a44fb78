// SPDX-License-Identifier: Apache-2.0
#include "model/generate.hpp"

#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "core/check.hpp"

namespace msa::model {
namespace {

FinishReason continue_text(Transformer& model, std::span<const std::int32_t> prompt,
                           const GenerateOptions& options, std::vector<std::int32_t>& tokens) {
  Sampler sampler(options.sampling);
  ForwardOptions forward{.cancel = options.cancel, .on_chunk = options.on_prefill_progress};
  ForwardResult result = model.forward(prompt, forward);
  forward.on_chunk = nullptr;
  for (;;) {
    if (result.cancelled || (options.cancel != nullptr && options.cancel->load())) {
      return FinishReason::cancelled;
    }
    const std::int32_t id = sampler.sample(result.logits);
    if (std::find(options.eos_token_ids.begin(), options.eos_token_ids.end(), id) !=
        options.eos_token_ids.end()) {
      return FinishReason::eos;
    }
    tokens.push_back(id);
    if (options.on_token) options.on_token(id);
    if (static_cast<std::int64_t>(tokens.size()) == options.max_tokens) return FinishReason::length;
    result = model.forward({&id, 1}, forward);
  }
}

}  // namespace

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::eos:
      return "eos";
    case FinishReason::length:
      return "length";
    case FinishReason::cancelled:
      return "cancelled";
  }
  return "unknown";
}

GenerateResult generate(Transformer& model, std::span<const std::int32_t> prompt,
                        const GenerateOptions& options) {
  const auto prompt_tokens = static_cast<std::int64_t>(prompt.size());
  MSA_CHECK(prompt_tokens > 0, "generate: the prompt has no tokens");
  MSA_CHECK(options.max_tokens >= 1, "generate: max_tokens is ", options.max_tokens,
            ", expected >= 1");
  MSA_CHECK(options.fill_context >= 0, "generate: fill_context is ", options.fill_context,
            ", expected >= 0");
  const std::int64_t before = options.fill_context + prompt_tokens;
  MSA_CHECK(options.max_tokens <= model.max_context() - before, "generate: ", before,
            " prompt tokens and max_tokens ", options.max_tokens, " need a context of ",
            before + options.max_tokens, ", but max_context is ", model.max_context(),
            " (the model's max_position_embeddings is ", model.config().max_position_embeddings,
            ")");
  model.reset();
  model.fill_context(options.fill_context, options.sampling.seed, options.on_fill_progress);
  GenerateResult result{.prompt_tokens = prompt_tokens};
  result.finish_reason = continue_text(model, prompt, options, result.tokens);
  result.timings = model.timings();
  result.cache_bytes = model.cache().bytes_in_use();
  result.peak_memory_bytes = peak_memory_bytes();
  return result;
}

std::int64_t peak_memory_bytes() {
  // VmHWM is of this program; ru_maxrss also of the one that started it, before its exec.
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    std::int64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib * 1024;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace msa::model
