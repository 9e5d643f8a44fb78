// SPDX-License-Identifier: Apache-2.0
//
// IndexedAttentionForward without a kernel of its own has the bits of its two operations.
#include "msa/indexed_attention.hpp"

#include <gtest/gtest.h>

#include <tuple>

#include "core/tensor.hpp"
#include "msa/error.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

template <class Args>
void run(const Args& args, const char* backend) {
  const auto plan = msa::plan(args, {.backend = backend});
  EXPECT_STREQ(plan.implementation(), backend);
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());
}

IndexedAttentionForward join(const Indexer& index, const SparseAttentionForward& attend) {
  return {.problem = index.problem,
          .batch = index.batch,
          .index_q = index.index_q,
          .index_k = index.index_k,
          .index_k_codes = index.index_k_codes,
          .index_k_scales = index.index_k_scales,
          .q = attend.q,
          .k = attend.k,
          .v = attend.v,
          .softmax_scale = attend.softmax_scale,
          .block_ids = index.block_ids,
          .out = attend.out,
          .lse = attend.lse,
          .k_scale = attend.k_scale,
          .v_scale = attend.v_scale};
}

Case step(Keys keys, DType dtype) {
  return {.name = "step",
          .dtype = dtype,
          .sequences = {{1, 200}, {0, 40}, {3, 77}, {2, 1}, {1, 64}},
          .keys = keys,
          .index_codes = keys == Keys::paged};
}

TEST(IndexedAttention, IsIndexerThenAttention) {
  for (const char* backend : {"cpu", "reference"}) {
    for (const Keys keys : {Keys::ragged, Keys::paged, Keys::missing_pages}) {
      for (const DType dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(::testing::Message() << backend << " " << name_of(dtype));
        Inputs inputs(step(keys, dtype));
        auto index = inputs.args<Indexer>();
        const Outputs ids(inputs, index);
        auto attend = inputs.args<SparseAttentionForward>();
        const Outputs rows(inputs, attend);
        attend.block_ids = index.block_ids;
        run(index, backend);
        run(attend, backend);

        auto index_of_step = inputs.args<Indexer>();
        const Outputs ids_of_step(inputs, index_of_step);
        auto attend_of_step = inputs.args<SparseAttentionForward>();
        const Outputs rows_of_step(inputs, attend_of_step);
        run(join(index_of_step, attend_of_step), backend);
        EXPECT_EQ(ids_of_step.difference(ids), "");
        EXPECT_EQ(rows_of_step.difference(rows), "");
        EXPECT_EQ(ids_of_step.damaged() + rows_of_step.damaged() + inputs.changed(), "");
      }
    }
  }
}

TEST(IndexedAttention, RefusesTensorsThatDoNotFit) {
  Inputs inputs(step(Keys::paged, DType::f32));
  auto index = inputs.args<Indexer>();
  const Outputs ids(inputs, index);
  auto attend = inputs.args<SparseAttentionForward>();
  const Outputs rows(inputs, attend);
  const IndexedAttentionForward good = join(index, attend);
  EXPECT_STREQ(msa::plan(good).implementation(), "cpu");
  IndexedAttentionForward bad = good;
  bad.index_q.shape[0] -= 1;
  EXPECT_THROW(std::ignore = msa::plan(bad), Error);
  bad = good;
  bad.index_k.shape[0] -= 1;
  bad.index_k_codes = bad.index_k_scales = {};
  EXPECT_THROW(std::ignore = msa::plan(bad), Error);
  bad = good;
  bad.block_ids.shape[2] -= 1;
  EXPECT_THROW(std::ignore = msa::plan(bad), Error);
  bad = good;
  bad.out = {};
  EXPECT_THROW(std::ignore = msa::plan(bad), Error);
}

}  // namespace
}  // namespace msa::testing
