// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/support.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/select_top_k.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/select-inl.hpp"

#ifndef MSA_CPU_SELECT_TOP_K_ONCE
#define MSA_CPU_SELECT_TOP_K_ONCE
namespace msa::cpu {
namespace {

struct SelectScratch {
  std::uint64_t* best;  ///< [top_k]
  std::int32_t* ids;    ///< [top_k]
};

SelectScratch lay_out(const Problem& p, core::WorkspaceLayout& layout) {
  return {.best = layout.take<std::uint64_t>(p.top_k), .ids = layout.take<std::int32_t>(p.top_k)};
}

}  // namespace
}  // namespace msa::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// Selects for queries [begin, end) of all sequences and one index head.
void select_rows(const SelectTopK& args, const core::Sequences& sequences, std::int64_t head,
                 std::int64_t begin, std::int64_t end, std::byte* memory) {
  core::WorkspaceLayout layout(memory);
  const SelectScratch scratch = lay_out(args.problem, layout);
  for (std::int64_t row = begin; row < end; ++row) {
    const core::Sequence sequence = sequences.of_query(row);
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    const std::int64_t visible = position < 0 ? 0 : position / args.problem.block_size + 1;
    const void* scores =
        core::address_at(args.block_scores, core::offset_of(args.block_scores, head, row));
    select_row(static_cast<const float*>(scores), visible, args.problem, scratch.best, scratch.ids);
    for (std::int64_t slot = 0; slot < args.problem.top_k; ++slot) {
      core::store_i32(args.block_ids, scratch.ids[slot], head, row, slot);
    }
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(select_rows);

namespace {

std::size_t slice_bytes(const SelectTopK& args) {
  core::WorkspaceLayout layout;
  lay_out(args.problem, layout);
  return layout.bytes();
}

void run(const SelectTopK& args, std::span<std::byte> workspace, Stream) {
  constexpr std::int64_t kRows = 64;  // some microseconds of work
  const core::Sequences sequences(args);
  const std::int64_t total_q = args.block_scores.shape[1];
  const std::int64_t tiles = core::ceil_div(total_q, kRows);
  for_each_item(tiles * args.problem.num_kv_heads, workspace, slice_bytes(args),
                [&](std::int64_t item, std::byte* memory) {
                  const std::int64_t begin = item % tiles * kRows;
                  HWY_DYNAMIC_DISPATCH(select_rows)
                  (args, sequences, item / tiles, begin, std::min(begin + kRows, total_q), memory);
                });
}

}  // namespace

const detail::Implementation<SelectTopK> kSelectTopK = {
    .name = "cpu",
    .dtypes = "f32",
    .declines = declines<SelectTopK>,
    .workspace_bytes =
        [](const SelectTopK& args) { return workspace_of_slices(slice_bytes(args)); },
    .run = run};

}  // namespace msa::cpu
#endif
