// SPDX-License-Identifier: Apache-2.0
#include "tests/support/inputs.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

#include "core/index_code.hpp"
#include "core/sequences.hpp"
#include "reference/reference.hpp"

namespace msa::testing {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
// Positive, so that a kernel which trusts it reads far outside of everything.
constexpr std::int32_t kPageOutOfRange = 0x5a5a5a5a;

double uniform(std::mt19937& random) { return (static_cast<double>(random()) + 0.5) * 0x1p-32; }

double normal(std::mt19937& random) {
  const double radius = std::sqrt(-2.0 * std::log(uniform(random)));
  return radius * std::cos(2.0 * std::numbers::pi * uniform(random));
}

std::int64_t below(std::mt19937& random, std::int64_t limit) {
  return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(limit));
}

template <class T>
void shuffle(std::vector<T>& items, std::mt19937& random) {
  for (std::size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1],
              items[static_cast<std::size_t>(below(random, static_cast<std::int64_t>(i)))]);
  }
}

/// A contiguous copy in f32, which the CPU backend takes; widening e4m3 is exact.
core::Tensor widened(const TensorView& view) {
  core::Tensor wide =
      view.rank == 3
          ? core::Tensor(DType::f32, {view.shape[0], view.shape[1], view.shape[2]})
          : core::Tensor(DType::f32, {view.shape[0], view.shape[1], view.shape[2], view.shape[3]});
  set_values(wide, values_of(view));
  return wide;
}

template <class Args>
void run_on_cpu(Args args) {
  core::Tensor index_q;
  core::Tensor index_k;
  if (args.index_q.dtype == DType::e4m3) {
    index_q = widened(args.index_q);
    index_k = widened(args.index_k);
    args.index_q = index_q;
    args.index_k = index_k;
  }
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());
}

GuardedTensor ints(const std::vector<std::int64_t>& shape, int gap,
                   const std::vector<double>& values) {
  GuardedTensor tensor(DType::i32, shape, gap, GuardedTensor::kPoison);
  set_values(tensor, values);
  return tensor;
}

}  // namespace

Inputs::Inputs(const Case& case_spec)
    : spec(case_spec), teacher_lse(case_spec.seed / 4 % 2 == 1), random_(case_spec.seed) {
  make_batch();
  make_keys();
  make_queries();
  make_scales();
  plant_special_values();
  make_index_codes();
  make_block_scores();
  make_block_ids();
  make_norm_rope();
  for_each_tensor([](const char*, GuardedTensor& tensor) { tensor.seal(); });
}

void Inputs::make_batch() {
  const auto size = static_cast<std::int64_t>(spec.sequences.size());
  const std::int64_t block_size = spec.problem.block_size;
  std::vector<double> offsets_q{0.0};
  std::vector<double> offsets_k{0.0};
  std::vector<double> lengths;
  std::int64_t longest = 0;
  for (const Lengths& lengths_of_one : spec.sequences) {
    total_q += lengths_of_one.q;
    total_k += lengths_of_one.k;
    longest = std::max(longest, lengths_of_one.k);
    offsets_q.push_back(static_cast<double>(total_q));
    offsets_k.push_back(static_cast<double>(total_k));
    lengths.push_back(static_cast<double>(lengths_of_one.k));
  }
  if (spec.give_offsets) {
    cu_seqlens_q = ints({size + 1}, 0, offsets_q);
    batch.cu_seqlens_q = cu_seqlens_q;
  }
  if (spec.seed % 2 == 0) batch.max_seq_len_k = longest;  // both with and without the hint
  num_blocks = core::ceil_div(longest, block_size) + 1;
  if (spec.keys == Keys::ragged) {
    if (batch.max_seq_len_k == 0) num_blocks = core::ceil_div(total_k, block_size) + 1;
    if (spec.give_offsets) {
      cu_seqlens_k = ints({size + 1}, 0, offsets_k);
      batch.cu_seqlens_k = cu_seqlens_k;
    }
    return;
  }
  std::int64_t used = 0;
  for (const Lengths& lengths_of_one : spec.sequences) {
    used += core::ceil_div(lengths_of_one.k, block_size);
  }
  num_pages_ = used + 2;  // two that belong to nobody
  std::vector<std::int64_t> pages(static_cast<std::size_t>(num_pages_));
  std::iota(pages.begin(), pages.end(), 0);
  shuffle(pages, random_);
  const std::int64_t unused_page = pages.back();
  const std::int64_t columns = num_blocks;
  std::vector<double> table;
  std::size_t next = 0;
  for (const Lengths& lengths_of_one : spec.sequences) {
    for (std::int64_t b = 0; b < columns; ++b) {
      std::int64_t page = b % 2 == 0 ? unused_page : kPageOutOfRange;
      if (b * block_size < lengths_of_one.k) {
        page = spec.keys == Keys::shared_pages && b == 0 ? pages[0] : pages[next];
        if (spec.keys == Keys::missing_pages && b % 3 == 1) page = b % 2 == 0 ? -1 : num_pages_;
        ++next;
      }
      table.push_back(static_cast<double>(page));
    }
  }
  if (batch.max_seq_len_k == 0) ++num_blocks;
  page_table = ints({size, columns}, spec.row_gap, table);
  seq_lens_k = ints({size}, 0, lengths);
  batch.page_table = page_table;
  batch.seq_lens_k = seq_lens_k;
}

