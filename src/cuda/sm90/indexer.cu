// SPDX-License-Identifier: Apache-2.0
#include "cuda/cuda.hpp"
#include "cuda/sm90/indexer_wide.hpp"
#include "cuda/sm90/select_blocks.cuh"

namespace msa::cuda::sm90 {
namespace {

constexpr int kNarrowPlaces = 16;

bool is_wide(const Indexer& args) { return args.problem.top_k > kNarrowPlaces; }

}  // namespace

const msa::detail::Implementation<Indexer> kIndexer = {
    .name = "cuda_sm90",
    .dtypes = "f16 bf16 e4m3",
    .declines = [](const Indexer& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_index(args)) return reason;
      if (args.problem.top_k > kWidePlaces) {
        return core::concat("top_k is ", args.problem.top_k, ", above ", kWidePlaces);
      }
      return std::nullopt;
    },
    .workspace_bytes =
        [](const Indexer& args) {
          return is_wide(args) ? wide_indexer_workspace_bytes(args)
                               : select_workspace_bytes<kNarrowPlaces>(args);
        },
    .run =
        [](const Indexer& args, std::span<std::byte> workspace, Stream stream) {
          if (args.index_q.shape[0] == 0) return;
          is_wide(args) ? run_wide_indexer(args, workspace, stream)
                        : run_select<kNarrowPlaces>(args, workspace, stream);
        }};

}  // namespace msa::cuda::sm90
