// SPDX-License-Identifier: Apache-2.0
#include <sstream>

#include "cpu/cpu.hpp"
#include "msa/backend.hpp"
#include "tests/fuzz/problems.hpp"
#include "tests/support/verify.hpp"

namespace msa::fuzz {

SmallProblem small_problem(ByteReader& bytes) {
  using testing::Keys;
  using testing::Selection;
  using testing::Values;
  SmallProblem problem;
  testing::Case& spec = problem.spec;
  Problem& p = spec.problem;
  spec.name = "random";
  // Mostly very small, since the reference takes nearly all of the time.
  const bool is_large = bytes.below(16) == 15;
  p.num_kv_heads = bytes.one_of({1, 1, 2, 3});
  p.num_q_heads = p.num_kv_heads * (is_large ? bytes.one_of({3, 5, 8}) : bytes.one_of({1, 2, 3}));
  p.head_dim = 1 + bytes.below(is_large ? 40 : 20);
  p.index_dim = 1 + bytes.below(is_large ? 40 : 20);
  p.block_size = bytes.one_of({16, 16, 32, 64});
  p.num_init_blocks = bytes.below(3);
  p.num_local_blocks = 1 + bytes.below(3);
  p.top_k = p.num_init_blocks + p.num_local_blocks + bytes.below(6);
  spec.dtype = bytes.one_of({DType::f32, DType::bf16, DType::f16});
  spec.keys = bytes.one_of({Keys::ragged, Keys::paged, Keys::shared_pages, Keys::missing_pages});
  spec.values = bytes.one_of({Values::normal, Values::ties, Values::zeros, Values::infinities,
                              Values::nans, Values::large});
  spec.selection = bytes.one_of({Selection::indexer, Selection::any_order, Selection::scattered});
  spec.row_gap = bytes.below(6);
  spec.seed = bytes.take<std::uint16_t>();
  problem.num_threads = 1 + bytes.below(3);
  const int num_sequences = bytes.below(4);
  for (int b = 0; b < num_sequences; ++b) {
    const int q = bytes.below(is_large ? 24 : 9);
    spec.sequences.push_back({q, bytes.below(is_large ? 150 : 80)});
  }
  // Without offsets all sequences have as many queries, and ragged keys are one sequence.
  const bool may_omit =
      !spec.sequences.empty() && (spec.keys != Keys::ragged || spec.sequences.size() == 1);
  spec.give_offsets = bytes.below(2) == 0 || !may_omit;
  if (!spec.give_offsets) {
    for (testing::Lengths& lengths : spec.sequences) lengths.q = spec.sequences[0].q;
  }
  spec.index_codes = spec.keys != Keys::ragged && bytes.below(2) == 1;
  if (spec.index_codes) {  // only rows of more than top_k blocks are screened
    for (testing::Lengths& lengths : spec.sequences) lengths.k *= 4;
  }
  return problem;
}

int check(const SmallProblem& problem) {
  if (msa::num_threads() != problem.num_threads) set_num_threads(problem.num_threads);
  testing::Inputs inputs(problem.spec);
  int comparisons = 0;
  const auto run = [&](const std::string& backend, const char* target) {
    testing::verify_all(
        inputs, backend.c_str(), [&](const char* operation, const testing::Outcome& outcome) {
          if (outcome.status == testing::Outcome::Status::passed) ++comparisons;
          if (outcome.ok()) return;
          std::ostringstream text;
          text << operation << " on " << backend << ' ' << target << ", " << problem.num_threads
               << " threads: " << outcome.detail << "\n  " << problem.spec;
          throw Finding(text.str());
        });
  };
  for (const BackendInfo& backend : backends()) {
    const std::string name = backend.name;
    if (!backend.available || name == "reference") continue;
    if (name != "cpu") {
      run(name, "");
      continue;
    }
    for (const char* target : cpu::simd_targets()) {
      cpu::use_simd_target(target);
      run(name, target);
    }
    cpu::use_simd_target(nullptr);
  }
  return comparisons;
}

void differential(Bytes bytes) {
  ByteReader reader(bytes);
  check(small_problem(reader));
}

}  // namespace msa::fuzz
