// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "core/index_code.hpp"
#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/support.hpp"

namespace msa::cpu {
namespace {

/// One token of one head, converted to the dtype of the pages.
void copy_row(const TensorView& rows, std::int64_t from, const TensorView& pages, std::int64_t to,
              std::int64_t dim) {
  const std::byte* source = core::address_at(rows, from);
  std::byte* target = core::address_at(pages, to);
  if (rows.dtype == pages.dtype) {
    std::memcpy(target, source, static_cast<std::size_t>(dim) * size_of(rows.dtype));
    return;
  }
  const std::size_t source_size = size_of(rows.dtype);
  const std::size_t target_size = size_of(pages.dtype);
  if (rows.dtype == DType::f32 && pages.dtype == DType::bf16) {
    for (std::int64_t d = 0; d < dim; ++d) {
      float value = 0.0f;
      std::memcpy(&value, source + d * 4, sizeof(value));
      const std::uint16_t bits = core::f32_to_bf16(value);
      std::memcpy(target + d * 2, &bits, sizeof(bits));
    }
    return;
  }
  for (std::int64_t d = 0; d < dim; ++d, source += source_size, target += target_size) {
    core::store_element(target, pages.dtype, core::load_element(source, rows.dtype));
  }
}

/// Calls visit(token, page, row of the page) for every new token that has a place, on all threads.
template <class Visit>
void for_each_place(const AppendKv& args, const core::Sequences& sequences, std::int64_t num_tokens,
                    std::int64_t num_pages, Visit visit) {
  const std::int64_t block_size = args.problem.block_size;
  // A token's heads are few and short: tasks of 64 tokens.
  constexpr std::int64_t kTokens = 64;
  core::parallel_for(core::ceil_div(num_tokens, kTokens), [&](std::int64_t task, int) {
    const std::int64_t end = std::min((task + 1) * kTokens, num_tokens);
    for (std::int64_t token = task * kTokens; token < end; ++token) {
      const core::Sequence sequence = sequences.of_query(token);
      const std::int64_t position = sequence.position(token - sequence.q_begin);
      if (position < 0) continue;
      const std::int64_t page =
          core::load_i32(args.batch.page_table, sequence.batch_idx, position / block_size);
      if (page < 0 || page >= num_pages) continue;
      visit(token, page, position % block_size);
    }
  });
}

void append(const AppendKv& args, const core::Sequences& sequences, const TensorView& rows,
            const TensorView& pages) {
  if (!rows.given()) return;
  for_each_place(args, sequences, rows.shape[0], pages.shape[0],
                 [&](std::int64_t token, std::int64_t page, std::int64_t row) {
                   for (std::int64_t head = 0; head < pages.shape[1]; ++head) {
                     copy_row(rows, core::offset_of(rows, token, head), pages,
                              core::offset_of(pages, page, head, row), pages.shape[3]);
                   }
                 });
}

/// Codes of the index keys that append() has written.
void encode(const AppendKv& args, const core::Sequences& sequences) {
  const TensorView& pages = args.index_k_pages;
  for_each_place(args, sequences, args.index_k.shape[0], pages.shape[0],
                 [&](std::int64_t, std::int64_t page, std::int64_t row) {
                   const auto row_of = [&](const TensorView& view) {
                     return core::address_at(view, core::offset_of(view, page, 0, row));
                   };
                   core::encode_index_key(
                       row_of(pages), pages.dtype, args.problem.index_dim,
                       reinterpret_cast<std::int8_t*>(row_of(args.index_k_codes_pages)),
                       reinterpret_cast<std::uint16_t*>(row_of(args.index_k_scales_pages)));
                 });
}

}  // namespace

const detail::Implementation<AppendKv> kAppendKv = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<AppendKv>,
    .workspace_bytes = [](const AppendKv&) -> std::size_t { return 0; },
    .run =
        [](const AppendKv& args, std::span<std::byte>, Stream) {
          const core::Sequences sequences(args);
          append(args, sequences, args.k, args.k_pages);
          append(args, sequences, args.v, args.v_pages);
          append(args, sequences, args.index_k, args.index_k_pages);
          if (args.index_k_codes_pages.given()) encode(args, sequences);
        }};

}  // namespace msa::cpu
