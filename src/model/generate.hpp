// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "model/sampler.hpp"
#include "model/transformer.hpp"

namespace msa::model {

struct GenerateOptions {
  std::int64_t max_tokens = 128;
  /// Tokens of random keys and values to put before the prompt (Transformer::fill_context): what is
  /// written then means nothing, but takes the time and memory of a long context.
  std::int64_t fill_context = 0;
  SamplingOptions sampling{};
  std::vector<std::int64_t> eos_token_ids{};  ///< Any of these ends the text.
  const std::atomic<bool>* cancel = nullptr;  ///< Set it (from a signal handler, say) to stop.
  std::function<void(std::int64_t done, std::int64_t total)> on_fill_progress{};     ///< In tokens.
  std::function<void(std::int64_t done, std::int64_t total)> on_prefill_progress{};  ///< In tokens.
  std::function<void(std::int32_t id)> on_token{};  ///< As each is drawn; not for the end token.
};

enum class FinishReason : std::uint8_t { eos, length, cancelled };

/// "eos", "length" or "cancelled"
const char* name_of(FinishReason reason);

struct GenerateResult {
  std::vector<std::int32_t> tokens{};  ///< Without the end token.
  FinishReason finish_reason = FinishReason::length;
  std::int64_t prompt_tokens = 0;
  Timings timings{};                   ///< Of this call.
  std::int64_t cache_bytes = 0;        ///< Pages of the caches in use at the end.
  std::int64_t peak_memory_bytes = 0;  ///< Largest resident size of the process so far.
};

/// Runs the prompt through the model, whose context is forgotten first, and continues it. Throws
/// Error(invalid_argument) before computing where prompt and max_tokens exceed the context.
GenerateResult generate(Transformer& model, std::span<const std::int32_t> prompt,
                        const GenerateOptions& options = {});

/// Largest resident size of this process so far.
std::int64_t peak_memory_bytes();

}  // namespace msa::model
