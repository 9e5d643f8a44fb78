// SPDX-License-Identifier: Apache-2.0
#include "msa/kv_cache.hpp"

#include <utility>
#include <vector>

#include "core/check.hpp"
#include "core/sequences.hpp"

namespace msa {
namespace {

struct SequencePages {
  bool live = false;
  std::int64_t length = 0;  // tokens
  std::vector<std::int32_t> pages{};
};

}  // namespace

struct PagedKvCache::State {
  std::int64_t block_size = 0;
  std::vector<std::int32_t> num_owners;  // [num_pages]
  std::vector<std::int32_t> free_pages;  // a stack, lowest page on top at the start
  std::vector<SequencePages> sequences;
  std::vector<std::int64_t> free_ids;

  SequencePages& at(std::int64_t id, const char* call) {
    MSA_CHECK(id >= 0 && id < static_cast<std::int64_t>(sequences.size()) &&
                  sequences[static_cast<std::size_t>(id)].live,
              "PagedKvCache::", call, ": there is no sequence ", id);
    return sequences[static_cast<std::size_t>(id)];
  }

  std::int32_t take_page() {
    const std::int32_t page = free_pages.back();
    free_pages.pop_back();
    num_owners[static_cast<std::size_t>(page)] = 1;
    return page;
  }

  void drop_page(std::int32_t page) {
    if (--num_owners[static_cast<std::size_t>(page)] == 0) free_pages.push_back(page);
  }

