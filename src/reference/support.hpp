// SPDX-License-Identifier: Apache-2.0
//
// What several operations of the reference share: rows of tensors, the support of a query, softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/check.hpp"
#include "core/sequences.hpp"
#include "reference/reference.hpp"

namespace msa::reference {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// One vector of a tensor: its last axis at fixed leading indices.
struct Row {
  const TensorView* view = nullptr;
  std::int64_t offset = 0;  ///< elements

  std::int64_t address(std::int64_t d) const {
    return offset + d * view->stride[static_cast<std::size_t>(view->rank - 1)];
  }
  double operator[](std::int64_t d) const {
    return core::load_element(core::address_at(*view, address(d)), view->dtype);
  }
};

template <class... Indices>
Row row_of(const TensorView& view, Indices... indices) {
  return {&view, core::offset_of(view, indices...)};
}

/// Token j of a sequence, whose page must exist.
inline Row token_row(const TensorView& keys, const Batch& batch, std::int64_t block_size,
                     const core::Sequence& sequence, std::int64_t head, std::int64_t j) {
  const core::BlockRows rows =
      core::block_rows(keys, batch, block_size, sequence, head, j / block_size);
  return {&keys, rows.offset + j % block_size * rows.token_stride};
}

inline double dot(const Row& a, const Row& b, std::int64_t dim) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) sum += a[d] * b[d];
  return sum;
}

inline double scale_or_default(float scale, int dim) {
  return scale != 0.0f ? static_cast<double>(scale) : 1.0 / std::sqrt(static_cast<double>(dim));
}

/// Appends the tokens 0..p of block b, unless the block is invisible at p or its page doesn't
/// exist.
inline void append_visible(std::vector<std::int64_t>& tokens, const TensorView& keys,
                           const Batch& batch, std::int64_t block_size,
                           const core::Sequence& sequence, std::int64_t p, std::int64_t b) {
  if (p < 0 || b < 0 || b > p / block_size) return;
  if (core::block_rows(keys, batch, block_size, sequence, 0, b).num_tokens == 0) return;
  for (std::int64_t j = b * block_size; j < (b + 1) * block_size && j <= p; ++j) {
    tokens.push_back(j);
  }
}

/// T[r, i] of the paper, ascending: the visible tokens of the blocks selected for KV head r, or all
/// visible tokens where the operation has no block_ids.
template <class Args>
std::vector<std::int64_t> support(const Args& args, const core::Sequence& sequence, std::int64_t r,
                                  std::int64_t i) {
  const std::int64_t p = sequence.position(i);
  std::vector<std::int64_t> T;
  const auto append = [&](std::int64_t b) {
    append_visible(T, args.k, args.batch, args.problem.block_size, sequence, p, b);
  };
  if constexpr (requires { args.block_ids; }) {
    if (args.block_ids.given()) {
      for (int slot = 0; slot < args.problem.top_k; ++slot) {
        append(core::load_i32(args.block_ids, r, sequence.q_begin + i, slot));
      }
      std::sort(T.begin(), T.end());
      return T;
    }
  }
  for (std::int64_t b = 0; b <= p / args.problem.block_size; ++b) append(b);
  return T;
}

/// What elements of KV head r are multiplied by; 1 where no scale is given.
inline double head_scale(const TensorView& scale, std::int64_t r) {
  return scale.given() ? core::load(scale, r) : 1.0;
}

/// S[j] of query head h and the tokens T.
template <class Args>
std::vector<double> attention_scores(const Args& args, const core::Sequence& sequence,
                                     std::int64_t h, std::int64_t i,
                                     const std::vector<std::int64_t>& T) {
  const Problem& problem = args.problem;
  double scale = scale_or_default(args.softmax_scale, problem.head_dim);
  if constexpr (requires { args.k_scale; }) {
    scale *= head_scale(args.k_scale, h / problem.group_size());
  }
  const Row q = row_of(args.q, sequence.q_begin + i, h);
  std::vector<double> S;
  for (std::int64_t j : T) {
    const Row k =
        token_row(args.k, args.batch, problem.block_size, sequence, h / problem.group_size(), j);
    S.push_back(scale * dot(q, k, problem.head_dim));
  }
  return S;
}

/// The largest entry that is no NaN, -inf where there is none.
inline double max_of(const std::vector<double>& S) {
  double m = -kInfinity;
  for (double s : S) m = s > m ? s : m;
  return m;
}

/// exp(s - m); a score of -inf weighs nothing, even where m is -inf too.
inline double weight(double s, double m) { return s == -kInfinity ? 0.0 : std::exp(s - m); }