double Inputs::value(double scale) {
  // Normal numbers end at 6.7 here, f16 at 65,504.
  if (scale > 1.0 && spec.values == Values::coarse) {
    return std::clamp(scale * normal(random_), -6e4, 6e4);
  }
  switch (spec.values) {
    case Values::ties:
      return static_cast<double>(below(random_, 3) - 1);
    case Values::zeros:
      return random_() % 2 == 0 ? 0.0 : -0.0;
    default:
      return scale * normal(random_);
  }
}

GuardedTensor Inputs::filled(DType dtype, const std::vector<std::int64_t>& shape, double scale) {
  GuardedTensor tensor(dtype, shape, gap_of(dtype), GuardedTensor::kPoison);
  std::vector<double> values(static_cast<std::size_t>(tensor.view().num_elements()));
  for (double& element : values) element = value(scale);
  set_values(tensor, values);
  return tensor;
}

GuardedTensor Inputs::keys_tensor(std::int64_t heads, std::int64_t dim, double scale) {
  const DType dtype = key_dtype();
  if (spec.keys == Keys::ragged) return filled(dtype, {total_k, heads, dim}, scale);
  const std::int64_t block_size = spec.problem.block_size;
  GuardedTensor tensor(dtype, {num_pages_, heads, block_size, dim}, gap_of(dtype),
                       GuardedTensor::kPoison);
  for (std::size_t b = 0; b < spec.sequences.size(); ++b) {
    for (std::int64_t j = 0; j < spec.sequences[b].k; ++j) {
      const std::int32_t page = core::load_i32(page_table.view(), b, j / block_size);
      if (page < 0 || page >= num_pages_) continue;
      for (std::int64_t head = 0; head < heads; ++head) {
        for (std::int64_t d = 0; d < dim; ++d) {
          core::store(tensor.view(), value(scale), page, head, j % block_size, d);
        }
      }
    }
  }
  return tensor;
}

void Inputs::make_keys() {
  const Problem& p = spec.problem;
  k = keys_tensor(p.num_kv_heads, p.head_dim, coarse_scale());
  v = keys_tensor(p.num_kv_heads, p.head_dim, 1.0);
  index_k = keys_tensor(1, p.index_dim, 1.0);
  if (spec.values == Values::largest || spec.values == Values::coarse) make_largest_values();
}

/// Of q and k.
double Inputs::coarse_scale() const {
  return spec.values == Values::coarse && spec.dtype == DType::f16 ? 1.3e4 : 1.0;
}

