// SPDX-License-Identifier: Apache-2.0
#include "tests/cuda/gpu_cases.hpp"

#include <set>

#include "core/check.hpp"

namespace msa::testing {
namespace {

constexpr int kAlignedGap = 8;  // elements: 16 bytes, so that every stride is one of TMA's

/// A length four times as long that stands to blocks of 64 as `length` does to blocks of 16.
std::int64_t scaled(std::int64_t length) {
  const std::int64_t rest = length % 16;
  return 4 * length + (rest == 1 ? -3 : rest == 15 ? 3 : rest == 0 ? 0 : length % 3);
}

Problem m3(int num_q_heads = 64, int num_kv_heads = 4) {
  return {.num_q_heads = num_q_heads, .num_kv_heads = num_kv_heads};
}

Problem shape(int group_size, int head_dim, int block_size, int top_k) {
  return {.num_q_heads = 2 * group_size,
          .num_kv_heads = 2,
          .head_dim = head_dim,
          .index_dim = head_dim,
          .block_size = block_size,
          .top_k = top_k};
}

/// Sequences of one document each, many of them empty or of one token.
std::vector<Lengths> many_sequences() {
  const std::vector<Lengths> pattern = {{1, 1},   {0, 0}, {3, 200}, {17, 17},   {0, 50},
                                        {2, 129}, {8, 8}, {0, 0},   {31, 300},  {1, 128},
                                        {5, 3},   {0, 0}, {64, 64}, {127, 127}, {1, 640}};
  std::vector<Lengths> sequences;
  for (int i = 0; i < 12; ++i) {
    sequences.insert(sequences.end(), pattern.begin(), pattern.end());
    if (i % 3 == 0) sequences.insert(sequences.end(), 5, Lengths{0, 0});
  }
  return sequences;
}

std::vector<Case> m3_cases() {
  return {
      {.name = "m3_prefill", .problem = m3(), .sequences = {{2048, 2048}}, .keys = Keys::paged},
      {.name = "m3_ragged",
       .problem = m3(),
       .sequences = {{901, 901}, {0, 0}, {0, 77}, {500, 1300}},
       .selection = Selection::any_order},
      {.name = "m3_paged",
       .problem = m3(),
       .sequences = {{700, 700}, {130, 2900}},
       .keys = Keys::paged,
       .selection = Selection::any_order,
       .row_gap = 0},
      {.name = "m3_shared_pages",
       .problem = m3(),
       .sequences = {{150, 2300}, {150, 900}, {150, 150}},
       .keys = Keys::shared_pages,
       .give_offsets = false},
      {.name = "m3_missing_pages",
       .problem = m3(),
       .sequences = {{200, 4100}, {64, 800}},
       .keys = Keys::missing_pages},
      {.name = "m3_long_prefix",
       .problem = m3(),
       .sequences = {{257, 8192}},
       .keys = Keys::paged,
       .row_gap = 0},
      {.name = "m3_long_prefix_ragged", .problem = m3(), .sequences = {{193, 6001}, {65, 4097}}},
      {.name = "m3_many_sequences", .problem = m3(), .sequences = many_sequences()},
      {.name = "m3_many_sequences_paged",
       .problem = m3(32, 2),
       .sequences = many_sequences(),
       .keys = Keys::paged},
      {.name = "m3_before_the_first_key",
       .problem = m3(32, 2),
       .sequences = {{300, 170}, {200, 0}, {260, 258}}},
      {.name = "m3_one_sequence_without_offsets",
       .problem = m3(32, 2),
       .sequences = {{611, 3001}},
       .give_offsets = false,
       .row_gap = 0},
      {.name = "m3_scattered",
       .problem = m3(),
       .sequences = {{600, 3000}},
       .selection = Selection::scattered},
      {.name = "m3_scattered_pages",
       .problem = m3(),
       .sequences = {{300, 5000}, {300, 2000}},
       .keys = Keys::paged,
       .selection = Selection::scattered,
       .give_offsets = false},
      {.name = "m3_init_2_local_3",
       .problem = {.num_init_blocks = 2, .num_local_blocks = 3},
       .sequences = {{300, 4000}},
       .keys = Keys::paged},
      {.name = "m3_codes",
       .problem = m3(),
       .sequences = {{120, 3000}, {3, 2500}},
       .keys = Keys::paged,
       .index_codes = true},
  };
}

std::vector<Case> special_values() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, Values values) {
    cases.push_back({.name = core::concat("m3_", name),
                     .problem = m3(32, 2),
                     .sequences = {{260, 3100}, {140, 140}},
                     .values = values});
    cases.push_back({.name = core::concat("m3_", name, "_paged"),
                     .problem = m3(32, 2),
                     .sequences = {{140, 140}, {260, 3100}},
                     .keys = Keys::paged,
                     .values = values,
                     .selection = Selection::any_order});
  };
  add("ties", Values::ties);
  add("zeros", Values::zeros);
  add("infinities", Values::infinities);
  add("nans", Values::nans);
  add("large", Values::large);
  return cases;
}

