// SPDX-License-Identifier: Apache-2.0
#include "model/generate.hpp"

#include <sys/resource.h>

#include <algorithm>

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
  MSA_CHECK(options.max_tokens <= model.max_context() - prompt_tokens, "generate: ", prompt_tokens,
            " prompt tokens and max_tokens ", options.max_tokens, " need a context of ",
            prompt_tokens + options.max_tokens, ", but max_context is ", model.max_context(),
            " (the model's max_position_embeddings is ", model.config().max_position_embeddings,
            ")");
  model.reset();
  GenerateResult result{.prompt_tokens = prompt_tokens};
  result.finish_reason = continue_text(model, prompt, options, result.tokens);
  result.timings = model.timings();
  result.peak_memory_bytes = peak_memory_bytes();
  return result;
}

std::int64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace msa::model