/// Normal numbers x become sign(x) (1 - |x| / 70) of the largest; even columns all positive, so
/// that their sums are as large as they can be.
void Inputs::make_largest_values() {
  double most = std::numeric_limits<float>::max();
  if (spec.dtype == DType::bf16) most = 0x1.fep127;
  if (spec.dtype == DType::f16) most = 65504.0;
  const DType dtype = v.view().dtype;
  if (dtype == DType::e4m3) most = 448.0;
  for_each_index(v, [&](const auto& indices) {
    std::byte* const at = core::address_at(v.view(), offset_at(v, indices));
    const double x = core::load_element(at, dtype);
    if (std::isnan(x)) return;  // of a token that no sequence has
    const bool positive = indices[static_cast<std::size_t>(v.view().rank - 1)] % 2 == 0 || x > 0.0;
    core::store_element(at, dtype, (positive ? most : -most) * (1.0 - std::fabs(x) / 70.0));
  });
}

/// Codes of every key that a sequence has; NaN scales and errors elsewhere.
void Inputs::make_index_codes() {
  if (!spec.index_codes) return;
  const std::int64_t block_size = spec.problem.block_size;
  const std::int64_t dim = spec.problem.index_dim;
  index_k_codes = GuardedTensor(DType::i8, {num_pages_, 1, block_size, dim}, gap_of(DType::i8),
                                GuardedTensor::kPoison);
  index_k_scales = GuardedTensor(DType::bf16, {num_pages_, 1, block_size, 2}, spec.row_gap,
                                 GuardedTensor::kPoison);
  const auto at = [&](const GuardedTensor& tensor, std::int64_t page, std::int64_t token) {
    return core::address_at(tensor, core::offset_of(tensor.view(), page, 0, token));
  };
  for (std::size_t b = 0; b < spec.sequences.size(); ++b) {
    for (std::int64_t j = 0; j < spec.sequences[b].k; ++j) {
      const std::int32_t page = core::load_i32(page_table.view(), b, j / block_size);
      if (page < 0 || page >= num_pages_) continue;
      core::encode_index_key(
          at(index_k, page, j % block_size), spec.dtype, dim,
          reinterpret_cast<std::int8_t*>(at(index_k_codes, page, j % block_size)),
          reinterpret_cast<std::uint16_t*>(at(index_k_scales, page, j % block_size)));
    }
  }
}

void Inputs::make_queries() {
  const Problem& p = spec.problem;
  double scale = 1.0;
  if (spec.values == Values::large) scale = spec.dtype == DType::f16 ? 6e3 : 1e20;
  q = filled(spec.dtype, {total_q, p.num_q_heads, p.head_dim}, std::max(scale, coarse_scale()));
  index_q = filled(key_dtype(), {total_q, p.num_kv_heads, p.index_dim}, scale);
  if (!is_large()) dout = filled(spec.dtype, {total_q, p.num_q_heads, p.head_dim});
  if (supports<AppendKv>()) {
    new_k = filled(spec.dtype, {total_q, p.num_kv_heads, p.head_dim});
    new_v = filled(spec.dtype, {total_q, p.num_kv_heads, p.head_dim});
    new_index_k = filled(spec.dtype, {total_q, 1, p.index_dim});
  }
}

