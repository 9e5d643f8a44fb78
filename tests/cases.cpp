// SPDX-License-Identifier: Apache-2.0
#include "tests/cases.hpp"

#include <ostream>

namespace msa::testing {
namespace {

const char* name_of(Keys keys) {
  switch (keys) {
    case Keys::ragged:
      return "ragged";
    case Keys::paged:
      return "paged";
    case Keys::shared_pages:
      return "shared_pages";
    case Keys::missing_pages:
      return "missing_pages";
  }
  return "?";
}

const char* name_of(Values values) {
  switch (values) {
    case Values::normal:
      return "normal";
    case Values::ties:
      return "ties";
    case Values::zeros:
      return "zeros";
    case Values::infinities:
      return "infinities";
    case Values::nans:
      return "nans";
    case Values::large:
      return "large";
    case Values::largest:
      return "largest";
    case Values::coarse:
      return "coarse";
  }
  return "?";
}

const char* name_of(Selection selection) {
  switch (selection) {
    case Selection::indexer:
      return "indexer";
    case Selection::any_order:
      return "any_order";
    case Selection::scattered:
      return "scattered";
  }
  return "?";
}

const char* name_of(Fp8 fp8) {
  switch (fp8) {
    case Fp8::none:
      return "none";
    case Fp8::unscaled:
      return "unscaled";
    case Fp8::per_head:
      return "per_head";
    case Fp8::one_scale:
      return "one_scale";
  }
  return "?";
}

Problem heads(int num_q_heads, int num_kv_heads) {
  return {.num_q_heads = num_q_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = 64,
          .index_dim = 64,
          .block_size = 16,
          .top_k = 4};
}

Problem blocks(int block_size, int top_k, int num_init_blocks = 0, int num_local_blocks = 1) {
  return {.num_q_heads = 2,
          .num_kv_heads = 1,
          .head_dim = 64,
          .index_dim = 64,
          .block_size = block_size,
          .top_k = top_k,
          .num_init_blocks = num_init_blocks,
          .num_local_blocks = num_local_blocks};
}

Problem dims(int head_dim, int index_dim) {
  return {.num_q_heads = 2,
          .num_kv_heads = 1,
          .head_dim = head_dim,
          .index_dim = index_dim,
          .block_size = 16,
          .top_k = 3};
}

std::vector<Case> geometries() {
  return {
      {.name = "no_sequences", .sequences = {}},
      {.name = "no_queries", .sequences = {{0, 17}, {0, 0}}},
      {.name = "no_keys", .sequences = {{3, 0}}},
      {.name = "one_token", .sequences = {{1, 1}}},
      {.name = "one_token_documents", .sequences = {{1, 1}, {1, 1}, {1, 1}}, .row_gap = 0},
      {.name = "around_one_block", .sequences = {{15, 15}, {16, 16}, {17, 17}}},
      {.name = "around_sixteen_blocks", .sequences = {{2, 255}, {2, 256}, {2, 257}}},
      {.name = "ragged_with_empty",
       .sequences = {{0, 0}, {33, 33}, {0, 20}, {18, 50}, {0, 0}, {1, 1}},
       .selection = Selection::any_order},
      {.name = "before_the_first_key", .sequences = {{9, 4}, {20, 18}, {3, 0}}},
      {.name = "one_sequence_without_offsets", .sequences = {{18, 90}}, .give_offsets = false},
      {.name = "prefix_ends_inside_block", .sequences = {{13, 74}, {20, 101}}},
      {.name = "paged_prefill",
       .sequences = {{35, 35}, {0, 16}, {12, 49}},
       .keys = Keys::paged,
       .selection = Selection::any_order},
      {.name = "paged_prefix",
       .sequences = {{7, 74}, {12, 180}},
       .keys = Keys::paged,
       .row_gap = 0},
      {.name = "paged_empty", .sequences = {{0, 0}, {4, 0}, {2, 2}}, .keys = Keys::paged},
      {.name = "shared_pages",
       .sequences = {{4, 40}, {4, 33}, {4, 100}},
       .keys = Keys::shared_pages,
       .give_offsets = false},
      {.name = "missing_pages",
       .sequences = {{8, 100}, {5, 70}, {4, 20}},
       .keys = Keys::missing_pages},
      {.name = "decode_1",
       .problem = heads(16, 1),
       .sequences = {{1, 1}, {1, 16}, {1, 17}, {1, 200}},
       .keys = Keys::paged,
       .give_offsets = false,
       .row_gap = 0},
      {.name = "decode_2",
       .sequences = {{2, 300}, {2, 90}},
       .keys = Keys::paged,
       .give_offsets = false},
      {.name = "decode_5",
       .sequences = {{5, 63}, {5, 64}, {5, 66}},
       .keys = Keys::paged,
       .selection = Selection::any_order,
       .give_offsets = false},
      {.name = "decode_16",
       .sequences = {{16, 40}, {16, 7}, {16, 150}},
       .keys = Keys::paged,
       .give_offsets = false},
      {.name = "decode_mixed", .sequences = {{1, 70}, {3, 45}, {8, 130}}, .keys = Keys::paged},
      {.name = "group_1", .problem = heads(3, 3), .sequences = {{5, 80}, {7, 30}}},
      {.name = "group_2", .problem = heads(6, 3), .sequences = {{5, 80}, {7, 30}}},
      {.name = "group_8", .problem = heads(16, 2), .sequences = {{5, 80}, {7, 30}}},
      {.name = "group_16", .problem = heads(32, 2), .sequences = {{3, 80}, {4, 30}}},
      {.name = "head_dim_128", .problem = dims(128, 128), .sequences = {{20, 90}}},
      {.name = "head_dim_80", .problem = dims(80, 48), .sequences = {{11, 90}}},
      {.name = "head_dim_5", .problem = dims(5, 3), .sequences = {{11, 90}}},
      {.name = "block_64", .problem = blocks(64, 3), .sequences = {{3, 63}, {3, 64}, {4, 450}}},
      {.name = "block_128", .problem = blocks(128, 2), .sequences = {{2, 129}, {3, 1025}}},
      {.name = "m3_group",
       .problem = {.num_q_heads = 16, .num_kv_heads = 1},
       .sequences = {{1, 16 * 128 + 5}},
       .keys = Keys::paged,
       .row_gap = 0},
      {.name = "top_k_1", .problem = blocks(16, 1), .sequences = {{20, 70}}},
      {.name = "top_k_17", .problem = blocks(16, 17), .sequences = {{6, 290}}},
      {.name = "top_k_64", .problem = blocks(16, 64), .sequences = {{2, 1130}}},
      {.name = "top_k_above_block_count", .problem = blocks(16, 9), .sequences = {{40, 70}}},
      {.name = "init_1", .problem = blocks(16, 3, 1), .sequences = {{40, 100}}},
      {.name = "local_2", .problem = blocks(16, 4, 0, 2), .sequences = {{40, 100}}},
      {.name = "init_2_local_3", .problem = blocks(16, 5, 2, 3), .sequences = {{45, 130}}},
      {.name = "forced_only", .problem = blocks(16, 2, 1), .sequences = {{30, 90}}},
      {.name = "scattered_blocks",
       .sequences = {{20, 70}, {8, 190}},
       .selection = Selection::scattered},
      {.name = "scattered_pages",
       .sequences = {{9, 70}, {9, 190}},
       .keys = Keys::paged,
       .selection = Selection::scattered,
       .give_offsets = false},
      {.name = "ties", .sequences = {{12, 150}, {3, 300}}, .values = Values::ties},
      {.name = "zeros", .sequences = {{13, 150}}, .values = Values::zeros},
      {.name = "infinities", .sequences = {{13, 150}}, .values = Values::infinities},
      {.name = "nans", .sequences = {{13, 150}}, .values = Values::nans},
      {.name = "nans_paged",
       .sequences = {{4, 100}, {4, 60}},
       .keys = Keys::paged,
       .values = Values::nans,
       .give_offsets = false},
      {.name = "codes_decode",
       .problem = heads(8, 4),
       .sequences = {{1, 400}, {1, 1000}, {1, 15}, {1, 80}},
       .keys = Keys::paged,
       .index_codes = true,
       .give_offsets = false},
      {.name = "codes_mixed",
       .sequences = {{2, 300}, {5, 400}, {1, 333}, {0, 100}, {4, 500}},
       .keys = Keys::paged,
       .index_codes = true},
      {.name = "codes_shared_pages",
       .sequences = {{2, 240}, {2, 333}, {2, 100}},
       .keys = Keys::shared_pages,
       .index_codes = true,
       .give_offsets = false,
       .row_gap = 0},
      {.name = "codes_missing_pages",
       .sequences = {{3, 300}, {1, 290}},
       .keys = Keys::missing_pages,
       .index_codes = true},
      {.name = "codes_dim_40",
       .problem = dims(8, 40),
       .sequences = {{3, 290}, {1, 333}},
       .keys = Keys::paged,
       .index_codes = true},
      {.name = "codes_init_2_local_3",
       .problem = blocks(16, 7, 2, 3),
       .sequences = {{4, 330}, {2, 170}},
       .keys = Keys::paged,
       .index_codes = true},
      {.name = "codes_ties",
       .sequences = {{4, 300}, {2, 400}},
       .keys = Keys::paged,
       .values = Values::ties,
       .index_codes = true},
      {.name = "codes_zeros",
       .sequences = {{4, 300}},
       .keys = Keys::paged,
       .values = Values::zeros,
       .index_codes = true},
      {.name = "codes_infinities",
       .sequences = {{4, 300}, {1, 500}},
       .keys = Keys::paged,
       .values = Values::infinities,
       .index_codes = true},
      {.name = "codes_nans",
       .sequences = {{4, 300}, {1, 500}},
       .keys = Keys::paged,
       .values = Values::nans,
       .index_codes = true},
      {.name = "codes_large",
       .sequences = {{2, 300}, {1, 400}},
       .keys = Keys::paged,
       .values = Values::large,
       .index_codes = true},
      {.name = "large", .sequences = {{13, 150}}, .values = Values::large},
  };
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Case& c) {
  const Problem& p = c.problem;
  out << "{.name = \"" << c.name << "\", .problem = {.num_q_heads = " << p.num_q_heads
      << ", .num_kv_heads = " << p.num_kv_heads << ", .head_dim = " << p.head_dim
      << ", .index_dim = " << p.index_dim << ", .block_size = " << p.block_size
      << ", .top_k = " << p.top_k << ", .num_init_blocks = " << p.num_init_blocks
      << ", .num_local_blocks = " << p.num_local_blocks
      << "}, .dtype = DType::" << msa::name_of(c.dtype) << ", .sequences = {";
  const char* separator = "";
  for (const Lengths& lengths : c.sequences) {
    out << separator << '{' << lengths.q << ", " << lengths.k << '}';
    separator = ", ";
  }
  return out << "}, .keys = Keys::" << name_of(c.keys)
             << ", .values = Values::" << name_of(c.values)
             << ", .selection = Selection::" << name_of(c.selection)
             << ", .fp8 = Fp8::" << name_of(c.fp8)
             << ", .index_codes = " << (c.index_codes ? "true" : "false")
             << ", .give_offsets = " << (c.give_offsets ? "true" : "false")
             << ", .row_gap = " << c.row_gap << ", .seed = " << c.seed << '}';
}

const std::vector<Case>& all_cases() {
  static const std::vector<Case> table = [] {
    std::vector<Case> cases;
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      std::uint32_t seed = 1;
      for (Case geometry : geometries()) {
        geometry.seed = seed++;
        // f16 differs from bf16 in conversions only; a few geometries cover those.
        if (dtype == DType::f16 && geometry.seed % 4 != 0) continue;
        geometry.name += std::string("_") + msa::name_of(dtype);
        geometry.dtype = dtype;
        cases.push_back(geometry);
      }
    }
    return cases;
  }();
  return table;
}

}  // namespace msa::testing
