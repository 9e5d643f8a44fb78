// SPDX-License-Identifier: Apache-2.0
#include "bench/op_inputs.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/index_code.hpp"
#include "core/scalar.hpp"
#include "core/sequences.hpp"

namespace msa::bench {
namespace {

using core::Tensor;

double bytes_of(const TensorView& view) {
  return static_cast<double>(view.num_elements()) * static_cast<double>(size_of(view.dtype));
}

/// N(0, 1) from a table: the largest tensors have 10^9 elements.
class Normal {
 public:
  explicit Normal(unsigned seed) : random_(seed) {
    std::normal_distribution<float> normal;
    for (float& value : table_) value = normal(random_);
  }
  float operator()() {
    if (bits_left_ < 12) {
      bits_ = random_();
      bits_left_ = 64;
    }
    const float value = table_[bits_ & 4095];
    bits_ >>= 12;
    bits_left_ -= 12;
    return value;
  }

 private:
  std::mt19937_64 random_;
  std::array<float, 4096> table_{};
  std::uint64_t bits_ = 0;
  int bits_left_ = 0;
};

void store(const Tensor& tensor, std::int64_t i, float value) {
  if (tensor.view().dtype == DType::f32) {
    tensor.data<float>()[i] = value;
  } else {
    tensor.data<std::uint16_t>()[i] = core::f32_to_bf16(value);
  }
}

Tensor normal_tensor(DType dtype, std::initializer_list<std::int64_t> shape, unsigned seed) {
  Tensor tensor(dtype, shape);
  Normal normal(seed);
  for (std::int64_t i = 0; i < tensor.view().num_elements(); ++i) store(tensor, i, normal());
  return tensor;
}

/// Keys of one block are c * (their block's mean) + sqrt(1 - c^2) * (noise). Families with a part
/// that is fixed per block get one here; at this c the measured overlap of the indexer's own
/// selections is that of bench/selection.hpp (docs/benchmarking.md).
Tensor index_keys(const Problem& p, std::int64_t num_pages, const SelectionFamily& family) {
  Tensor keys(DType::bf16, {num_pages, 1, p.block_size, p.index_dim});
  const float c = family.a > 0.0 ? 0.9f : 0.0f;
  const float noise = std::sqrt(1.0f - c * c);
  Normal normal(2);
  std::vector<float> mean(static_cast<std::size_t>(p.index_dim));
  std::uint16_t* row = keys.data<std::uint16_t>();
  for (std::int64_t page = 0; page < num_pages; ++page) {
    for (float& value : mean) value = c * normal();
    for (int token = 0; token < p.block_size; ++token) {
      for (float value : mean) *row++ = core::f32_to_bf16(value + noise * normal());
    }
  }
  return keys;
}

}  // namespace

Cache::Cache(const Problem& p, std::int64_t sequences, std::int64_t blocks)
    : problem(p),
      num_sequences(sequences),
      num_blocks(blocks),
      page_table(DType::i32, {sequences, blocks}) {
  auto pages = page_table.span<std::int32_t>();
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(5));
}

Inputs::Inputs(Shape shape, std::shared_ptr<Cache> cache, std::int64_t first_sequence,
               unsigned seed)
    : shape_(std::move(shape)), cache_(std::move(cache)), seed_(seed) {
  const std::int64_t blocks = num_blocks();
  if (!cache_) cache_ = std::make_shared<Cache>(shape_.problem, shape_.batch_size, blocks);
  MSA_CHECK(
      first_sequence + shape_.batch_size <= cache_->num_sequences && blocks == cache_->num_blocks,
      "bench inputs: the cache has ", cache_->num_sequences, " sequences of ", cache_->num_blocks,
      " blocks");
  page_table_ = Tensor(DType::i32, {shape_.batch_size, blocks});
  std::copy_n(cache_->page_table.data<std::int32_t>() + first_sequence * blocks,
              shape_.batch_size * blocks, page_table_.data<std::int32_t>());
  seq_lens_k_ = Tensor(DType::i32, {shape_.batch_size});
  set_lengths();
}

void Inputs::set_lengths() {
  std::fill_n(seq_lens_k_.data<std::int32_t>(), shape_.batch_size,
              static_cast<std::int32_t>(shape_.seq_len_k));
}

void Inputs::move_to(std::int64_t first_position) {
  MSA_CHECK(shape_.batch_size == 1 && first_position + shape_.seq_len_q <=
                                          page_table_.view().shape[1] * shape_.problem.block_size,
            "bench inputs: no place for queries at ", first_position);
  shape_.seq_len_k = first_position + shape_.seq_len_q;
  first_index_row_ = first_position;
  set_lengths();
}