/// Last of all: what it draws from random_ moves nothing else.
void Inputs::make_norm_rope() {
  if (!supports<NormRopeAppendKv>()) return;
  const Problem& p = spec.problem;
  new_q = filled(spec.dtype, {total_q, p.num_q_heads, p.head_dim});
  new_index_q = filled(spec.dtype, {total_q, p.num_kv_heads, p.index_dim});
  if (!new_k.given()) {
    new_k = filled(spec.dtype, {total_q, p.num_kv_heads, p.head_dim});
    new_v = filled(spec.dtype, {total_q, p.num_kv_heads, p.head_dim});
    new_index_k = filled(spec.dtype, {total_q, 1, p.index_dim});
  }
  q_weight = filled(spec.dtype, {p.head_dim}, 0.3);
  k_weight = filled(DType::f32, {p.head_dim}, 0.3);
  index_q_weight = filled(DType::f32, {p.index_dim}, 0.3);
  index_k_weight = filled(spec.dtype, {p.index_dim}, 0.3);
  std::int64_t longest = 1;
  for (const Lengths& lengths : spec.sequences) longest = std::max(longest, lengths.k);
  const bool rotates = std::min(p.head_dim, p.index_dim) >= 2;
  const bool given_positions = rotates && spec.seed % 2 == 1;
  // Half of the smaller head is rotated, in M3 as well; an odd dim leaves one element more.
  const std::int64_t half = std::max<std::int64_t>(std::min(p.head_dim, p.index_dim) / 4, 1);
  const std::int64_t rows = given_positions ? longest : std::max<std::int64_t>(longest - 1, 1);
  if (rotates) {
    cos_sin = GuardedTensor(DType::f32, {rows, 2 * half}, spec.row_gap, GuardedTensor::kPoison);
  }
  for (std::int64_t row = 0; row < rows && rotates; ++row) {
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(row) *
                           std::pow(1e4, -static_cast<double>(i) / static_cast<double>(half));
      core::store(cos_sin.view(), std::cos(angle), row, i);
      core::store(cos_sin.view(), std::sin(angle), row, half + i);
    }
  }
  if (given_positions) {
    std::vector<double> numbers(static_cast<std::size_t>(total_q));
    for (double& number : numbers) number = static_cast<double>(below(random_, rows + 1));
    if (total_q > 2) numbers[1] = -1.0;  // outside the table, as are those that drew `rows`
    positions = ints({total_q}, 0, numbers);
  }
  const bool nans = spec.values == Values::nans;
  if ((!nans && spec.values != Values::infinities) || total_q == 0) return;
  const double special = nans ? kNan : kInf;
  core::store(new_q.view(), special, total_q - 1, 0, 0);
  core::store(new_k.view(), -special, total_q - 1, 0, 1 % p.head_dim);
  core::store(new_v.view(), special, total_q - 1, 0, 0);
  core::store(new_index_q.view(), special, total_q / 2, 0, 0);
  core::store(new_index_k.view(), special, total_q - 1, 0, 0);
}

/// No powers of two, and of another size for every head, so that no mistake in them is hidden.
void Inputs::make_scales() {
  if (spec.fp8 != Fp8::per_head && spec.fp8 != Fp8::one_scale) return;
  const std::int64_t heads = spec.problem.num_kv_heads;
  const auto scales = [&](double first, double step) {
    GuardedTensor tensor(DType::f32, {spec.fp8 == Fp8::per_head ? heads : 1}, 0,
                         GuardedTensor::kPoison);
    std::vector<double> values(static_cast<std::size_t>(tensor.view().num_elements()));
    for (std::size_t r = 0; r < values.size(); ++r) {
      values[r] = first + step * static_cast<double>(r);
    }
    set_values(tensor, values);
    return tensor;
  };
  k_scale = scales(0.61, 0.17);
  v_scale = scales(2.9, -0.013);
}

/// The scales of all KV heads; one of all has stride 0.
TensorView Inputs::of_all_heads(const GuardedTensor& scales) const {
  TensorView view = scales;
  if (spec.fp8 == Fp8::one_scale) {
    view.shape[0] = spec.problem.num_kv_heads;
    view.stride[0] = 0;
  }
  return view;
}

bool Inputs::is_large() const {
  std::int64_t products = 0;
  for (const Lengths& lengths : spec.sequences) {
    products += lengths.q * lengths.k * spec.problem.num_kv_heads * spec.problem.index_dim;
  }
  return products > std::int64_t{1} << 27;  // a second of the reference
}