/// A few query tokens per request: 1 to 16, or different numbers of them. Few rows, so that the
/// reference, which judges one row for each head over all its keys, ends soon.
std::vector<Case> decode_cases() {
  std::vector<Lengths> many;
  for (std::int64_t i = 0; i < 512; ++i) many.push_back({1, 1 + i * 37 % 600});
  const std::vector<Lengths> mixed = {{1, 1},   {2, 2},  {16, 16}, {0, 0},    {0, 300}, {3, 129},
                                      {5, 128}, {1, 77}, {7, 640}, {16, 900}, {1, 2177}};
  return {
      {.name = "m3_decode_batch_512",
       .problem = m3(16, 1),
       .sequences = many,
       .keys = Keys::paged,
       .give_offsets = false},
      {.name = "m3_decode_one_request",
       .problem = m3(),
       .sequences = {{1, 9001}},
       .keys = Keys::paged,
       .give_offsets = false,
       .row_gap = 0},
      {.name = "m3_decode_mixed",
       .problem = m3(32, 2),
       .sequences = mixed,
       .keys = Keys::paged,
       .index_codes = true},
      {.name = "m3_decode_4_shared_pages",
       .problem = m3(32, 2),
       .sequences = {{4, 2300}, {4, 900}, {4, 131}},
       .keys = Keys::shared_pages,
       .index_codes = true,
       .give_offsets = false},
      {.name = "m3_decode_16",
       .problem = m3(16, 1),
       .sequences = {{16, 2049}, {16, 17}, {16, 2177}},
       .keys = Keys::paged,
       .selection = Selection::any_order,
       .give_offsets = false},
      {.name = "m3_decode_missing_pages",
       .problem = m3(32, 2),
       .sequences = {{1, 2100}, {3, 800}, {4, 2400}},
       .keys = Keys::missing_pages,
       .index_codes = true},
      {.name = "m3_decode_nans",
       .problem = m3(32, 2),
       .sequences = {{1, 2600}, {4, 700}},
       .keys = Keys::paged,
       .values = Values::nans,
       .selection = Selection::scattered,
       .index_codes = true},
      {.name = "m3_decode_ties",
       .problem = m3(32, 2),
       .sequences = {{1, 2700}, {4, 2500}},
       .keys = Keys::paged,
       .values = Values::ties,
       .index_codes = true},
  };
}

