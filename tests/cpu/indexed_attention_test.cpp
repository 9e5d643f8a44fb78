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
        auto parts = inputs.args<IndexedAttentionForward>();
        const Outputs of_parts(inputs, parts);
        auto index = inputs.args<Indexer>();
        index.block_ids = parts.block_ids;
        run(index, backend);
        auto attend = inputs.args<SparseAttentionForward>();
        attend.block_ids = parts.block_ids;
        attend.out = parts.out;
        attend.lse = parts.lse;
        run(attend, backend);

        auto whole = inputs.args<IndexedAttentionForward>();
        const Outputs of_whole(inputs, whole);
        run(whole, backend);
        EXPECT_EQ(of_whole.difference(of_parts), "");
        EXPECT_EQ(of_whole.damaged() + of_parts.damaged() + inputs.changed(), "");
      }
    }
  }
}

TEST(IndexedAttention, RefusesTensorsThatDoNotFit) {
  Inputs inputs(step(Keys::paged, DType::f32));
  auto good = inputs.args<IndexedAttentionForward>();
  const Outputs outputs(inputs, good);
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