/// Near the end of each sequence, so that some queries attend them and some do not.
void Inputs::plant_special_values() {
  const bool nans = spec.values == Values::nans;
  if (!nans && spec.values != Values::infinities) return;
  const double first = nans ? kNan : kInf;
  const double second = nans ? kNan : -kInf;
  const std::int64_t block_size = spec.problem.block_size;
  std::int64_t k_begin = 0;
  for (std::size_t b = 0; b < spec.sequences.size(); ++b) {
    const std::int64_t k_len = spec.sequences[b].k;
    const auto put = [&](const GuardedTensor& keys, std::int64_t j, std::int64_t head,
                         std::int64_t d, double element) {
      if (spec.keys == Keys::ragged) {
        core::store(keys.view(), element, k_begin + j, head, d);
      } else {
        const std::int32_t page = core::load_i32(page_table.view(), b, j / block_size);
        if (page < 0 || page >= num_pages_) return;
        core::store(keys.view(), element, page, head, j % block_size, d);
      }
    };
    if (k_len >= 3) {
      const Problem& p = spec.problem;
      put(v, k_len - 2, 0, 0, first);
      put(v, k_len - 2, 0, 1 % p.head_dim, second);
      put(k, k_len - 3, p.num_kv_heads - 1, 0, first);
      put(index_k, 0, 0, 0, first);
      put(index_k, k_len / 2, 0, 1 % p.index_dim, second);
    }
    k_begin += k_len;
  }
  if (nans && total_q >= 2) {
    core::store(q.view(), kNan, 0, 0, 0);
    core::store(index_q.view(), kNan, 1, 0, 0);
  }
}

void Inputs::make_block_scores() {
  const Problem& p = spec.problem;
  const DType dtype = spec.dtype == DType::f64 ? DType::f64 : DType::f32;
  block_scores = GuardedTensor(dtype, {p.num_kv_heads, total_q, num_blocks}, spec.row_gap,
                               GuardedTensor::kPoison);
  IndexerScores scores = args<IndexerScores>();
  scores.block_scores = block_scores;
  is_large() ? run_on_cpu(scores) : reference::indexer_scores(scores);
  const core::Sequences sequences(scores);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t r = 0; r < p.num_kv_heads; ++r) {
        for (std::int64_t b = 0; b < num_blocks; ++b) {
          const bool visible = sequence.position(i) >= b * p.block_size;
          const TensorView& view = block_scores;
          if (!visible) core::store(view, kInf, r, sequence.q_begin + i, b);
          if (visible && spec.values == Values::nans && b % 4 == 1) {
            core::store(view, b % 8 == 1 ? kNan : -kInf, r, sequence.q_begin + i, b);
          }
        }
      }
    }
  }
}

void Inputs::make_block_ids() {
  const Problem& p = spec.problem;
  block_ids = GuardedTensor(DType::i32, {p.num_kv_heads, total_q, p.top_k}, spec.row_gap,
                            GuardedTensor::kPoison);
  Indexer selection = args<Indexer>();
  selection.block_ids = block_ids;
  is_large() ? run_on_cpu(selection) : reference::indexer(selection);
  if (spec.selection == Selection::indexer) return;
  const core::Sequences sequences(selection);
  for (std::int64_t row = 0; row < total_q; ++row) {
    const core::Sequence sequence = sequences.of_query(row);
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    const std::int64_t visible = position < 0 ? 0 : position / p.block_size + 1;
    for (std::int64_t r = 0; r < p.num_kv_heads; ++r) {
      std::vector<std::int32_t> ids;
      if (spec.selection == Selection::scattered) {
        std::vector<std::int32_t> all(static_cast<std::size_t>(visible));
        std::iota(all.begin(), all.end(), 0);
        shuffle(all, random_);
        const std::int64_t count = std::min<std::int64_t>(below(random_, p.top_k + 1), visible);
        ids.assign(all.begin(), all.begin() + count);
      } else {
        for (int slot = 0; slot < p.top_k; ++slot) {
          const std::int32_t id = core::load_i32(block_ids.view(), r, row, slot);
          if (id >= 0) ids.push_back(id);
        }
      }
      const std::vector<std::int32_t> junk = {
          -1, static_cast<std::int32_t>(visible), std::numeric_limits<std::int32_t>::max(),
          std::numeric_limits<std::int32_t>::min(), static_cast<std::int32_t>(visible + 5)};
      for (std::size_t n = 0; static_cast<int>(ids.size()) < p.top_k; ++n) {
        ids.push_back(n < junk.size() ? junk[n] : -1);
      }
      shuffle(ids, random_);
      for (std::size_t slot = 0; slot < ids.size(); ++slot) {
        core::store_i32(block_ids.view(), ids[slot], r, row, slot);
      }
    }
  }
}

