// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward in parts: its kernels, of which a backend may replace the one that does most of
// the work, and how many queries it works on at a time.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "core/implementation.hpp"
#include "msa/ops.hpp"

namespace msa::cuda::kl {
struct Params;
}

namespace msa::cuda {

/// dtype is that of q, k, index_q and index_k. Statistics of the scores of each pair; dS and the
/// loss of each; from dS, dindex_q of each pair and the window's share of dindex_k.
void launch_kl_statistics(const kl::Params& g, DType dtype, cudaStream_t stream);
void launch_kl_score_gradients(const kl::Params& g, DType dtype, cudaStream_t stream);
void launch_kl_index_gradients(const kl::Params& g, DType dtype, cudaStream_t stream);

/// What score gradients leave of the loss: a number of each pair, or a sum of each CTA of
/// kl::grid_of, to which the CTA of that place adds window by window.
enum class KlLosses { of_pairs, of_ctas };

/// The second of them, as a backend has it.
struct KlScoreGradients {
  void (*launch)(const void* context, const kl::Params& g, DType dtype, cudaStream_t stream);
  const void* context;
  KlLosses losses = KlLosses::of_pairs;
};
inline constexpr KlScoreGradients kKlScoreGradients = {
    [](const void*, const kl::Params& g, DType dtype, cudaStream_t stream) {
      launch_kl_score_gradients(g, dtype, stream);
    },
    nullptr};

/// What the rows give for the pairs (query, KV block) of a window of queries.
inline constexpr std::int64_t kKlWindowBytes = std::int64_t{512} << 20;

std::optional<std::string> declines_indexer_kl(const IndexerKlBackward& args, const Options&);
std::size_t indexer_kl_workspace_bytes(const IndexerKlBackward& args, std::int64_t window_bytes,
                                       KlLosses losses = KlLosses::of_pairs);
void run_indexer_kl(const IndexerKlBackward& args, std::int64_t window_bytes,
                    const KlScoreGradients& score_gradients, std::span<std::byte> workspace,
                    Stream stream);

}  // namespace msa::cuda