std::int64_t Inputs::num_blocks() const {
  return core::ceil_div(shape_.seq_len_k, shape_.problem.block_size);
}

Batch Inputs::batch() const {
  return {.page_table = page_table_,
          .seq_lens_k = seq_lens_k_,
          .max_seq_len_q = shape_.seq_len_q,
          .max_seq_len_k = shape_.seq_len_k};
}

void Inputs::add_index(const SelectionFamily& family, std::int64_t rows) {
  const Problem& p = shape_.problem;
  if (!cache_->index_k.view().given()) {
    cache_->index_k = index_keys(p, cache_->num_sequences * cache_->num_blocks, family);
  }
  // Per sequence and head a fixed direction u and a wandering one w_t, as selection.hpp has them
  // for scores: q_t = a u + sqrt(1 - a^2) w_t, w_t = rho w_(t-1) + sqrt(1 - rho^2) N(0, 1).
  const std::int64_t tokens = std::max(rows, shape_.seq_len_q);
  index_q_ = Tensor(shape_.activations, {shape_.batch_size * tokens, p.num_kv_heads, p.index_dim});
  const auto a = static_cast<float>(family.a);
  const auto rho = static_cast<float>(family.rho);
  const float b = std::sqrt(1.0f - a * a);
  const float fresh = std::sqrt(1.0f - rho * rho);
  const std::int64_t width = std::int64_t{p.num_kv_heads} * p.index_dim;
  Normal normal(seed_);
  std::vector<float> u(static_cast<std::size_t>(width)), w(u.size());
  std::int64_t element = 0;
  for (std::int64_t sequence = 0; sequence < shape_.batch_size; ++sequence) {
    std::generate(u.begin(), u.end(), std::ref(normal));
    std::generate(w.begin(), w.end(), std::ref(normal));
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::size_t i = 0; i < u.size(); ++i, ++element) {
        w[i] = rho * w[i] + fresh * normal();
        store(index_q_, element, a * u[i] + b * w[i]);
      }
    }
  }
}

void Inputs::add_codes() {
  const Problem& p = shape_.problem;
  with_codes_ = true;
  if (cache_->index_k_codes.view().given()) return;
  const std::int64_t pages = cache_->num_sequences * cache_->num_blocks;
  cache_->index_k_codes = Tensor(DType::i8, {pages, 1, p.block_size, p.index_dim});
  cache_->index_k_scales = Tensor(DType::bf16, {pages, 1, p.block_size, 2});
  for (std::int64_t key = 0; key < pages * p.block_size; ++key) {
    core::encode_index_key(cache_->index_k.data<std::byte>() + 2 * key * p.index_dim, DType::bf16,
                           p.index_dim,
                           cache_->index_k_codes.data<std::int8_t>() + key * p.index_dim,
                           cache_->index_k_scales.data<std::uint16_t>() + 2 * key);
  }
}

void Inputs::add_attention() {
  const Problem& p = shape_.problem;
  if (!cache_->k.view().given()) {
    const std::int64_t pages = cache_->num_sequences * cache_->num_blocks;
    cache_->k = normal_tensor(DType::bf16, {pages, p.num_kv_heads, p.block_size, p.head_dim}, 3);
    cache_->v = normal_tensor(DType::bf16, {pages, p.num_kv_heads, p.block_size, p.head_dim}, 4);
  }
  q_ = normal_tensor(shape_.activations, {total_q(), p.num_q_heads, p.head_dim}, seed_ + 5);
  out_ = Tensor(shape_.activations, {total_q(), p.num_q_heads, p.head_dim});
}

void Inputs::add_new_tokens() {
  const Problem& p = shape_.problem;
  // Values of the cache itself, so that appending leaves it as it is; other places that move_to()
  // goes to get these keys and values, but their own index keys.
  const auto copy = [&](const Tensor& pages, std::int64_t heads, std::int64_t dim,
                        std::int64_t tokens) {
    Tensor rows(shape_.activations, {shape_.batch_size * tokens, heads, dim});
    std::int64_t element = 0;
    for (std::int64_t b = 0; b < shape_.batch_size; ++b) {
      for (std::int64_t t = shape_.seq_len_k - tokens; t < shape_.seq_len_k; ++t) {
        const std::int64_t page =
            page_table_.data<std::int32_t>()[b * num_blocks() + t / p.block_size];
        for (std::int64_t head = 0; head < heads; ++head) {
          const std::uint16_t* from =
              pages.data<std::uint16_t>() +
              ((page * heads + head) * p.block_size + t % p.block_size) * dim;
          for (std::int64_t i = 0; i < dim; ++i) {
            store(rows, element++, core::bf16_to_f32(from[i]));
          }
        }
      }
    }
    return rows;
  };
  new_k_ = copy(cache_->k, p.num_kv_heads, p.head_dim, shape_.seq_len_q);
  new_v_ = copy(cache_->v, p.num_kv_heads, p.head_dim, shape_.seq_len_q);
  if (index_q_.view().given()) {
    new_index_k_ =
        copy(cache_->index_k, 1, p.index_dim, index_q_.view().shape[0] / shape_.batch_size);
  }
}