template <class Forward>
void Inputs::make_forward_results(GuardedTensor& out_tensor, GuardedTensor& lse_tensor) {
  const Problem& p = spec.problem;
  out_tensor = GuardedTensor(spec.dtype, {total_q, p.num_q_heads, p.head_dim}, spec.row_gap,
                             GuardedTensor::kPoison);
  lse_tensor = GuardedTensor(spec.dtype == DType::f64 ? DType::f64 : DType::f32,
                             {total_q, p.num_q_heads}, spec.row_gap, GuardedTensor::kPoison);
  auto forward = args<Forward>();
  forward.out = out_tensor;
  forward.lse = lse_tensor;
  if constexpr (requires { forward.block_ids; }) {
    reference::sparse_attention_forward(forward);
  } else {
    reference::dense_attention_forward(forward);
  }
  out_tensor.seal();
  lse_tensor.seal();
}

template <class Visit>
void Inputs::for_each_tensor(Visit visit) {
  visit("cu_seqlens_q", cu_seqlens_q);
  visit("cu_seqlens_k", cu_seqlens_k);
  visit("page_table", page_table);
  visit("seq_lens_k", seq_lens_k);
  visit("q", q);
  visit("k", k);
  visit("v", v);
  visit("k_scale", k_scale);
  visit("v_scale", v_scale);
  visit("index_q", index_q);
  visit("index_k", index_k);
  visit("index_k_codes", index_k_codes);
  visit("index_k_scales", index_k_scales);
  visit("block_scores", block_scores);
  visit("block_ids", block_ids);
  visit("dout", dout);
  visit("out", out);
  visit("lse", lse);
  visit("dense out", dense_out);
  visit("dense lse", dense_lse);
  visit("new k", new_k);
  visit("new v", new_v);
  visit("new index_k", new_index_k);
  visit("new q", new_q);
  visit("new index_q", new_index_q);
  visit("q_weight", q_weight);
  visit("k_weight", k_weight);
  visit("index_q_weight", index_q_weight);
  visit("index_k_weight", index_k_weight);
  visit("cos_sin", cos_sin);
  visit("positions", positions);
}

std::string Inputs::changed() {
  std::string text;
  for_each_tensor([&](const char* name, const GuardedTensor& tensor) {
    const std::string change = tensor.changed();
    if (text.empty() && !change.empty()) text = std::string("input ") + name + ": " + change;
  });
  return text;
}

std::vector<std::span<std::byte>> Inputs::buffers() {
  std::vector<std::span<std::byte>> all;
  for_each_tensor([&](const char*, const GuardedTensor& tensor) {
    if (tensor.given()) all.push_back(tensor.bytes());
  });
  return all;
}

