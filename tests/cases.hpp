// SPDX-License-Identifier: Apache-2.0
//
// The one table of test cases: tests, benches and `msa verify` all read it. A case says everything
// that its tensors follow from, and prints itself as the initialiser that makes it again.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "msa/ops.hpp"

namespace msa::testing {

/// Lengths of one sequence, in tokens. More queries than keys: the first queries see nothing.
struct Lengths {
  std::int64_t q = 0;
  std::int64_t k = 0;
};

/// Where the keys lie.
enum class Keys {
  ragged,
  paged,          ///< Every block has a page of its own; pages are in random order.
  shared_pages,   ///< The same, but all sequences have the page of their block 0 in common.
  missing_pages,  ///< Paged; some blocks have page ids out of range.
};

/// What the tensors hold.
enum class Values {
  normal,      ///< Standard normal.
  ties,        ///< Small integers: scores are exact in f32 and many are equal.
  zeros,       ///< +0 and -0 only.
  infinities,  ///< Normal, a few infinite elements.
  nans,        ///< Normal, a few NaN elements in tokens and queries that are attended.
  large,       ///< q and index_q 1e20 times normal (6e3 in f16): the softmax is one-hot.
  largest,     ///< v within a tenth of the largest finite number, half of its columns positive.
  /// f16: q and k 1.3e4 times normal, so that base-2 scores reach 2^29 and f32 rounds them by
  /// tens; v as in `largest`. Other types: as `largest`.
  coarse,
};

/// Where the block ids of the attention operations come from.
enum class Selection {
  indexer,    ///< The reference's, as a model would have them.
  any_order,  ///< The same shuffled; free slots hold -1, invisible ids and ids out of range.
  scattered,  ///< Random blocks, down to none at all; the local block may be missing.
};

/// How keys and values of 8 bits are scaled.
enum class Fp8 {
  none,       ///< All tensors have the case's dtype.
  unscaled,   ///< k, v, index_q and index_k are e4m3; no scales are given.
  per_head,   ///< The same, with k_scale and v_scale of each KV head.
  one_scale,  ///< The same, with one scale of all heads (stride 0).
};

struct Case {
  std::string name{};
  Problem problem{.num_q_heads = 4,
                  .num_kv_heads = 2,
                  .head_dim = 64,
                  .index_dim = 64,
                  .block_size = 16,
                  .top_k = 4};
  DType dtype = DType::f32;
  std::vector<Lengths> sequences{};
  Keys keys = Keys::ragged;
  Values values = Values::normal;
  Selection selection = Selection::indexer;
  Fp8 fp8 = Fp8::none;       ///< Forward operations only; not with index_codes.
  bool index_codes = false;  ///< Int8 codes beside the index keys; paged keys only.
  bool give_offsets = true;  ///< False: no cu_seqlens; equal query counts, ragged only as one.
  int row_gap = 3;           ///< Poisoned elements behind each row of each axis; 0: contiguous.
  std::uint32_t seed = 1;
};

std::ostream& operator<<(std::ostream&, const Case&);

/// Every geometry in f32 and bf16, some in f16. Small: the reference runs all in seconds.
const std::vector<Case>& all_cases();

}  // namespace msa::testing