/// Every value of each parameter, not every combination.
std::vector<Case> shapes() {
  std::vector<Case> cases;
  const int top_ks[] = {4, 8, 12, 16, 24, 32, 48, 64};
  std::size_t next = 0;
  for (const int group_size : {1, 2, 4, 8, 16}) {
    for (const int head_dim : {64, 128}) {
      for (const int block_size : {64, 128}) {
        const int top_k = top_ks[next++ % 8];
        cases.push_back(
            {.name = core::concat("g", group_size, "_d", head_dim, "_b", block_size, "_k", top_k),
             .problem = shape(group_size, head_dim, block_size, top_k),
             .sequences = {{190, block_size * (top_k + 9) + 5}, {70, 70}},
             .keys = next % 2 == 0 ? Keys::paged : Keys::ragged,
             .selection = next % 3 == 0 ? Selection::any_order : Selection::indexer});
      }
    }
  }
  return cases;
}

/// Values at the ends of their types, where a kernel's sums or weights pass the end though the
/// result does not. Not for the CPU backend, which is not judged by these.
std::vector<Case> extreme_cases() {
  std::vector<Case> cases;
  std::uint32_t seed = 31;
  const auto add = [&](Case spec, Values values, const char* name) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      if (values == Values::coarse && dtype != DType::f16) continue;
      spec.name = core::concat(name, "_", spec.problem.head_dim, "_", spec.problem.block_size, "_",
                               msa::name_of(dtype));
      spec.dtype = dtype;
      spec.values = values;
      spec.row_gap = kAlignedGap;
      spec.seed = seed++;
      cases.push_back(spec);
    }
  };
  for (const auto& [values, name] :
       {std::pair{Values::largest, "largest"}, {Values::coarse, "coarse"}}) {
    add({.problem = shape(16, 128, 128, 4), .sequences = {{9, 700}, {20, 20}}}, values, name);
    add({.problem = shape(4, 64, 64, 4), .sequences = {{40, 500}}, .keys = Keys::paged}, values,
        name);
  }
  return cases;
}

void finish(std::vector<Case>& cases, DType dtype, std::vector<Case>& all) {
  std::uint32_t seed = 101;
  for (Case geometry : cases) {
    geometry.seed = seed++;
    // f16 differs from bf16 in conversions only; a few geometries cover those.
    if (dtype == DType::f16 && geometry.seed % 5 != 0) continue;
    geometry.dtype = dtype;
    geometry.name = core::concat(geometry.name, "_", msa::name_of(dtype));
    if (geometry.row_gap != 0) geometry.row_gap = kAlignedGap;
    all.push_back(geometry);
  }
}

const char* suffix_of(Fp8 fp8) {
  switch (fp8) {
    case Fp8::per_head:
      return "per_head";
    case Fp8::one_scale:
      return "one_scale";
    default:
      return "unscaled";
  }
}

/// A case with e4m3 keys; the three ways to scale them take turns.
Case with_fp8(Case spec, std::size_t turn) {
  constexpr Fp8 kTurns[] = {Fp8::per_head, Fp8::unscaled, Fp8::one_scale};
  spec.fp8 = kTurns[turn % 3];
  spec.index_codes = false;
  spec.name = core::concat(spec.name, "_e4m3_", suffix_of(spec.fp8));
  return spec;
}

}  // namespace

std::vector<Case> scaled_cases() {
  std::vector<Case> cases;
  for (Case spec : all_cases()) {
    const int head_dim = spec.problem.head_dim;
    const bool takes_tiles = head_dim == 64 || head_dim == 128;
    if (spec.dtype == DType::f32 || !takes_tiles || spec.problem.index_dim != head_dim) continue;
    if (spec.problem.block_size == 16) {
      spec.problem.block_size = 64;
      for (Lengths& lengths : spec.sequences) lengths = {scaled(lengths.q), scaled(lengths.k)};
    }
    if (spec.row_gap != 0) spec.row_gap = kAlignedGap;
    spec.name = core::concat("scaled_", spec.name);
    cases.push_back(spec);
  }
  const std::vector<Case> more = extreme_cases();
  cases.insert(cases.end(), more.begin(), more.end());
  return cases;
}