template <>
IndexerScores Inputs::args() {
  return {.problem = spec.problem, .batch = batch, .index_q = index_q, .index_k = index_k};
}
template <>
SelectTopK Inputs::args() {
  // It reads no keys, so the page table has no meaning to it.
  Batch lengths = batch;
  lengths.page_table = {};
  return {.problem = spec.problem, .batch = lengths, .block_scores = block_scores};
}
template <>
Indexer Inputs::args() {
  return {.problem = spec.problem,
          .batch = batch,
          .index_q = index_q,
          .index_k = index_k,
          .index_k_codes = index_k_codes,
          .index_k_scales = index_k_scales};
}
template <>
SparseAttentionForward Inputs::args() {
  return {.problem = spec.problem,
          .batch = batch,
          .q = q,
          .k = k,
          .v = v,
          .block_ids = block_ids,
          .k_scale = of_all_heads(k_scale),
          .v_scale = of_all_heads(v_scale)};
}
template <>
IndexedAttentionForward Inputs::args() {
  const auto index = args<Indexer>();
  const auto attend = args<SparseAttentionForward>();
  return {.problem = index.problem,
          .batch = index.batch,
          .index_q = index.index_q,
          .index_k = index.index_k,
          .index_k_codes = index.index_k_codes,
          .index_k_scales = index.index_k_scales,
          .q = attend.q,
          .k = attend.k,
          .v = attend.v,
          .k_scale = attend.k_scale,
          .v_scale = attend.v_scale};
}
template <>
DenseAttentionForward Inputs::args() {
  return {.problem = spec.problem,
          .batch = batch,
          .q = q,
          .k = k,
          .v = v,
          .k_scale = of_all_heads(k_scale),
          .v_scale = of_all_heads(v_scale)};
}
template <>
SparseAttentionBackward Inputs::args() {
  GuardedTensor& of_out = warm_up ? dense_out : out;
  GuardedTensor& of_lse = warm_up ? dense_lse : lse;
  if (!of_out.given()) {
    warm_up ? make_forward_results<DenseAttentionForward>(of_out, of_lse)
            : make_forward_results<SparseAttentionForward>(of_out, of_lse);
  }
  return {.problem = spec.problem,
          .batch = batch,
          .q = q,
          .k = k,
          .v = v,
          .block_ids = warm_up ? TensorView{} : block_ids.view(),
          .out = of_out,
          .lse = of_lse,
          .dout = dout};
}
template <>
IndexerKlBackward Inputs::args() {
  return {.problem = spec.problem,
          .batch = batch,
          .q = q,
          .k = k,
          .index_q = index_q,
          .index_k = index_k,
          .block_ids = warm_up ? TensorView{} : block_ids.view(),
          .lse = teacher_lse != warm_up ? args<SparseAttentionBackward>().lse : TensorView{}};
}
template <>
AppendKv Inputs::args() {
  return {.problem = spec.problem, .batch = batch, .k = new_k, .v = new_v, .index_k = new_index_k};
}
template <>
NormRopeAppendKv Inputs::args() {
  return {.problem = spec.problem,
          .batch = batch,
          .q = new_q,
          .k = new_k,
          .v = new_v,
          .index_q = new_index_q,
          .index_k = new_index_k,
          .q_weight = q_weight,
          .k_weight = k_weight,
          .index_q_weight = index_q_weight,
          .index_k_weight = index_k_weight,
          .norm_weight_offset = spec.seed % 3 == 0 ? 0.0f : 1.0f,
          .cos_sin = cos_sin,
          .positions = positions,
          .k_scale = of_all_heads(k_scale),
          .v_scale = of_all_heads(v_scale)};
}

template <class Args>
bool Inputs::supports() const {
  const bool own_pages = spec.keys != Keys::ragged && spec.keys != Keys::shared_pages;
  if constexpr (requires(Args a) { a.q_out; }) {
    return own_pages && spec.dtype != DType::f64 && !is_large();
  } else if constexpr (requires(Args a) { a.k_pages; }) {
    return own_pages && spec.fp8 == Fp8::none;
  } else if constexpr (requires(Args a) { a.dq; } || requires(Args a) { a.dindex_q; }) {
    return spec.keys == Keys::ragged && spec.fp8 == Fp8::none && !is_large();
  } else if constexpr (requires(Args a) {
                         a.block_scores;
                         a.block_ids;
                       }) {
    return batch.cu_seqlens_k.given() || batch.seq_lens_k.given();
  } else {
    return true;
  }
}

// NOLINTBEGIN(bugprone-macro-parentheses): the argument is a type
#define MSA_INSTANTIATE(Args) template bool Inputs::supports<Args>() const;
// NOLINTEND(bugprone-macro-parentheses)
MSA_FOR_EACH_OPERATION(MSA_INSTANTIATE)
#undef MSA_INSTANTIATE

}  // namespace msa::testing
