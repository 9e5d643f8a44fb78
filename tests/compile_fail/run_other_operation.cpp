// SPDX-License-Identifier: Apache-2.0
//
// A plan runs arguments of its own operation only.
#include "msa/msa.hpp"

void run(const msa::Plan<msa::Indexer>& plan, const msa::Indexer& indexer,
         const msa::SparseAttentionForward& attention) {
#if defined(MSA_MUST_FAIL)
  static_cast<void>(indexer);
  plan.run(attention);
#else
  static_cast<void>(attention);
  plan.run(indexer);
#endif
}
