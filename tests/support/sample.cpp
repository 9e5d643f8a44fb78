// SPDX-License-Identifier: Apache-2.0
#include "tests/support/sample.hpp"

#include <algorithm>

#include "core/check.hpp"
#include "core/sequences.hpp"

namespace msa::testing {
namespace {

/// The slices of `view` at `rows` of an axis, contiguous. Rank 2 or 3.
core::Tensor gather(const TensorView& view, std::size_t axis,
                    const std::vector<std::int64_t>& rows) {
  const std::int64_t count = std::ssize(rows);
  const auto size = [&](std::size_t i) { return i == axis ? count : view.shape[i]; };
  core::Tensor tensor = view.rank == 3 ? core::Tensor(view.dtype, {size(0), size(1), size(2)})
                                       : core::Tensor(view.dtype, {size(0), size(1)});
  std::byte* to = tensor.data<std::byte>();
  const std::int64_t depth = view.rank == 3 ? view.shape[2] : 1;
  for (std::int64_t i = 0; i < size(0); ++i) {
    for (std::int64_t j = 0; j < size(1); ++j) {
      for (std::int64_t d = 0; d < depth; ++d, to += size_of(view.dtype)) {
        const std::int64_t a = axis == 0 ? rows[static_cast<std::size_t>(i)] : i;
        const std::int64_t b = axis == 1 ? rows[static_cast<std::size_t>(j)] : j;
        const std::int64_t offset =
            a * view.stride[0] + b * view.stride[1] + (view.rank == 3 ? d * view.stride[2] : 0);
        std::copy_n(core::address_at(view, offset), size_of(view.dtype), to);
      }
    }
  }
  return tensor;
}

/// Tokens of ragged keys [total_k, heads, dim] as overlapping pages: page t begins at token t.
TensorView pages_at_every_token(const TensorView& keys, std::int64_t block_size) {
  TensorView pages = keys;
  pages.rank = 4;
  pages.shape = {keys.shape[0], keys.shape[1], block_size, keys.shape[2]};
  pages.stride = {keys.stride[0], keys.stride[1], keys.stride[0], keys.stride[2]};
  return pages;
}

}  // namespace

template <class Args>
Sample<Args>::Sample(const Args& args, const std::vector<std::int64_t>& rows) : args_(args) {
  const core::Sequences sequences(args);
  const std::int64_t block_size = args.problem.block_size;
  const bool paged = core::is_paged(args.batch);
  const std::int64_t columns =
      paged ? args.batch.page_table.shape[1]
            : core::ceil_div(std::max<std::int64_t>(core::max_seq_len_k(args), 1), block_size);
  const std::int64_t count = std::ssize(rows);
  core::Tensor table(DType::i32, {count, columns});
  core::Tensor lengths(DType::i32, {count});
  std::int32_t* page = table.data<std::int32_t>();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = rows[static_cast<std::size_t>(i)];
    const core::Sequence sequence = sequences.of_query(row);
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    lengths.data<std::int32_t>()[i] =
        static_cast<std::int32_t>(std::max<std::int64_t>(position + 1, 0));
    for (std::int64_t b = 0; b < columns; ++b) {
      *page++ = paged ? core::load_i32(args.batch.page_table, sequence.batch_idx, b)
                      : static_cast<std::int32_t>(sequence.k_begin + b * block_size);
    }
  }
  args_.batch = {.page_table = keep(std::move(table)), .seq_lens_k = keep(std::move(lengths))};
  const auto take = [&](TensorView& view, std::size_t axis) {
    if (view.given()) view = keep(gather(view, axis, rows));
  };
  const auto see_as_pages = [&](TensorView& keys) {
    if (!paged) keys = pages_at_every_token(keys, block_size);
  };
  if constexpr (requires { args_.q; }) {
    take(args_.q, 0);
    take(args_.out, 0);
    take(args_.lse, 0);
    see_as_pages(args_.k);
    see_as_pages(args_.v);
  } else {
    take(args_.index_q, 0);
    see_as_pages(args_.index_k);
  }
  if constexpr (requires { args_.block_ids; }) take(args_.block_ids, 1);
  if constexpr (requires { args_.block_scores; }) take(args_.block_scores, 1);
}

template class Sample<IndexerScores>;
template class Sample<Indexer>;
template class Sample<SparseAttentionForward>;
template class Sample<DenseAttentionForward>;

std::vector<std::int64_t> spread_rows(std::int64_t total, std::int64_t count) {
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < count && total > 0; ++i) {
    // Ends included; the middle ones are moved by up to 12 rows, so that all rows of a tile are
    // met.
    const std::int64_t even = count == 1 ? 0 : i * (total - 1) / (count - 1);
    const std::int64_t shift = i == 0 || i == count - 1 ? 0 : i * 5 % 13;
    rows.push_back(std::min(even + shift, total - 1));
  }
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  return rows;
}

}  // namespace msa::testing
