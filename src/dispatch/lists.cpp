// SPDX-License-Identifier: Apache-2.0
//
// One ordered list per operation: with `declines` this is the whole dispatch heuristic. A new
// kernel adds its row here, above those it beats.
#include "dispatch/lists.hpp"

#include "cpu/cpu.hpp"
#ifdef MSA_WITH_CUDA
#include "cuda/cuda.hpp"
#include "cuda/sm90/indexed_attention_fused.hpp"
#endif
#include "dispatch/in_sequence.hpp"
#include "reference/reference.hpp"

namespace msa::dispatch {
namespace {

template <class Args>
using List = const detail::Implementation<Args>*;

constexpr List<IndexerScores> kIndexerScores[] = {
#ifdef MSA_WITH_CUDA
    &cuda::sm90::kIndexerScores, &cuda::generic::kIndexerScores,
#endif
    &cpu::kIndexerScores, &reference::kIndexerScores};
constexpr List<SelectTopK> kSelectTopK[] = {
#ifdef MSA_WITH_CUDA
    &cuda::generic::kSelectTopK,
#endif
    &cpu::kSelectTopK, &reference::kSelectTopK};
constexpr List<Indexer> kIndexer[] = {
#ifdef MSA_WITH_CUDA
    &cuda::sm90::kIndexerDecodeScreened,
    &cuda::sm90::kIndexerDecode,
    &cuda::sm90::kIndexer,
    &cuda::generic::kIndexer,
#endif
    &cpu::kIndexer,
    &reference::kIndexer};
constexpr List<SparseAttentionForward> kSparseAttentionForward[] = {
#ifdef MSA_WITH_CUDA
    &cuda::sm90::kSparseAttentionDecode,
    &cuda::sm90::kSparseAttentionForward,
    &cuda::sm90::kSparseAttentionForwardKvOuter,
    &cuda::generic::kSparseAttentionForward,
#endif
    &cpu::kSparseAttentionForward,
    &reference::kSparseAttentionForward};
constexpr auto kIndexedAttentionCpu =
    in_sequence<&cpu::kIndexer, &cpu::kSparseAttentionForward>("cpu", "f32 f16 bf16 e4m3");
constexpr auto kIndexedAttentionReference =
    in_sequence<&reference::kIndexer, &reference::kSparseAttentionForward>("reference",
                                                                           "f32 f16 bf16 e4m3");
#ifdef MSA_WITH_CUDA
constexpr auto kIndexedAttentionDecode =
    in_sequence<&cuda::sm90::kIndexerDecode, &cuda::sm90::kSparseAttentionDecode>(
        "cuda_sm90_decode", "f16 bf16, keys also e4m3");
constexpr auto kIndexedAttentionSm90 =
    in_sequence<&cuda::sm90::kIndexer, &cuda::sm90::kSparseAttentionForward>(
        "cuda_sm90", "f16 bf16, keys also e4m3");
constexpr auto kIndexedAttentionGeneric =
    in_sequence<&cuda::generic::kIndexer, &cuda::generic::kSparseAttentionForward>(
        "cuda_generic", "f32 f16 bf16, keys also e4m3");
#endif
constexpr List<IndexedAttentionForward> kIndexedAttentionForward[] = {
#ifdef MSA_WITH_CUDA
    &kIndexedAttentionDecode,
    &cuda::sm90::kIndexedAttentionFused,  // by name only
    &kIndexedAttentionSm90,
    &kIndexedAttentionGeneric,
#endif
    &kIndexedAttentionCpu,
    &kIndexedAttentionReference};
constexpr List<DenseAttentionForward> kDenseAttentionForward[] = {
#ifdef MSA_WITH_CUDA
    &cuda::generic::kDenseAttentionForward,
#endif
    &cpu::kDenseAttentionForward, &reference::kDenseAttentionForward};
constexpr List<SparseAttentionBackward> kSparseAttentionBackward[] = {
#ifdef MSA_WITH_CUDA
    &cuda::sm90::kSparseAttentionBackward, &cuda::generic::kSparseAttentionBackward,
#endif
    &cpu::kSparseAttentionBackward, &reference::kSparseAttentionBackward};
constexpr List<IndexerKlBackward> kIndexerKlBackward[] = {
#ifdef MSA_WITH_CUDA
    &cuda::sm90::kIndexerKlBackward,
    &cuda::sm90::kIndexerKlBackwardKeyRows,  // by name only
    &cuda::generic::kIndexerKlBackward,
#endif
    &cpu::kIndexerKlBackward, &reference::kIndexerKlBackward};
constexpr List<AppendKv> kAppendKv[] = {
#ifdef MSA_WITH_CUDA
    &cuda::generic::kAppendKv,
#endif
    &cpu::kAppendKv, &reference::kAppendKv};
constexpr List<NormRopeAppendKv> kNormRopeAppendKv[] = {
#ifdef MSA_WITH_CUDA
    &cuda::generic::kNormRopeAppendKv,
#endif
    &cpu::kNormRopeAppendKv, &reference::kNormRopeAppendKv};

}  // namespace

template <>
std::span<const List<IndexerScores>> implementations_of() {
  return kIndexerScores;
}
template <>
std::span<const List<SelectTopK>> implementations_of() {
  return kSelectTopK;
}
template <>
std::span<const List<Indexer>> implementations_of() {
  return kIndexer;
}
template <>
std::span<const List<SparseAttentionForward>> implementations_of() {
  return kSparseAttentionForward;
}
template <>
std::span<const List<IndexedAttentionForward>> implementations_of() {
  return kIndexedAttentionForward;
}
template <>
std::span<const List<DenseAttentionForward>> implementations_of() {
  return kDenseAttentionForward;
}
template <>
std::span<const List<SparseAttentionBackward>> implementations_of() {
  return kSparseAttentionBackward;
}
template <>
std::span<const List<IndexerKlBackward>> implementations_of() {
  return kIndexerKlBackward;
}
template <>
std::span<const List<AppendKv>> implementations_of() {
  return kAppendKv;
}
template <>
std::span<const List<NormRopeAppendKv>> implementations_of() {
  return kNormRopeAppendKv;
}

}  // namespace msa::dispatch