void Inputs::add_scores() {
  block_scores_ = Tensor(DType::f32, {shape_.problem.num_kv_heads, total_q(), num_blocks()});
}

void Inputs::add_random_scores() {
  block_scores_ =
      normal_tensor(DType::f32, {shape_.problem.num_kv_heads, total_q(), num_blocks()}, seed_ + 9);
}

void Inputs::add_ids() {
  block_ids_ = Tensor(DType::i32, {shape_.problem.num_kv_heads, total_q(), shape_.problem.top_k});
}

void Inputs::add_selection(const SelectionFamily& family) {
  add_ids();
  const Problem& p = shape_.problem;
  const std::int64_t row = shape_.seq_len_q * p.top_k;
  for (std::int64_t b = 0; b < shape_.batch_size; ++b) {
    const Selection selection = make_selection(family, p, shape_.seq_len_q, shape_.seq_len_k,
                                               seed_ + 9 + static_cast<std::uint64_t>(b));
    for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
      std::copy_n(selection.block_ids.data() + head * row, row,
                  block_ids_.data<std::int32_t>() + (head * shape_.batch_size + b) * row);
    }
  }
}

double Inputs::visible_pairs() const {
  const auto n = static_cast<double>(shape_.seq_len_q);
  const auto context = static_cast<double>(shape_.seq_len_k);
  return static_cast<double>(shape_.batch_size) * (n * (context - n) + n * (n + 1.0) / 2.0);
}

/// Of bf16 rows of every key, once.
double Inputs::page_bytes(std::int64_t heads, std::int64_t dim) const {
  return 2.0 * static_cast<double>(shape_.batch_size * shape_.seq_len_k * heads * dim);
}

/// The rows of `tensor` [rows, heads, dim] at which move_to() stands.
TensorView Inputs::rows_at_place(const core::Tensor& tensor) const {
  const TensorView& all = tensor.view();
  const std::int64_t row_bytes =
      all.shape[1] * all.shape[2] * static_cast<std::int64_t>(size_of(all.dtype));
  return TensorView::contiguous(tensor.data<std::byte>() + first_index_row_ * row_bytes, all.dtype,
                                {}, {total_q(), all.shape[1], all.shape[2]});
}

TensorView Inputs::scores_view() const {
  return TensorView::contiguous(block_scores_.data<float>(), DType::f32, {},
                                {shape_.problem.num_kv_heads, total_q(), num_blocks()});
}

Work Inputs::index_work(double key_bytes) const {
  const Problem& p = shape_.problem;
  return {.flops = 2.0 * p.index_dim * p.num_kv_heads * visible_pairs(),
          .bytes = bytes_of(rows_at_place(index_q_)) + key_bytes};
}

Op<IndexerScores> Inputs::index_scores() const {
  Work work = index_work(page_bytes(1, shape_.problem.index_dim));
  work.bytes += bytes_of(scores_view());
  return {.args = {.problem = shape_.problem,
                   .batch = batch(),
                   .index_q = rows_at_place(index_q_),
                   .index_k = cache_->index_k,
                   .block_scores = scores_view()},
          .work = work};
}

Op<SelectTopK> Inputs::select() const {
  // The selection reads no pages: lengths alone.
  Batch lengths = batch();
  lengths.page_table = {};
  return {.args = {.problem = shape_.problem,
                   .batch = lengths,
                   .block_scores = scores_view(),
                   .block_ids = block_ids_},
          .work = {.bytes = bytes_of(scores_view()) + bytes_of(block_ids_)}};
}

