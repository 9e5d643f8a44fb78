// SPDX-License-Identifier: Apache-2.0
//
// A decode step on a GPU as one CUDA graph, replayed while the requests grow: lengths, page table
// and new tokens change in memory that the graph was captured with. Ends with 77 where there is no
// GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "msa/msa.hpp"

namespace {

constexpr std::int64_t kRequests = 2, kMaxPages = 24, kPages = 48, kBlock = 128, kTopK = 16;
constexpr msa::Problem kModel{};  // 64 query and 4 KV heads of 128, top 16 blocks of 128 tokens

void check(cudaError_t status) {
  if (status != cudaSuccess)
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(status)), std::exit(1);
}

/// A tensor in memory that CPU and GPU see; each element of bf16 is 0x3f3f, about 0.75.
msa::TensorView tensor(msa::DType dtype, std::initializer_list<std::int64_t> shape) {
  auto view = msa::TensorView::contiguous(nullptr, dtype, {msa::DeviceType::cuda, 0}, shape);
  const std::size_t size = static_cast<std::size_t>(view.num_elements()) * msa::size_of(dtype);
  check(cudaMallocManaged(&view.data, size));
  check(cudaMemset(view.data, 0x3f, size));
  return view;
}

}  // namespace

int main() {
  using enum msa::DType;
  if (int count = 0; cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return 77;
  const msa::Batch batch{.page_table = tensor(i32, {kRequests, kMaxPages}),
                         .seq_lens_k = tensor(i32, {kRequests})};
  const auto cache = [](int heads) { return tensor(bf16, {kPages, heads, kBlock, 128}); };
  const auto token = [](int heads) { return tensor(bf16, {kRequests, heads, 128}); };
  const auto k = cache(4), v = cache(4), index_k = cache(1), out = token(64);
  const auto ids = tensor(i32, {4, kRequests, kTopK});
  const msa::AppendKv append{kModel, batch, token(4), token(4), token(1), k, v, index_k, {}, {}};
  const msa::Indexer indexer{kModel, batch, token(4), index_k, {}, {}, ids};
  const msa::SparseAttentionForward attention{kModel, batch, token(64), k,  v, ids,
                                              0.0f,   out,   {},        {}, {}};
  const auto append_plan = msa::plan(append);
  const auto index_plan = msa::plan(indexer);
  const auto attention_plan = msa::plan(attention);
  const std::size_t size = std::max({append_plan.workspace_bytes(), index_plan.workspace_bytes(),
                                     attention_plan.workspace_bytes(), std::size_t{256}});
  void* memory = nullptr;  // one workspace: the three run one after the other
  check(cudaMalloc(&memory, size));
  const std::span workspace(static_cast<std::byte*>(memory), size);

  msa::PagedKvCache pages(kPages, kBlock);
  const std::int64_t requests[kRequests] = {pages.create(), pages.create()};
  pages.append(requests[0], 2100), pages.append(requests[1], 250);  // prompts, as if prefilled

  check(cudaDeviceSynchronize());  // the tensors are filled
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t step = nullptr;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  append_plan.run(append, workspace, {stream});
  index_plan.run(indexer, workspace, {stream});
  attention_plan.run(attention, workspace, {stream});
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&step, graph, 0));
  for (int i = 0; i < 300; ++i) {
    for (const std::int64_t request : requests) pages.append(request, 1);
    msa::TensorView table = batch.page_table, lengths = batch.seq_lens_k;
    table.device = lengths.device = {};  // managed memory: the CPU may write while the GPU rests
    pages.fill(requests, table, lengths);
    check(cudaGraphLaunch(step, stream));
    check(cudaStreamSynchronize(stream));  // here an engine samples the next tokens
  }
  // All keys tie: a request attends to its first blocks and to its own, and every mean is 0x3f3f.
  const auto* const id = static_cast<const std::int32_t*>(ids.data);
  const auto* const o = static_cast<const std::uint16_t*>(out.data);
  const bool chosen = id[14] == 14 && id[15] == 2399 / 128 && id[kTopK + 4] == 549 / 128;
  const bool same = std::all_of(o, o + out.num_elements(), [](auto x) { return x == 0x3f3f; });
  std::printf("%s, %s\n", attention_plan.implementation(), chosen && same ? "right" : "wrong");
  return chosen && same ? 0 : 1;
}
