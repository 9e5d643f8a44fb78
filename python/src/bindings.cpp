// SPDX-License-Identifier: Apache-2.0
//
// msa_cpp._core: the C++ API as it is, without convenience. Each operation is a request class whose
// fields are set by name, and a plan class. Allocation, frameworks and defaults are Python's part
// (python/msa_cpp).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "fields.hpp"
#include "msa/msa.hpp"
#include "tensor.hpp"

namespace nb = nanobind;

namespace msa_python {
namespace {

/// An argument struct under construction. The tensors that it names stay alive with it.
template <class Args>
struct Request {
  Args args;
  std::vector<Tensor> tensors;
};

template <class Args>
void set_tensor(Request<Args>& request, const std::string& name, const Tensor& tensor) {
  msa::TensorView* view = nullptr;
  for (const auto& field : kBatchTensors) {
    if (name == field.name) view = &(request.args.batch.*field.member);
  }
  for (const auto& field : Fields<Args>::tensors) {
    if (name == field.name) view = &(request.args.*field.member);
  }
  if (view == nullptr) throw nb::key_error(name.c_str());
  *view = tensor.view;
  request.tensors.push_back(tensor);
}

template <class Args>
void set_float(Request<Args>& request, const std::string& name, float value) {
  for (const auto& field : Fields<Args>::floats) {
    if (name != field.name) continue;
    request.args.*field.member = value;
    return;
  }
  throw nb::key_error(name.c_str());
}

template <class Args>
msa::Plan<Args> make_plan(const Request<Args>& request, const std::optional<std::string>& backend,
                          bool deterministic) {
  return msa::plan(request.args, {.backend = backend ? backend->c_str() : nullptr,
                                  .deterministic = deterministic});
}

bool is_contiguous(const msa::TensorView& view) {
  std::int64_t expected = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    const auto axis = static_cast<std::size_t>(i);
    if (view.shape[axis] != 1 && view.stride[axis] != expected) return false;
    expected *= view.shape[axis];
  }
  return true;
}

/// `workspace` may be null where the plan needs none.
template <class Args>
void run(const msa::Plan<Args>& plan, const Request<Args>& request, const Tensor* workspace,
         std::uintptr_t stream) {
  std::span<std::byte> memory;
  if (workspace != nullptr) {
    const msa::TensorView& view = workspace->view;
    if (!is_contiguous(view)) throw nb::value_error("workspace is not contiguous");
    if (!request.tensors.empty() && !(view.device == request.tensors.front().view.device)) {
      throw nb::value_error("workspace is on another device than the tensors");
    }
    const auto count = static_cast<std::size_t>(view.num_elements());
    memory = {static_cast<std::byte*>(view.data), count * msa::size_of(view.dtype)};
  }
  nb::gil_scoped_release released;
  plan.run(request.args, memory, {reinterpret_cast<void*>(stream)});
}

template <class Args>
std::vector<std::string> field_names() {
  std::vector<std::string> names;
  for (const auto& field : Fields<Args>::tensors) names.emplace_back(field.name);
  for (const auto& field : Fields<Args>::floats) names.emplace_back(field.name);
  return names;
}

template <class Args>
void bind_operation(nb::module_& module, const char* name) {
  nb::class_<msa::Plan<Args>>(module, (std::string(name) + "Plan").c_str())
      .def_prop_ro("workspace_bytes", &msa::Plan<Args>::workspace_bytes)
      .def_prop_ro("implementation", &msa::Plan<Args>::implementation)
      .def("run", &run<Args>, nb::arg("request"), nb::arg("workspace").none(), nb::arg("stream"));
  nb::class_<Request<Args>>(module, name)
      .def("__init__",
           [](Request<Args>* self, const std::array<int, 8>& problem,
              std::tuple<std::int64_t, std::int64_t> max_seq_lens) {
             auto* request = new (self) Request<Args>();
             request->args.problem = {problem[0], problem[1], problem[2], problem[3],
                                      problem[4], problem[5], problem[6], problem[7]};
             std::tie(request->args.batch.max_seq_len_q, request->args.batch.max_seq_len_k) =
                 max_seq_lens;
           })
      .def("set_tensor", &set_tensor<Args>)
      .def("set_float", &set_float<Args>)
      .def("plan", &make_plan<Args>)
      .def_static("field_names", &field_names<Args>);
}

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const msa::Error& error) {
    PyObject* type = PyExc_RuntimeError;
    switch (error.code()) {
      case msa::ErrorCode::invalid_argument:
        type = PyExc_ValueError;
        break;
      case msa::ErrorCode::unsupported:
        type = PyExc_NotImplementedError;
        break;
      case msa::ErrorCode::out_of_memory:
        type = PyExc_MemoryError;
        break;
      case msa::ErrorCode::cuda:
      case msa::ErrorCode::internal:
        break;
    }
    PyErr_SetString(type, error.what());
  }
}

}  // namespace
}  // namespace msa_python

NB_MODULE(_core, module) {
  using namespace msa_python;
  nb::register_exception_translator(translate);
  bind_tensor(module);
  bind_operation<msa::IndexerScores>(module, "IndexerScores");
  bind_operation<msa::SelectTopK>(module, "SelectTopK");
  bind_operation<msa::Indexer>(module, "Indexer");
  bind_operation<msa::SparseAttentionForward>(module, "SparseAttentionForward");
  bind_operation<msa::IndexedAttentionForward>(module, "IndexedAttentionForward");
  bind_operation<msa::DenseAttentionForward>(module, "DenseAttentionForward");
  bind_operation<msa::SparseAttentionBackward>(module, "SparseAttentionBackward");
  bind_operation<msa::IndexerKlBackward>(module, "IndexerKlBackward");
  bind_operation<msa::AppendKv>(module, "AppendKv");
  bind_operation<msa::NormRopeAppendKv>(module, "NormRopeAppendKv");
  bind_cache(module);

  module.def("version", &msa::version);
  module.def("num_threads", &msa::num_threads);
  module.def("set_num_threads", &msa::set_num_threads);
  module.def("backends", [] {
    std::vector<std::tuple<std::string, bool, std::string>> rows;
    for (const msa::BackendInfo& info : msa::backends()) {
      rows.emplace_back(info.name, info.available, info.detail);
    }
    return rows;
  });
  module.def("implementations", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const msa::ImplementationInfo& info : msa::implementations()) {
      rows.emplace_back(info.operation, info.implementation, info.dtypes);
    }
    return rows;
  });
}