std::vector<Case> fp8_cases() {
  std::vector<Case> cases;
  std::set<std::string> seen;
  for (const std::vector<Case>& some : {scaled_cases(), large_cases()}) {
    for (const Case& spec : some) {
      if (spec.index_codes) continue;
      Case changed = with_fp8(spec, cases.size());
      if (seen.insert(changed.name).second) cases.push_back(changed);
    }
  }
  return cases;
}

std::vector<Case> gradient_cases() {
  const Problem two_parts{.num_q_heads = 24, .num_kv_heads = 1, .head_dim = 64, .index_dim = 64};
  Problem wide = shape(2, 256, 64, 3);
  wide.index_dim = 128;
  const auto one_head = [](int dim, int block_size) {
    return Problem{.num_q_heads = 1,
                   .num_kv_heads = 1,
                   .head_dim = dim,
                   .index_dim = dim,
                   .block_size = block_size,
                   .top_k = 4};
  };
  const std::vector<Case> geometries = {
      {.name = "gradients_m3",
       .problem = m3(32, 2),
       .sequences = {{131, 131}, {0, 0}, {3, 300}, {0, 40}, {1, 1}}},
      {.name = "gradients_m3_any_order",
       .problem = m3(16, 1),
       .sequences = {{70, 300}, {40, 20}},
       .selection = Selection::any_order},
      {.name = "gradients_m3_nans",
       .problem = m3(16, 1),
       .sequences = {{40, 300}, {33, 33}},
       .values = Values::nans,
       .selection = Selection::any_order},
      {.name = "gradients_m3_infinities",
       .problem = m3(16, 1),
       .sequences = {{33, 33}, {40, 300}},
       .values = Values::infinities},
      {.name = "gradients_m3_large",
       .problem = m3(16, 1),
       .sequences = {{40, 260}},
       .values = Values::large},
      {.name = "gradients_scattered",
       .problem = shape(4, 128, 128, 4),
       .sequences = {{50, 600}},
       .selection = Selection::scattered},
      {.name = "gradients_group_24", .problem = two_parts, .sequences = {{30, 290}, {17, 17}}},
      {.name = "gradients_dim_256", .problem = wide, .sequences = {{40, 333}}},
      {.name = "gradients_block_256",
       .problem = shape(4, 64, 256, 2),
       .sequences = {{20, 600}, {280, 280}}},
      {.name = "gradients_group_2",
       .problem = shape(2, 128, 128, 3),
       .sequences = {{70, 450}, {0, 10}, {140, 140}}},
      {.name = "gradients_group_4", .problem = shape(4, 64, 128, 3), .sequences = {{77, 500}}},
      {.name = "gradients_pieces",
       .problem = one_head(64, 128),
       .sequences = {{1300, 1300}, {3, 3}},
       .selection = Selection::any_order},
      {.name = "gradients_pieces_nans",
       .problem = one_head(128, 128),
       .sequences = {{700, 700}},
       .values = Values::nans},
      {.name = "gradients_many_queries",
       .problem = one_head(64, 64),
       .sequences = {{1100, 1100}, {3, 3}},
       .selection = Selection::any_order}};
  std::vector<Case> cases;
  std::uint32_t seed = 500;
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (Case spec : geometries) {
      // Others than bf16 differ in conversions, or in a kernel that cares for no shape.
      if (dtype != DType::bf16 && seed++ % 3 != 0) continue;
      spec.dtype = dtype;
      spec.name = core::concat(spec.name, "_", msa::name_of(dtype));
      spec.row_gap = kAlignedGap;
      spec.seed = seed++;
      cases.push_back(spec);
    }
  }
  return cases;
}

