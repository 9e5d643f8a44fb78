// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

void append_kv(const AppendKv& args) {
  const core::Sequences sequences(args);
  const std::int64_t block_size = args.problem.block_size;
  const auto append = [&](const TensorView& rows, const TensorView& pages) {
    if (!rows.given()) return;
    for (std::int64_t n = 0; n < sequences.size(); ++n) {
      const core::Sequence sequence = sequences[n];
      for (std::int64_t i = 0; i < sequence.q_len; ++i) {
        const std::int64_t p = sequence.position(i);
        if (p < 0) continue;
        const std::int64_t page = core::load_i32(args.batch.page_table, n, p / block_size);
        if (page < 0 || page >= pages.shape[0]) continue;
        for (std::int64_t head = 0; head < pages.shape[1]; ++head) {
          for (std::int64_t d = 0; d < pages.shape[3]; ++d) {
            core::store(pages, core::load(rows, sequence.q_begin + i, head, d), page, head,
                        p % block_size, d);
          }
        }
      }
    }
  };
  append(args.k, args.k_pages);
  append(args.v, args.v_pages);
  append(args.index_k, args.index_k_pages);
}

const detail::Implementation<AppendKv> kAppendKv = implementation<AppendKv>(
    "f64 f32 f16 bf16",
    [](const AppendKv& args, std::span<std::byte>, Stream) { append_kv(args); });

}  // namespace msa::reference
