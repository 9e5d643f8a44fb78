// SPDX-License-Identifier: Apache-2.0
//
// Bytes become a sound request of one operation through msa.h, of which a few fields, strides or
// numbers are then changed. Every tensor is an allocation of exactly the bytes that its view spans,
// so that AddressSanitizer sees any access outside. A request either gets a status that says what
// is wrong or runs; it must not do anything else.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/scalar.hpp"
#include "msa/msa.h"
#include "msa/tensor.hpp"
#include "tests/fuzz/byte_reader.hpp"

namespace msa::fuzz {
namespace {

// What is larger is planned but not run: it would be slow, not wrong.
constexpr std::int64_t kMostElements = 1 << 15;
constexpr std::int64_t kMostBytes = 1 << 20;
constexpr std::size_t kMostWorkspaceBytes = std::size_t{1} << 25;
constexpr std::int64_t kMostTokens = 1 << 12;  // that a query may attend

/// A tensor as a sound request has it.
struct Field {
  msa_tensor* tensor;
  std::vector<std::int64_t> shape;
  std::int32_t dtype;
};

/// Bytes that a view spans, and where its element 0 lies in them.
struct Extent {
  bool is_small = false;
  std::int64_t bytes = 0;
  std::int64_t origin = 0;
};

Extent extent_of(const msa_tensor& tensor) {
  if (tensor.rank < 0 || tensor.rank > MSA_MAX_RANK) return {};
  if (tensor.dtype < MSA_F32 || tensor.dtype > MSA_I32) return {};
  __extension__ using Wide = __int128;
  Wide count = 1;
  Wide lowest = 0;
  Wide highest = 0;
  for (std::int32_t axis = 0; axis < tensor.rank; ++axis) {
    if (tensor.shape[axis] < 0 || tensor.shape[axis] > kMostElements) return {};
    count *= tensor.shape[axis];
    const Wide reach = Wide{tensor.shape[axis] - 1} * tensor.stride[axis];
    (reach < 0 ? lowest : highest) += reach;
    if (count > kMostElements) return {};
  }
  const auto size = static_cast<std::int64_t>(size_of(static_cast<DType>(tensor.dtype)));
  if (count == 0) return {.is_small = true};
  const Wide bytes = (highest - lowest + 1) * size;
  if (bytes > kMostBytes) return {};
  return {.is_small = true,
          .bytes = static_cast<std::int64_t>(bytes),
          .origin = static_cast<std::int64_t>(-lowest) * size};
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

/// Exactly so many bytes, aligned for vectors.
Memory allocate(std::size_t bytes) {
  void* memory = nullptr;
  expect(posix_memalign(&memory, 64, bytes) == 0, "no memory for ", bytes, " bytes");
  return Memory(static_cast<std::byte*>(memory));
}

class Request {
 public:
  explicit Request(ByteReader& bytes) : bytes_(bytes), random_(bytes.take<std::uint16_t>()) {
    make_problem();
    make_batch();
  }

  /// Makes a request of it, plans it and runs it.
  template <class Args>
  void check(Args& args, std::vector<Field> fields,
             msa_status (*plan)(const Args*, const msa_options*, msa_plan**),
             msa_status (*run)(const msa_plan*, const Args*, void*, std::size_t, void*)) {
    args.struct_size = sizeof(args);
    args.problem = &problem_;
    args.batch = bytes_.below(16) == 0 ? nullptr : &batch_;
    for (const Field& field : batch_fields_) fields.push_back(field);
    for (const Field& field : fields) lay_out(field);
    for (int changes = bytes_.below(4); changes > 0; --changes) change(args, fields);
    bool runs = problem_.block_size <= kMostTokens && problem_.top_k <= kMostTokens &&
                std::int64_t{problem_.block_size} * problem_.top_k <= 4 * kMostTokens &&
                problem_.head_dim <= 1024 && problem_.index_dim <= 1024;
    runs = runs && (batch_.page_table.rank != 2 ||
                    batch_.page_table.shape[1] <= kMostTokens / std::max(problem_.block_size, 1));
    for (const Field& field : fields) runs = back(field) && runs;

    msa_options options{.struct_size = sizeof(options),
                        .backend = bytes_.one_of<const char*>({nullptr, "cpu", "reference", ""}),
                        .allow_nondeterministic = bytes_.below(2)};
    msa_plan* made = nullptr;
    const msa_status status = plan(&args, &options, &made);
    check_status(status);
    expect((status == MSA_OK) == (made != nullptr), "status ", status, " and plan disagree");
    if (made == nullptr) return;
    const std::unique_ptr<msa_plan, void (*)(msa_plan*)> owner(made, msa_plan_destroy);
    const std::size_t workspace_bytes = msa_plan_workspace_bytes(made);
    if (!runs || workspace_bytes > kMostWorkspaceBytes) return;
    const Memory workspace = allocate(workspace_bytes);
    std::fill_n(workspace.get(), workspace_bytes, std::byte{0xff});
    if (workspace_bytes != 0) {
      expect(
          run(made, &args, workspace.get(), workspace_bytes - 1, nullptr) == MSA_INVALID_ARGUMENT,
          "a workspace that is too small was taken");
    }
    check_status(run(made, &args, workspace.get(), workspace_bytes, nullptr));
    check_other_layout(args, fields, made, run, workspace.get(), workspace_bytes);
  }

  std::int64_t total_q() const { return total_q_; }
  const msa_problem& problem() const { return problem_; }
  bool is_paged() const { return is_paged_; }
  std::int32_t dtype() const { return dtype_; }
  std::int32_t wide_dtype() const { return dtype_ == MSA_F64 ? MSA_F64 : MSA_F32; }
  std::int64_t num_blocks() const {
    return (longest_ + problem_.block_size - 1) / problem_.block_size;
  }

  std::vector<std::int64_t> queries(std::int64_t heads, std::int64_t dim) const {
    return {total_q_, heads, dim};
  }
  std::vector<std::int64_t> keys(std::int64_t heads, std::int64_t dim) const {
    if (is_paged_) return {num_pages_, heads, problem_.block_size, dim};
    return {total_k_, heads, dim};
  }
  std::vector<std::int64_t> pages(std::int64_t heads, std::int64_t dim) const {
    return {num_pages_, heads, problem_.block_size, dim};
  }
  bool flip() { return bytes_.below(2) != 0; }

 private:
  void make_problem() {
    problem_.struct_size = sizeof(problem_);
    problem_.num_kv_heads = bytes_.one_of({1, 2, 3});
    problem_.num_q_heads = problem_.num_kv_heads * bytes_.one_of({1, 2, 5});
    problem_.head_dim = bytes_.one_of({1, 5, 16, 33});
    problem_.index_dim = bytes_.one_of({1, 3, 16, 40});
    problem_.block_size = bytes_.one_of({16, 16, 32, 64});
    problem_.num_init_blocks = bytes_.one_of({0, 0, 1, 2});
    problem_.num_local_blocks = bytes_.one_of({0, 1, 2, 3});
    problem_.top_k = problem_.num_init_blocks + std::max(problem_.num_local_blocks, 1) +
                     bytes_.one_of({0, 1, 2, 13});
    dtype_ = bytes_.one_of<std::int32_t>({MSA_F32, MSA_BF16, MSA_F16, MSA_F64, MSA_E4M3});
  }

  void make_batch() {
    batch_.struct_size = sizeof(batch_);
    const int kind = bytes_.below(4);  // 0: one sequence without offsets
    is_paged_ = kind >= 2;
    const int size = kind == 0 ? 1 : bytes_.below(5);
    const bool equal = bytes_.below(3) == 0;
    const int q_len = bytes_.below(20);
    offsets_q_ = {0};
    offsets_k_ = {0};
    for (int b = 0; b < size; ++b) {
      total_q_ += equal ? q_len : bytes_.below(20);
      const int k_len = bytes_.below(90);
      total_k_ += k_len;
      longest_ = std::max<std::int64_t>(longest_, k_len);
      offsets_q_.push_back(static_cast<std::int32_t>(total_q_));
      offsets_k_.push_back(static_cast<std::int32_t>(total_k_));
      lengths_.push_back(k_len);
    }
    if (kind == 0) return;
    const auto count = [](const auto& values) { return static_cast<std::int64_t>(values.size()); };
    if (!equal) batch_fields_.push_back({&batch_.cu_seqlens_q, {count(offsets_q_)}, MSA_I32});
    if (!is_paged_) {
      batch_fields_.push_back({&batch_.cu_seqlens_k, {count(offsets_k_)}, MSA_I32});
    } else {
      num_pages_ = 1 + bytes_.below(8);
      batch_fields_.push_back(
          {&batch_.page_table, {size, num_blocks() + bytes_.below(2)}, MSA_I32});
      batch_fields_.push_back({&batch_.seq_lens_k, {size}, MSA_I32});
    }
    if (bytes_.below(3) == 0) batch_.max_seq_len_k = longest_;
  }

  void lay_out(const Field& field) {
    msa_tensor& tensor = *field.tensor;
    tensor.dtype = field.dtype;
    tensor.rank = static_cast<std::int32_t>(field.shape.size());
    const int gap = bytes_.one_of({0, 0, 1, 3});
    std::int64_t stride = 1;
    for (std::size_t axis = field.shape.size(); axis-- > 0;) {
      tensor.shape[axis] = field.shape[axis];
      tensor.stride[axis] = stride;
      stride = stride * field.shape[axis] + gap;
    }
  }

  std::int64_t any_number() {
    switch (bytes_.below(6)) {
      case 0:
        return bytes_.below(8) - 2;
      case 1:
        return bytes_.take<std::int64_t>();
      case 2:
        return std::int64_t{1} << bytes_.below(64) % 63;
      case 3:
        return -(std::int64_t{1} << bytes_.below(64) % 63);
      case 4:
        return std::numeric_limits<std::int64_t>::max() - bytes_.below(4);
      default:
        return bytes_.take<std::int16_t>();
    }
  }
  std::int32_t any_int() {
    if (bytes_.below(3) == 0) {
      return bytes_.one_of({std::numeric_limits<std::int32_t>::max(),
                            std::numeric_limits<std::int32_t>::min(), 1 << 30, -1});
    }
    return static_cast<std::int32_t>(any_number());
  }

  template <class Args>
  void change(Args& args, const std::vector<Field>& fields) {
    msa_tensor& tensor =
        *fields[static_cast<std::size_t>(bytes_.below(static_cast<int>(fields.size())))].tensor;
    const int axis = bytes_.below(MSA_MAX_RANK);
    switch (bytes_.below(12)) {
      case 0:
        tensor.shape[axis] = any_number();
        break;
      case 1:
      case 2:
        tensor.stride[axis] = any_number();
        break;
      case 3:
        tensor.rank = any_int();
        break;
      case 4:
        tensor.dtype = any_int();
        break;
      case 5:
        tensor.dtype = bytes_.below(MSA_I32 + 1);
        break;
      case 6:
        (bytes_.below(2) == 0 ? tensor.device_type : tensor.device_index) = any_int();
        break;
      case 7:
        tensor = {};
        break;
      case 8: {
        std::int32_t* const numbers[] = {&problem_.num_q_heads,     &problem_.num_kv_heads,
                                         &problem_.head_dim,        &problem_.index_dim,
                                         &problem_.block_size,      &problem_.top_k,
                                         &problem_.num_init_blocks, &problem_.num_local_blocks};
        *numbers[bytes_.below(8)] = any_int();
        break;
      }
      case 9:
        (bytes_.below(2) == 0 ? batch_.max_seq_len_q : batch_.max_seq_len_k) = any_number();
        break;
      case 10:
        break_int_ = true;
        break;
      default: {
        // Only lengths up to the struct's: behind it lies memory that is nobody's.
        std::size_t* const sizes[] = {&problem_.struct_size, &batch_.struct_size,
                                      &args.struct_size};
        std::size_t& size = *sizes[bytes_.below(3)];
        size = std::min<std::size_t>(size, bytes_.take<std::uint8_t>());
      }
    }
  }

  /// Gives a field its memory; false where it can't have any.
  bool back(const Field& field) {
    msa_tensor& tensor = *field.tensor;
    const Extent extent = extent_of(tensor);
    if (!extent.is_small) return false;
    if (tensor.rank == 0) return true;
    memory_.push_back(allocate(static_cast<std::size_t>(extent.bytes)));
    std::byte* const first = memory_.back().get();
    tensor.data = first + extent.origin;
    const auto dtype = static_cast<DType>(tensor.dtype);
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    for (std::int64_t at = 0; at < extent.bytes; at += size) {
      if (size == 1) {
        first[at] = static_cast<std::byte>(random_());
      } else {
        core::store_element(first + at, dtype, dtype == DType::i32 ? any_id() : any_value());
      }
    }
    if (tensor.rank == 1 && field.dtype == MSA_I32 && dtype == DType::i32) fill_lengths(field);
    return true;
  }

  /// A block or page id, mostly of something that exists.
  double any_id() {
    if (random_() % 16 == 0) return static_cast<double>(static_cast<std::int32_t>(random_()));
    return static_cast<double>(random_() % 9) - 1.0;
  }
  double any_value() {
    switch (random_() % 64) {
      case 0:
        return std::numeric_limits<double>::infinity();
      case 1:
        return std::numeric_limits<double>::quiet_NaN();
      case 2:
        return 1e20;
      default:
        return static_cast<double>(random_() % 65) / 16.0 - 2.0;
    }
  }

  void fill_lengths(const Field& field) {
    const std::vector<std::int32_t>* values = nullptr;
    if (field.tensor == &batch_.cu_seqlens_q) values = &offsets_q_;
    if (field.tensor == &batch_.cu_seqlens_k) values = &offsets_k_;
    if (field.tensor == &batch_.seq_lens_k) values = &lengths_;
    if (values == nullptr) return;
    const msa_tensor& tensor = *field.tensor;
    const auto count =
        std::min<std::int64_t>(tensor.shape[0], static_cast<std::int64_t>(values->size()));
    for (std::int64_t i = 0; i < count; ++i) {
      auto* const at = static_cast<std::int32_t*>(tensor.data) + i * tensor.stride[0];
      *at = (*values)[static_cast<std::size_t>(i)];
      if (break_int_ && bytes_.below(3) == 0) *at = any_int();
    }
  }

  void check_status(msa_status status) {
    const bool has_text = *msa_last_error() != '\0';
    expect(has_text == (status != MSA_OK), "status ", status, " with the text '", msa_last_error(),
           "'");
    expect(status == MSA_OK || status == MSA_INVALID_ARGUMENT || status == MSA_UNSUPPORTED,
           "status ", status, ": ", msa_last_error());
  }

  /// A run must refuse what was not planned.
  template <class Args>
  void check_other_layout(const Args& args, const std::vector<Field>& fields, const msa_plan* plan,
                          msa_status (*run)(const msa_plan*, const Args*, void*, std::size_t,
                                            void*),
                          void* workspace, std::size_t workspace_bytes) {
    msa_tensor& tensor =
        *fields[static_cast<std::size_t>(bytes_.below(static_cast<int>(fields.size())))].tensor;
    const auto is_batch = [&](const Field& field) { return field.tensor == &tensor; };
    if (args.batch == nullptr &&
        std::any_of(batch_fields_.begin(), batch_fields_.end(), is_batch)) {
      return;
    }
    // Behind a shorter struct_size a field is not read.
    const bool is_whole = args.struct_size == sizeof(args) && batch_.struct_size == sizeof(batch_);
    if (tensor.rank == 0 || !is_whole) return;
    const int axis = bytes_.below(tensor.rank);
    std::int64_t& number = bytes_.below(2) == 0 ? tensor.shape[axis] : tensor.stride[axis];
    number ^= 1;
    expect(run(plan, &args, workspace, workspace_bytes, nullptr) == MSA_INVALID_ARGUMENT,
           "another layout than the planned one was taken");
  }

  ByteReader& bytes_;
  std::minstd_rand random_;
  msa_problem problem_{};
  msa_batch batch_{};
  std::int32_t dtype_ = MSA_F32;
  bool is_paged_ = false;
  bool break_int_ = false;
  std::int64_t total_q_ = 0;
  std::int64_t total_k_ = 0;
  std::int64_t longest_ = 0;
  std::int64_t num_pages_ = 0;
  std::vector<std::int32_t> offsets_q_, offsets_k_, lengths_;
  std::vector<Field> batch_fields_;
  std::vector<Memory> memory_;
};

void run_operation(int operation, ByteReader& bytes) {
  Request request(bytes);
  const msa_problem& p = request.problem();
  const std::int32_t dtype = request.dtype();
  const std::int32_t wide = request.wide_dtype();
  const std::int64_t total_q = request.total_q();
  const std::vector<std::int64_t> q = request.queries(p.num_q_heads, p.head_dim);
  const std::vector<std::int64_t> kv = request.keys(p.num_kv_heads, p.head_dim);
  const std::vector<std::int64_t> index_q = request.queries(p.num_kv_heads, p.index_dim);
  const std::vector<std::int64_t> index_k = request.keys(1, p.index_dim);
  const std::vector<std::int64_t> scores = {p.num_kv_heads, total_q, request.num_blocks()};
  const std::vector<std::int64_t> ids = {p.num_kv_heads, total_q, p.top_k};
  const std::vector<std::int64_t> lse = {total_q, p.num_q_heads};
  // Keys and values of the forward operations, some in e4m3 with scales.
  const auto add_kv = [&](auto& a, std::vector<Field>& fields) {
    const bool fp8 = request.flip();
    fields.push_back({&a.k, kv, fp8 ? MSA_E4M3 : dtype});
    fields.push_back({&a.v, kv, fp8 ? MSA_E4M3 : dtype});
    if (!fp8 || !request.flip()) return;
    fields.push_back({&a.k_scale, {p.num_kv_heads}, MSA_F32});
    fields.push_back({&a.v_scale, {p.num_kv_heads}, MSA_F32});
  };
  switch (operation) {
    case 0: {
      msa_indexer_scores a{};
      a.index_scale = bytes.one_of({0.0f, 1.0f, -1.0f, 1e30f});
      return request.check(a,
                           {{&a.index_q, index_q, dtype},
                            {&a.index_k, index_k, dtype},
                            {&a.block_scores, scores, wide}},
                           msa_plan_indexer_scores, msa_run_indexer_scores);
    }
    case 1: {
      msa_select_top_k a{};
      return request.check(a, {{&a.block_scores, scores, wide}, {&a.block_ids, ids, MSA_I32}},
                           msa_plan_select_top_k, msa_run_select_top_k);
    }
    case 2: {
      msa_indexer a{};
      std::vector<Field> fields = {
          {&a.index_q, index_q, dtype}, {&a.index_k, index_k, dtype}, {&a.block_ids, ids, MSA_I32}};
      if (request.flip()) {
        fields.push_back({&a.index_k_codes, request.pages(1, p.index_dim), MSA_I8});
        fields.push_back({&a.index_k_scales, request.pages(1, 2), MSA_BF16});
      }
      return request.check(a, fields, msa_plan_indexer, msa_run_indexer);
    }
    case 3: {
      msa_sparse_attention_forward a{};
      a.softmax_scale = bytes.one_of({0.0f, 1.0f, -1.0f, 1e30f});
      std::vector<Field> fields = {
          {&a.q, q, dtype}, {&a.block_ids, ids, MSA_I32}, {&a.out, q, dtype}};
      if (request.flip()) fields.push_back({&a.lse, lse, wide});
      add_kv(a, fields);
      return request.check(a, fields, msa_plan_sparse_attention_forward,
                           msa_run_sparse_attention_forward);
    }
    case 4: {
      msa_dense_attention_forward a{};
      std::vector<Field> fields = {{&a.q, q, dtype}, {&a.out, q, dtype}};
      if (request.flip()) fields.push_back({&a.lse, lse, wide});
      add_kv(a, fields);
      return request.check(a, fields, msa_plan_dense_attention_forward,
                           msa_run_dense_attention_forward);
    }
    case 5: {
      msa_sparse_attention_backward a{};
      std::vector<Field> fields = {{&a.q, q, dtype},   {&a.k, kv, dtype},   {&a.v, kv, dtype},
                                   {&a.out, q, dtype}, {&a.lse, lse, wide}, {&a.dout, q, dtype},
                                   {&a.dq, q, dtype},  {&a.dk, kv, dtype},  {&a.dv, kv, dtype}};
      if (request.flip()) fields.push_back({&a.block_ids, ids, MSA_I32});
      return request.check(a, fields, msa_plan_sparse_attention_backward,
                           msa_run_sparse_attention_backward);
    }
    case 6: {
      msa_indexer_kl_backward a{};
      std::vector<Field> fields = {{&a.q, q, dtype},
                                   {&a.k, kv, dtype},
                                   {&a.index_q, index_q, dtype},
                                   {&a.index_k, index_k, dtype}};
      if (request.flip()) fields.push_back({&a.block_ids, ids, MSA_I32});
      if (request.flip()) fields.push_back({&a.loss, {1}, wide});
      if (request.flip()) {
        fields.push_back({&a.dindex_q, index_q, dtype});
        fields.push_back({&a.dindex_k, index_k, dtype});
      }
      return request.check(a, fields, msa_plan_indexer_kl_backward, msa_run_indexer_kl_backward);
    }
    default: {
      msa_append_kv a{};
      const std::vector<std::int64_t> pages = request.pages(p.num_kv_heads, p.head_dim);
      std::vector<Field> fields = {{&a.k, request.queries(p.num_kv_heads, p.head_dim), dtype},
                                   {&a.k_pages, pages, dtype}};
      if (request.flip()) {
        fields.push_back({&a.v, request.queries(p.num_kv_heads, p.head_dim), dtype});
        fields.push_back({&a.v_pages, pages, request.flip() ? dtype : wide});
      }
      if (request.flip()) {
        fields.push_back({&a.index_k, request.queries(1, p.index_dim), dtype});
        fields.push_back({&a.index_k_pages, request.pages(1, p.index_dim), dtype});
        if (request.flip()) {
          fields.push_back({&a.index_k_codes_pages, request.pages(1, p.index_dim), MSA_I8});
          fields.push_back({&a.index_k_scales_pages, request.pages(1, 2), MSA_BF16});
        }
      }
      return request.check(a, fields, msa_plan_append_kv, msa_run_append_kv);
    }
  }
}

}  // namespace

void c_api(Bytes bytes) {
  ByteReader reader(bytes);
  const int threads = reader.one_of({1, 1, 1, 2});
  if (msa_num_threads() != threads) msa_set_num_threads(threads);
  run_operation(reader.below(8), reader);
}

}  // namespace msa::fuzz
