// SPDX-License-Identifier: Apache-2.0
//
// The inputs of benchmarks, and the work that an operation can't do without: one definition for
// `msa bench` and cpu_ops_bench. docs/benchmarking.md states the counting rules.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "bench/selection.hpp"
#include "core/tensor.hpp"
#include "msa/ops.hpp"

namespace msa::bench {

/// Queries at the end of their context: seq_len_q of them in each of batch_size sequences of
/// seq_len_k keys.
struct Shape {
  std::string name;
  Problem problem{};
  std::int64_t batch_size = 1;
  std::int64_t seq_len_q = 1;
  std::int64_t seq_len_k = 0;
  DType activations = DType::bf16;  ///< of queries, new tokens and out; caches are bf16
};

/// What any algorithm must spend on an operation.
struct Work {
  double flops = 0.0;  ///< 2 per multiply-add of visible (attended) pairs
  double bytes = 0.0;  ///< each input that is needed, and each output, once
};

template <class Args>
struct Op {
  Args args;
  Work work;
};

/// Paged caches of num_sequences sequences, their pages in random order. Inputs may share one.
struct Cache {
  Cache(const Problem& problem, std::int64_t num_sequences, std::int64_t num_blocks);

  Problem problem;
  std::int64_t num_sequences, num_blocks;
  core::Tensor page_table;      ///< i32 [num_sequences, num_blocks]
  core::Tensor index_k;         ///< bf16 [num_pages, 1, block_size, index_dim]
  core::Tensor index_k_codes;   ///< i8, shaped like index_k
  core::Tensor index_k_scales;  ///< bf16 [num_pages, 1, block_size, 2]
  core::Tensor k, v;            ///< bf16 [num_pages, num_kv_heads, block_size, head_dim]
};

/// Inputs of one shape; add_...() make the tensors that an operation needs, with values that depend
/// on the seed alone.
class Inputs {
 public:
  /// Sequence b reads the cache's sequence first_sequence + b; without a cache, one of its own.
  explicit Inputs(Shape shape, std::shared_ptr<Cache> cache = nullptr,
                  std::int64_t first_sequence = 0, unsigned seed = 1);

  /// Index queries that follow the family from token to token, and index keys whose blocks differ
  /// as much as the family's do, so that the indexer itself makes a selection of that kind.
  /// `rows`: index queries, if more than the shape's, for move_to().
  void add_index(const SelectionFamily& family, std::int64_t rows = 0);
  /// After add_index(): indexer() and append() of these inputs get int8 codes, too.
  void add_codes();
  void add_attention();
  void add_new_tokens();     ///< after add_index(), where it is called, and add_attention()
  void add_scores();         ///< room for them; index_scores() fills it
  void add_random_scores();  ///< N(0, 1)
  void add_ids();            ///< room for them; an indexer fills it
  void add_selection(const SelectionFamily& family);  ///< ids as the family has them

  /// The same queries at positions [first_position, first_position + seq_len_q) of a longer prompt,
  /// with the index queries of that place. For one sequence.
  void move_to(std::int64_t first_position);

  Op<IndexerScores> index_scores() const;
  Op<SelectTopK> select() const;
  Op<Indexer> indexer() const;
  Op<SparseAttentionForward> sparse() const;  ///< its work is that of the ids as they are now
  Op<DenseAttentionForward> dense() const;
  Op<AppendKv> append() const;  ///< with index keys where add_index() was called

  /// Distinct blocks of 4 neighbouring tokens' ids over the blocks of one: 1, all shared, to 4; 0
  /// for fewer than 4 queries.
  double overlap4() const;

  const Shape& shape() const { return shape_; }

 private:
  std::int64_t total_q() const { return shape_.batch_size * shape_.seq_len_q; }
  std::int64_t num_blocks() const;
  Batch batch() const;
  double visible_pairs() const;  ///< per head
  double page_bytes(std::int64_t heads, std::int64_t dim) const;
  Work index_work(double key_bytes) const;  ///< without its output
  TensorView scores_view() const;
  TensorView rows_at_place(const core::Tensor& tensor) const;
  void set_lengths();

  Shape shape_;
  std::shared_ptr<Cache> cache_;
  unsigned seed_;
  std::int64_t first_index_row_ = 0;
  bool with_codes_ = false;
  core::Tensor page_table_, seq_lens_k_;
  core::Tensor index_q_, q_, out_, new_k_, new_v_, new_index_k_, block_scores_, block_ids_;
};

}  // namespace msa::bench