Op<Indexer> Inputs::indexer() const {
  const Problem& p = shape_.problem;
  Indexer args{.problem = p,
               .batch = batch(),
               .index_q = rows_at_place(index_q_),
               .index_k = cache_->index_k,
               .block_ids = block_ids_};
  double key_bytes = page_bytes(1, p.index_dim);
  if (with_codes_) {
    args.index_k_codes = cache_->index_k_codes;
    args.index_k_scales = cache_->index_k_scales;
    // A bound that decides every block needs no key.
    key_bytes = page_bytes(1, p.index_dim) / 2.0 + page_bytes(1, 2);
  }
  Work work = index_work(key_bytes);
  work.bytes += bytes_of(block_ids_);
  return {.args = args, .work = work};
}

Op<SparseAttentionForward> Inputs::sparse() const {
  const Problem& p = shape_.problem;
  double attended = 0.0;  // tokens, summed over queries and KV heads
  double read = 0.0;      // tokens of K and of V that some query attends, summed over KV heads
  std::vector<std::int64_t> seen(static_cast<std::size_t>(num_blocks()));
  const std::int32_t* id = block_ids_.data<std::int32_t>();
  for (std::int64_t part = 0; part < p.num_kv_heads * shape_.batch_size; ++part) {
    std::fill(seen.begin(), seen.end(), 0);
    for (std::int64_t t = 0; t < shape_.seq_len_q; ++t) {
      const std::int64_t position = shape_.seq_len_k - shape_.seq_len_q + t;
      for (int slot = 0; slot < p.top_k; ++slot, ++id) {
        if (*id < 0) continue;
        const std::int64_t tokens =
            std::min<std::int64_t>(p.block_size, position + 1 - std::int64_t{*id} * p.block_size);
        attended += static_cast<double>(tokens);
        seen[static_cast<std::size_t>(*id)] = tokens;
      }
    }
    read += static_cast<double>(std::accumulate(seen.begin(), seen.end(), std::int64_t{0}));
  }
  return {.args = {.problem = p,
                   .batch = batch(),
                   .q = q_,
                   .k = cache_->k,
                   .v = cache_->v,
                   .block_ids = block_ids_,
                   .out = out_},
          .work = {.flops = 4.0 * p.head_dim * p.group_size() * attended,
                   .bytes = bytes_of(q_) + bytes_of(out_) + bytes_of(block_ids_) +
                            2.0 * 2.0 * p.head_dim * read}};
}

Op<DenseAttentionForward> Inputs::dense() const {
  const Problem& p = shape_.problem;
  return {
      .args =
          {.problem = p, .batch = batch(), .q = q_, .k = cache_->k, .v = cache_->v, .out = out_},
      .work = {
          .flops = 4.0 * p.head_dim * p.num_q_heads * visible_pairs(),
          .bytes = bytes_of(q_) + bytes_of(out_) + 2.0 * page_bytes(p.num_kv_heads, p.head_dim)}};
}

Op<AppendKv> Inputs::append() const {
  AppendKv args{.problem = shape_.problem,
                .batch = batch(),
                .k = new_k_,
                .v = new_v_,
                .k_pages = cache_->k,
                .v_pages = cache_->v};
  double written = 2.0 * 2.0 * static_cast<double>(new_k_.view().num_elements());
  double read = bytes_of(new_k_) + bytes_of(new_v_);
  if (new_index_k_.view().given()) {
    args.index_k = rows_at_place(new_index_k_);
    args.index_k_pages = cache_->index_k;
    read += bytes_of(args.index_k);
    const auto elements = static_cast<double>(args.index_k.num_elements());
    written += 2.0 * elements;
    if (with_codes_) {
      args.index_k_codes_pages = cache_->index_k_codes;
      args.index_k_scales_pages = cache_->index_k_scales;
      written += elements + 4.0 * static_cast<double>(total_q());
    }
  }
  return {.args = args, .work = {.bytes = read + written}};
}

double Inputs::overlap4() const {
  const Problem& p = shape_.problem;
  double distinct = 0.0;
  double single = 0.0;
  const std::int32_t* row = block_ids_.data<std::int32_t>();
  std::vector<std::int32_t> window;
  for (std::int64_t part = 0; part < p.num_kv_heads * shape_.batch_size; ++part) {
    window.clear();
    for (std::int64_t t = 0; t < shape_.seq_len_q; ++t, row += p.top_k) {
      std::copy_if(row, row + p.top_k, std::back_inserter(window),
                   [](std::int32_t id) { return id >= 0; });
      if (t % 4 != 3) continue;
      single += static_cast<double>(window.size()) / 4.0;
      std::sort(window.begin(), window.end());
      distinct += static_cast<double>(std::unique(window.begin(), window.end()) - window.begin());
      window.clear();
    }
  }
  return single > 0.0 ? distinct / single : 0.0;
}

}  // namespace msa::bench
