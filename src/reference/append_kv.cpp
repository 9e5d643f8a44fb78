// SPDX-License-Identifier: Apache-2.0
#include "core/index_code.hpp"
#include "reference/support.hpp"

namespace msa::reference {
namespace {

/// The codes of the keys that were appended, from what is stored.
void encode(const AppendKv& args, const core::Sequences& sequences) {
  const TensorView& pages = args.index_k_pages;
  const std::int64_t block_size = args.problem.block_size;
  std::vector<double> key(static_cast<std::size_t>(args.problem.index_dim));
  std::vector<std::int8_t> codes(key.size());
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      const std::int64_t p = sequence.position(i);
      if (p < 0) continue;
      const std::int64_t page = core::load_i32(args.batch.page_table, n, p / block_size);
      if (page < 0 || page >= pages.shape[0]) continue;
      for (std::size_t d = 0; d < key.size(); ++d) {
        key[d] = core::load(pages, page, 0, p % block_size, d);
      }
      std::uint16_t scale_and_error[2];
      core::encode_index_key(reinterpret_cast<const std::byte*>(key.data()), DType::f64,
                             args.problem.index_dim, codes.data(), scale_and_error);
      for (std::size_t d = 0; d < key.size(); ++d) {
        core::store_i8(args.index_k_codes_pages, codes[d], page, 0, p % block_size, d);
      }
      for (int part = 0; part < 2; ++part) {
        core::store(args.index_k_scales_pages,
                    static_cast<double>(core::bf16_to_f32(scale_and_error[part])), page, 0,
                    p % block_size, part);
      }
    }
  }
}

}  // namespace

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
  if (args.index_k_codes_pages.given()) encode(args, sequences);
}

const detail::Implementation<AppendKv> kAppendKv = implementation<AppendKv>(
    "f64 f32 f16 bf16",
    [](const AppendKv& args, std::span<std::byte>, Stream) { append_kv(args); });

}  // namespace msa::reference