  void shrink(SequencePages& sequence, std::int64_t num_tokens) {
    const std::int64_t keep = core::ceil_div(num_tokens, block_size);
    while (static_cast<std::int64_t>(sequence.pages.size()) > keep) {
      drop_page(sequence.pages.back());
      sequence.pages.pop_back();
    }
    sequence.length = num_tokens;
  }
};

PagedKvCache::PagedKvCache(std::int64_t num_pages, std::int64_t block_size)
    : state_(std::make_unique<State>()) {
  MSA_CHECK(num_pages >= 0 && num_pages <= INT32_MAX, "PagedKvCache: num_pages is ", num_pages,
            ", expected 0 to ", INT32_MAX);
  MSA_CHECK(block_size > 0, "PagedKvCache: block_size is ", block_size, ", expected > 0");
  state_->block_size = block_size;
  state_->num_owners.resize(static_cast<std::size_t>(num_pages));
  state_->free_pages.reserve(static_cast<std::size_t>(num_pages));
  for (std::int64_t page = num_pages; page-- > 0;) {
    state_->free_pages.push_back(static_cast<std::int32_t>(page));
  }
}

PagedKvCache::~PagedKvCache() = default;
PagedKvCache::PagedKvCache(PagedKvCache&&) noexcept = default;
PagedKvCache& PagedKvCache::operator=(PagedKvCache&&) noexcept = default;

std::int64_t PagedKvCache::create() {
  if (state_->free_ids.empty()) {
    state_->sequences.emplace_back();
    state_->free_ids.push_back(static_cast<std::int64_t>(state_->sequences.size()) - 1);
  }
  const std::int64_t id = state_->free_ids.back();
  state_->free_ids.pop_back();
  state_->sequences[static_cast<std::size_t>(id)] = {.live = true};
  return id;
}

std::int64_t PagedKvCache::fork(std::int64_t sequence, std::int64_t num_tokens) {
  const SequencePages& parent = state_->at(sequence, "fork");
  MSA_CHECK(num_tokens >= 0 && num_tokens <= parent.length, "PagedKvCache::fork: num_tokens is ",
            num_tokens, ", but sequence ", sequence, " has ", parent.length);
  const auto num_shared =
      static_cast<std::ptrdiff_t>(core::ceil_div(num_tokens, state_->block_size));
  std::vector<std::int32_t> pages(parent.pages.begin(), parent.pages.begin() + num_shared);
  const std::int64_t id = create();  // may move the parent
  for (std::int32_t page : pages) ++state_->num_owners[static_cast<std::size_t>(page)];
  SequencePages& child = state_->at(id, "fork");
  child.pages = std::move(pages);
  child.length = num_tokens;
  return id;
}

std::optional<PageCopy> PagedKvCache::append(std::int64_t sequence, std::int64_t num_tokens) {
  SequencePages& target = state_->at(sequence, "append");
  MSA_CHECK(num_tokens >= 0, "PagedKvCache::append: num_tokens is ", num_tokens, ", expected >= 0");
  if (num_tokens == 0) return std::nullopt;
  const std::int64_t used_in_last = target.length % state_->block_size;
  const bool copy_last =
      used_in_last != 0 && state_->num_owners[static_cast<std::size_t>(target.pages.back())] > 1;
  const std::int64_t wanted = core::ceil_div(target.length + num_tokens, state_->block_size);
  const std::int64_t new_pages =
      wanted - static_cast<std::int64_t>(target.pages.size()) + (copy_last ? 1 : 0);
  if (new_pages > num_free_pages()) {
    throw Error(ErrorCode::out_of_memory,
                core::concat("PagedKvCache::append: ", num_tokens, " tokens for sequence ",
                             sequence, " need ", new_pages, " pages, but ", num_free_pages(),
                             " of ", num_pages(), " are free"));
  }
  std::optional<PageCopy> copy;
  if (copy_last) {
    copy = PageCopy{.source_page = target.pages.back(),
                    .destination_page = state_->take_page(),
                    .num_tokens = used_in_last};
    state_->drop_page(copy->source_page);
    target.pages.back() = copy->destination_page;
  }
  while (static_cast<std::int64_t>(target.pages.size()) < wanted) {
    target.pages.push_back(state_->take_page());
  }
  target.length += num_tokens;
  return copy;
}

void PagedKvCache::truncate(std::int64_t sequence, std::int64_t num_tokens) {
  SequencePages& target = state_->at(sequence, "truncate");
  MSA_CHECK(num_tokens >= 0 && num_tokens <= target.length,
            "PagedKvCache::truncate: num_tokens is ", num_tokens, ", but sequence ", sequence,
            " has ", target.length);
  state_->shrink(target, num_tokens);
}

void PagedKvCache::release(std::int64_t sequence) {
  SequencePages& target = state_->at(sequence, "release");
  state_->shrink(target, 0);
  target.live = false;
  state_->free_ids.push_back(sequence);
}

std::int64_t PagedKvCache::length(std::int64_t sequence) const {
  return state_->at(sequence, "length").length;
}

std::span<const std::int32_t> PagedKvCache::pages(std::int64_t sequence) const {
  return state_->at(sequence, "pages").pages;
}

std::int64_t PagedKvCache::num_free_pages() const {
  return static_cast<std::int64_t>(state_->free_pages.size());
}

std::int64_t PagedKvCache::num_pages() const {
  return static_cast<std::int64_t>(state_->num_owners.size());
}

std::int64_t PagedKvCache::block_size() const { return state_->block_size; }

void PagedKvCache::fill(std::span<const std::int64_t> sequences, const TensorView& page_table,
                        const TensorView& seq_lens_k) const {
  const auto batch_size = static_cast<std::int64_t>(sequences.size());
  core::check_tensor("PagedKvCache::fill", "page_table", page_table, {DType::i32},
                     {{"batch_size", batch_size}, {"max_pages", core::kAny}});
  core::check_tensor("PagedKvCache::fill", "seq_lens_k", seq_lens_k, {DType::i32},
                     {{"batch_size", batch_size}});
  MSA_CHECK(page_table.device.type == DeviceType::cpu && seq_lens_k.device.type == DeviceType::cpu,
            "PagedKvCache::fill: page_table and seq_lens_k must be in host memory");
  for (std::int64_t b = 0; b < batch_size; ++b) {
    const SequencePages& sequence = state_->at(sequences[static_cast<std::size_t>(b)], "fill");
    const auto used = static_cast<std::int64_t>(sequence.pages.size());
    MSA_CHECK(used <= page_table.shape[1], "PagedKvCache::fill: sequence ",
              sequences[static_cast<std::size_t>(b)], " has ", used, " pages, page_table has ",
              page_table.shape[1], " columns");
    for (std::int64_t block = 0; block < page_table.shape[1]; ++block) {
      core::store_i32(page_table,
                      block < used ? sequence.pages[static_cast<std::size_t>(block)] : -1, b,
                      block);
    }
    core::store_i32(seq_lens_k, static_cast<std::int32_t>(sequence.length), b);
  }
}

}  // namespace msa
