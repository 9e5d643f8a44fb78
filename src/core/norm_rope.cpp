// SPDX-License-Identifier: Apache-2.0
#include "core/norm_rope.hpp"

#include <cmath>
#include <span>

#include "core/index_code.hpp"

namespace msa::core {
namespace {

constexpr std::size_t kPartials = 32;  // lanes of a warp
constexpr std::size_t kPerPartial = 4;

float load_f32(const TensorView& view, std::int64_t offset) {
  return static_cast<float>(load_element(address_at(view, offset), view.dtype));
}

void norm(std::span<float> x, const TensorView& weight, float eps, float weight_offset) {
  float s[kPartials] = {};
  for (std::size_t d = 0; d < x.size(); ++d) {
    const float square = x[d] * x[d];
    s[d / kPerPartial % kPartials] += square;
  }
  // The other order of the two addends that half of the lanes have gives the same sum.
  for (std::size_t o = kPartials / 2; o > 0; o /= 2) {
    for (std::size_t l = 0; l < o; ++l) s[l] += s[l + o];
  }
  const float r = 1.0f / std::sqrt(s[0] / static_cast<float>(x.size()) + eps);
  for (std::size_t d = 0; d < x.size(); ++d) {
    const float factor =
        load_f32(weight, static_cast<std::int64_t>(d) * weight.stride[0]) + weight_offset;
    x[d] = x[d] * r * factor;
  }
}

void rotate(std::span<float> y, const TensorView& cos_sin, std::int64_t position) {
  const std::int64_t half = cos_sin.shape[1] / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float cosine = load_f32(cos_sin, offset_of(cos_sin, position, i));
    const float sine = load_f32(cos_sin, offset_of(cos_sin, position, i + half));
    float& first = y[static_cast<std::size_t>(i)];
    float& second = y[static_cast<std::size_t>(i + half)];
    const float a = first;
    const float b = second;
    const float a_cos = a * cosine;
    const float b_sin = b * sine;
    const float b_cos = b * cosine;
    const float a_sin = a * sine;
    first = a_cos - b_sin;
    second = b_cos + a_sin;
  }
}

struct Rows {
  const TensorView& rows;
  const TensorView* weight;  ///< null: neither normed nor rotated
  const TensorView& to;
  const TensorView* scale;
};

}  // namespace

NormRopeScratch::NormRopeScratch(const NormRopeAppendKv& args)
    : row(static_cast<std::size_t>(std::max(args.problem.head_dim, args.problem.index_dim))),
      codes(static_cast<std::size_t>(args.problem.index_dim)) {}

void norm_rope_append(const NormRopeAppendKv& args, const Sequences& sequences, std::int64_t token,
                      NormRopeScratch& scratch) {
  const Sequence sequence = sequences.of_query(token);
  const std::int64_t p = sequence.position(token - sequence.q_begin);
  if (p < 0) return;
  const std::int64_t turn = args.positions.given() ? load_i32(args.positions, token) : p;
  const bool rotates = args.cos_sin.given();
  if (rotates && (turn < 0 || turn >= args.cos_sin.shape[0])) return;
  const std::int64_t block_size = args.problem.block_size;
  const std::int64_t id = load_i32(args.batch.page_table, sequence.batch_idx, p / block_size);
  const std::int64_t page = id < key_tensor(args).shape[0] ? id : -1;
  const std::int64_t slot = p % block_size;

  // The row of a head as it is before it is rounded, in scratch.row.
  const auto compute = [&](const Rows& r, std::int64_t head) {
    const std::span<float> x(scratch.row.data(), static_cast<std::size_t>(r.rows.shape[2]));
    const std::int64_t from = offset_of(r.rows, token, head);
    for (std::size_t d = 0; d < x.size(); ++d) {
      x[d] = load_f32(r.rows, from + static_cast<std::int64_t>(d) * r.rows.stride[2]);
    }
    if (r.weight == nullptr) return;
    if (r.weight->given()) norm(x, *r.weight, args.norm_eps, args.norm_weight_offset);
    if (rotates) rotate(x, args.cos_sin, turn);
  };
  const auto write = [&](const Rows& r, std::int64_t head, std::int64_t to, std::int64_t stride) {
    const float scale = r.scale != nullptr && r.scale->given()
                            ? load_f32(*r.scale, head * r.scale->stride[0])
                            : 1.0f;
    for (std::int64_t d = 0; d < r.rows.shape[2]; ++d) {
      const float value = scratch.row[static_cast<std::size_t>(d)] / scale;
      store_element(address_at(r.to, to + d * stride), r.to.dtype, static_cast<double>(value));
    }
  };
  for (const Rows& r : {Rows{args.q, &args.q_weight, args.q_out, nullptr},
                        Rows{args.index_q, &args.index_q_weight, args.index_q_out, nullptr}}) {
    if (!r.rows.given()) continue;
    for (std::int64_t head = 0; head < r.rows.shape[1]; ++head) {
      compute(r, head);
      write(r, head, offset_of(r.to, token, head), r.to.stride[2]);
    }
  }
  if (page < 0) return;
  for (const Rows& r : {Rows{args.k, &args.k_weight, args.k_pages, &args.k_scale},
                        Rows{args.v, nullptr, args.v_pages, &args.v_scale},
                        Rows{args.index_k, &args.index_k_weight, args.index_k_pages, nullptr}}) {
    if (!r.rows.given()) continue;
    for (std::int64_t head = 0; head < r.rows.shape[1]; ++head) {
      compute(r, head);
      write(r, head, offset_of(r.to, page, head, slot), r.to.stride[3]);
    }
  }
  if (!args.index_k_codes_pages.given()) return;
  const TensorView& keys = args.index_k_pages;
  const std::int64_t dim = args.problem.index_dim;
  for (std::int64_t d = 0; d < dim; ++d) {
    scratch.row[static_cast<std::size_t>(d)] = load_f32(keys, offset_of(keys, page, 0, slot, d));
  }
  std::uint16_t scale_and_error[2];
  encode_index_key(reinterpret_cast<const std::byte*>(scratch.row.data()), DType::f32, dim,
                   scratch.codes.data(), scale_and_error);
  for (std::int64_t d = 0; d < dim; ++d) {
    store_i8(args.index_k_codes_pages, scratch.codes[static_cast<std::size_t>(d)], page, 0, slot,
             d);
  }
  for (int part = 0; part < 2; ++part) {
    std::memcpy(address_at(args.index_k_scales_pages,
                           offset_of(args.index_k_scales_pages, page, 0, slot, part)),
                &scale_and_error[part], sizeof(std::uint16_t));
  }
}

}  // namespace msa::core
