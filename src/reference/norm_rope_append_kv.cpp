// SPDX-License-Identifier: Apache-2.0
#include "core/norm_rope.hpp"
#include "reference/support.hpp"

namespace msa::reference {

const detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv = implementation<NormRopeAppendKv>(
    "f32 f16 bf16 e4m3", [](const NormRopeAppendKv& args, std::span<std::byte>, Stream) {
      const core::Sequences sequences(args);
      core::NormRopeScratch scratch(args);
      for (std::int64_t token = 0; token < core::total_q(args); ++token) {
        core::norm_rope_append(args, sequences, token, scratch);
      }
    });

}  // namespace msa::reference
