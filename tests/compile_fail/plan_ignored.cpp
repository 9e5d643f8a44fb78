// SPDX-License-Identifier: Apache-2.0
//
// plan() without a use of its result is a mistake.
#include "msa/msa.hpp"

std::size_t bytes(const msa::Indexer& args) {
#if defined(MSA_MUST_FAIL)
  msa::plan(args);
  return 0;
#else
  return msa::plan(args).workspace_bytes();
#endif
}
