// SPDX-License-Identifier: Apache-2.0
#include "core/norm_rope.hpp"
#include "cpu/support.hpp"

namespace msa::cpu {

// The contract fixes every rounding, so this is the reference's arithmetic on all threads.
const detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16 e4m3",
    .declines = [](const NormRopeAppendKv& args, const Options&) -> std::optional<std::string> {
      const Device device = args.batch.page_table.device;
      if (device.type == DeviceType::cpu) return std::nullopt;
      return core::concat("tensors are on cuda:", device.index);
    },
    .workspace_bytes = [](const NormRopeAppendKv&) -> std::size_t { return 0; },
    .run =
        [](const NormRopeAppendKv& args, std::span<std::byte>, Stream) {
          const core::Sequences sequences(args);
          const std::int64_t tokens = core::total_q(args);
          constexpr std::int64_t kTokens = 8;
          core::parallel_for(core::ceil_div(tokens, kTokens), [&](std::int64_t task, int) {
            core::NormRopeScratch scratch(args);
            const std::int64_t end = std::min((task + 1) * kTokens, tokens);
            for (std::int64_t token = task * kTokens; token < end; ++token) {
              core::norm_rope_append(args, sequences, token, scratch);
            }
          });
        }};

}  // namespace msa::cpu
