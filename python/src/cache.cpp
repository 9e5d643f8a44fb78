// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "msa/kv_cache.hpp"
#include "tensor.hpp"

namespace nb = nanobind;

namespace msa_python {

void bind_cache(nb::module_& module) {
  using Cache = msa::PagedKvCache;
  using Copy = std::tuple<std::int32_t, std::int32_t, std::int64_t>;
  nb::class_<Cache>(module, "PagedKvCache")
      .def(nb::init<std::int64_t, std::int64_t>(), nb::arg("num_pages"), nb::arg("block_size"))
      .def("create", &Cache::create)
      .def("fork", &Cache::fork, nb::arg("sequence"), nb::arg("num_tokens"))
      .def(
          "append",
          [](Cache& cache, std::int64_t sequence, std::int64_t num_tokens) -> std::optional<Copy> {
            const auto copy = cache.append(sequence, num_tokens);
            if (!copy) return std::nullopt;
            return Copy{copy->source_page, copy->destination_page, copy->num_tokens};
          },
          nb::arg("sequence"), nb::arg("num_tokens"))
      .def("truncate", &Cache::truncate, nb::arg("sequence"), nb::arg("num_tokens"))
      .def("release", &Cache::release, nb::arg("sequence"))
      .def("length", &Cache::length, nb::arg("sequence"))
      .def(
          "pages",
          [](const Cache& cache, std::int64_t sequence) {
            const auto pages = cache.pages(sequence);
            return std::vector<std::int32_t>(pages.begin(), pages.end());
          },
          nb::arg("sequence"))
      .def_prop_ro("num_free_pages", &Cache::num_free_pages)
      .def_prop_ro("num_pages", &Cache::num_pages)
      .def_prop_ro("block_size", &Cache::block_size)
      .def("fill", [](const Cache& cache, const std::vector<std::int64_t>& sequences,
                      const Tensor& page_table, const Tensor& seq_lens_k) {
        cache.fill(sequences, page_table.view, seq_lens_k.view);
      });
}

}  // namespace msa_python