std::vector<Case> cluster_cases() {
  // Clusters take 1,056 row tiles on 132 SMs, of 256 rows (token, index head); many heads keep the
  // keys, and so the work, few.
  const auto heads = [](int num_kv_heads, int index_dim, int block_size) {
    return Problem{.num_q_heads = num_kv_heads,
                   .num_kv_heads = num_kv_heads,
                   .head_dim = 8,
                   .index_dim = index_dim,
                   .block_size = block_size,
                   .top_k = 8};
  };
  const std::vector<Case> geometries = {
      {.name = "cluster_one_prompt", .problem = heads(128, 64, 128), .sequences = {{2201, 2201}}},
      {.name = "cluster_paged",
       .problem = heads(128, 64, 64),
       .sequences = {{2200, 2300}},
       .keys = Keys::missing_pages},
      {.name = "cluster_of_two_sequences",
       .problem = heads(100, 128, 128),
       .sequences = {{777, 901}, {3, 500}, {0, 7}, {1503, 1503}},
       .keys = Keys::paged},
      {.name = "cluster_nans",
       .problem = heads(128, 64, 128),
       .sequences = {{2199, 2199}},
       .values = Values::nans}};
  std::vector<Case> cases;
  std::uint32_t seed = 900;
  for (Case spec : geometries) {
    spec.dtype = DType::bf16;
    spec.row_gap = kAlignedGap;
    spec.seed = seed;
    seed += 2;  // even ones give max_seq_len_k
    cases.push_back(spec);
    cases.push_back(with_fp8(spec, 1));
  }
  return cases;
}

std::vector<Case> decode_index_cases() {
  const auto heads = [](int num_kv_heads, int index_dim, int top_k) {
    return Problem{.num_q_heads = num_kv_heads,
                   .num_kv_heads = num_kv_heads,
                   .head_dim = 8,
                   .index_dim = index_dim,
                   .block_size = 128,
                   .top_k = top_k};
  };
  Problem forced = heads(2, 64, 64);
  forced.num_init_blocks = 2;
  forced.num_local_blocks = 3;
  std::vector<Lengths> one_longer(9, {1, 700});
  one_longer.push_back({60, 5000});
  std::vector<Lengths> many;
  for (std::int64_t i = 0; i < 600; ++i) many.push_back({i % 4, 1 + i * i % 1700});
  const std::vector<Case> geometries = {
      {.name = "decode_long_row", .problem = heads(1, 64, 16), .sequences = {{1, 1'060'000}}},
      {.name = "decode_long_row_ties",
       .problem = heads(1, 64, 33),
       .sequences = {{2, 1'050'000}},
       .values = Values::ties},
      {.name = "decode_zeros",
       .problem = heads(2, 64, 16),
       .sequences = {{3, 200'000}},
       .values = Values::zeros},
      {.name = "decode_forced", .problem = forced, .sequences = {{4, 70'001}, {16, 129}}},
      {.name = "decode_two_passes",
       .problem = heads(9, 128, 5),
       .sequences = {{16, 3000}, {16, 90}, {16, 1025}}},
      {.name = "decode_one_longer", .problem = heads(4, 128, 16), .sequences = one_longer},
      {.name = "decode_many_mixed", .problem = heads(4, 128, 16), .sequences = many},
      {.name = "decode_large",
       .problem = heads(4, 128, 16),
       .sequences = {{1, 40'000}, {2, 9000}},
       .values = Values::large}};
  std::vector<Case> cases;
  std::uint32_t seed = 700;
  for (Case spec : geometries) {
    spec.dtype = seed % 4 == 0 ? DType::bf16 : DType::f16;
    spec.keys = seed % 3 == 0 ? Keys::ragged : Keys::paged;
    spec.row_gap = kAlignedGap;
    spec.seed = seed++;
    cases.push_back(spec);
    if (spec.values != Values::large) cases.push_back(with_fp8(spec, 1));
  }
  return cases;
}

std::vector<Case> large_cases() {
  std::vector<Case> cases = m3_cases();
  for (const std::vector<Case>& more : {special_values(), shapes(), decode_cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  std::vector<Case> all;
  finish(cases, DType::bf16, all);
  finish(cases, DType::f16, all);
  return all;
}

}  // namespace msa::testing