/// log(sum(exp(S))); -inf where nothing weighs anything, NaN where an entry is NaN.
inline double log_sum_exp(const std::vector<double>& S) {
  const double m = max_of(S);
  double sum = 0.0;
  for (double s : S) sum += weight(s, m);
  return m + std::log(sum);
}

/// All zeros where nothing weighs anything.
inline std::vector<double> softmax(const std::vector<double>& S) {
  const double m = max_of(S);
  std::vector<double> P;
  double sum = 0.0;
  for (double s : S) {
    P.push_back(weight(s, m));
    sum += P.back();
  }
  if (sum == 0.0) return P;
  for (double& probability : P) probability /= sum;
  return P;
}

/// O[i, h] and its LSE over the tokens T (paper eq. 8).
template <class Args>
void attend(const Args& args, const core::Sequence& sequence, std::int64_t h, std::int64_t i,
            const std::vector<std::int64_t>& T, Rounding rounding) {
  const Problem& problem = args.problem;
  const std::int64_t row = sequence.q_begin + i;
  std::vector<double> S = attention_scores(args, sequence, h, i, T);
  if (rounding == Rounding::bf16) {
    for (double& s : S) s = static_cast<double>(static_cast<float>(s));
  }
  const double m = max_of(S);
  std::vector<double> O(static_cast<std::size_t>(problem.head_dim), 0.0);
  double sum = 0.0;
  for (std::size_t t = 0; t < T.size(); ++t) {
    double p = weight(S[t], m);
    sum += p;
    if (rounding == Rounding::bf16) {
      p = static_cast<double>(
          core::bf16_to_f32(core::f32_to_bf16(core::f64_to_f32_round_to_odd(p))));
    }
    const Row v =
        token_row(args.v, args.batch, problem.block_size, sequence, h / problem.group_size(), T[t]);
    for (int d = 0; d < problem.head_dim; ++d) O[static_cast<std::size_t>(d)] += p * v[d];
  }
  const double scale = head_scale(args.v_scale, h / problem.group_size());
  for (int d = 0; d < problem.head_dim; ++d) {
    double o = sum == 0.0 ? 0.0 : scale * O[static_cast<std::size_t>(d)] / sum;
    if (rounding == Rounding::bf16) o = static_cast<double>(static_cast<float>(o));
    core::store(args.out, o, row, h, d);
  }
  if (args.lse.given()) core::store(args.lse, log_sum_exp(S), row, h);
}

/// A gradient in double, contiguous, stored into its view at the end.
class Gradient {
 public:
  explicit Gradient(const TensorView& view)
      : view_(view), values_(static_cast<std::size_t>(view.num_elements()), 0.0) {}

  double& at(std::int64_t token, std::int64_t head, std::int64_t d) {
    return values_[static_cast<std::size_t>((token * view_.shape[1] + head) * view_.shape[2] + d)];
  }

  void store() {
    for (std::int64_t token = 0; token < view_.shape[0]; ++token) {
      for (std::int64_t head = 0; head < view_.shape[1]; ++head) {
        for (std::int64_t d = 0; d < view_.shape[2]; ++d) {
          core::store(view_, at(token, head, d), token, head, d);
        }
      }
    }
  }

 private:
  TensorView view_;
  std::vector<double> values_;
};

/// M[r, i, b] for every block b of the sequence (paper eqs. 5 and 6).
std::vector<double> block_scores_of(const TensorView& index_q, const TensorView& index_k,
                                    const Batch& batch, const Problem& problem, double scale,
                                    const core::Sequence& sequence, std::int64_t r, std::int64_t i);

/// I[r, i], ascending, for a query at position p (paper eq. 7).
std::vector<std::int64_t> select_blocks(const std::vector<double>& M, const Problem& problem,
                                        std::int64_t p);

/// The reference's row in an operation's list. It takes every valid request on host tensors.
template <class Args>
constexpr detail::Implementation<Args> implementation(const char* dtypes,
                                                      void (*run)(const Args&, std::span<std::byte>,
                                                                  Stream)) {
  return {.name = "reference",
          .dtypes = dtypes,
          .declines = [](const Args& args, const Options&) -> std::optional<std::string> {
            std::optional<std::string> reason;
            core::for_each_tensor(args, [&](const char*, const TensorView& view, core::Use) {
              if (view.given() && view.device.type != DeviceType::cpu) {
                reason = core::concat("tensors are on cuda:", view.device.index);
              }
            });
            return reason;
          },
          .workspace_bytes = [](const Args&) -> std::size_t { return 0; },
          .run = run};
}

}  // namespace msa::reference
