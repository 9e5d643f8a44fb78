// SPDX-License-Identifier: Apache-2.0
//
// The model runtime's matrix products, y [tokens, out] = x [tokens, in] * weight [out, in]^T, by
// oneDNN's and OpenBLAS's sgemm on one thread and by the runtime's own linear(), which reads bf16
// weights. docs/decisions/0004-gemm-library.md has the results. OpenBLAS takes part where it was
// found; unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, or it runs kernels of another CPU.
#include <benchmark/benchmark.h>
#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "model/linear.hpp"
#include "msa/backend.hpp"

#ifdef MSA_BENCH_OPENBLAS
#include <cblas.h>
#endif

extern "C" void omp_set_num_threads(int num_threads);

namespace {

struct Shape {
  const char* name;
  std::int64_t in;
  std::int64_t out;
};

// A model of hidden 256 (bench/llama_cpp.py) and the released one.
constexpr Shape kShapes[] = {{"tiny.q_proj", 256, 2048},    {"tiny.o_proj", 2048, 256},
                             {"tiny.expert", 256, 128},     {"m3.q_proj", 6144, 8192},
                             {"m3.k_proj", 6144, 512},      {"m3.expert_up", 6144, 3072},
                             {"m3.expert_down", 3072, 6144}};
// Decode; a chunk's share of one of 128 experts; a chunk.
constexpr std::int64_t kTokens[] = {1, 16, 512};
constexpr std::int64_t kWhole = 0;

/// Values that are neither subnormal nor alike; their size doesn't matter.
std::vector<float> values(std::int64_t count) {
  std::vector<float> out(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<float>((i * 2654435761u) % 1021) / 1021.0f - 0.5f;
  }
  return out;
}

void count_work(benchmark::State& state, const Shape& shape, std::int64_t tokens,
                double weight_bytes) {
  const double multiply_adds =
      static_cast<double>(tokens) * static_cast<double>(shape.in) * static_cast<double>(shape.out);
  using benchmark::Counter;
  state.counters["GFLOP/s"] =
      Counter(2e-9 * multiply_adds, Counter::kIsIterationInvariantRate, Counter::kIs1000);
  state.counters["weight_GB/s"] =
      Counter(1e-9 * weight_bytes * static_cast<double>(shape.in) * static_cast<double>(shape.out),
              Counter::kIsIterationInvariantRate, Counter::kIs1000);
}

using Sgemm = void (*)(std::int64_t tokens, std::int64_t out, std::int64_t in, const float* x,
                       const float* weight, float* y, std::int64_t y_stride);

void onednn(std::int64_t tokens, std::int64_t out, std::int64_t in, const float* x,
            const float* weight, float* y, std::int64_t y_stride) {
  dnnl_sgemm('N', 'T', tokens, out, in, 1.0f, x, in, weight, in, 0.0f, y, y_stride);
}

#ifdef MSA_BENCH_OPENBLAS
void openblas(std::int64_t tokens, std::int64_t out, std::int64_t in, const float* x,
              const float* weight, float* y, std::int64_t y_stride) {
  const auto narrow = [](std::int64_t value) { return static_cast<blasint>(value); };
  if (tokens == 1) {
    cblas_sgemv(CblasRowMajor, CblasNoTrans, narrow(out), narrow(in), 1.0f, weight, narrow(in), x,
                1, 0.0f, y, 1);
    return;
  }
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, narrow(tokens), narrow(out), narrow(in),
              1.0f, x, narrow(in), weight, narrow(in), 0.0f, y, narrow(y_stride));
}
#endif

/// f32 weights, `rows` of them per call.
void run_sgemm(benchmark::State& state, Sgemm sgemm, Shape shape, std::int64_t tokens,
               std::int64_t rows) {
  omp_set_num_threads(1);
  const std::vector<float> x = values(tokens * shape.in);
  const std::vector<float> weight = values(shape.in * shape.out);
  std::vector<float> y(static_cast<std::size_t>(tokens * shape.out));
  if (rows == kWhole) rows = shape.out;
  for (auto _ : state) {
    for (std::int64_t row = 0; row < shape.out; row += rows) {
      sgemm(tokens, std::min(rows, shape.out - row), shape.in, x.data(),
            weight.data() + row * shape.in, y.data() + row, shape.out);
    }
    benchmark::ClobberMemory();
  }
  count_work(state, shape, tokens, sizeof(float));
}

void run_linear(benchmark::State& state, Shape shape, std::int64_t tokens, msa::DType dtype) {
  msa::set_num_threads(1);
  const std::vector<float> x = values(tokens * shape.in);
  const std::vector<float> source = values(shape.in * shape.out);
  const msa::core::Tensor weight(dtype, {shape.out, shape.in});
  auto* bits = weight.data<std::uint16_t>();
  for (std::size_t i = 0; i < source.size(); ++i) {
    bits[i] = dtype == msa::DType::bf16 ? msa::core::f32_to_bf16(source[i])
                                        : msa::core::f32_to_f16(source[i]);
  }
  std::vector<float> y(static_cast<std::size_t>(tokens * shape.out));
  msa::model::LinearScratch scratch;
  for (auto _ : state) {
    msa::model::linear(weight, x, tokens, y, scratch);
    benchmark::ClobberMemory();
  }
  count_work(state, shape, tokens, static_cast<double>(msa::size_of(dtype)));
}

void add_sgemm(const char* library, Sgemm sgemm, const Shape& shape, std::int64_t tokens) {
  for (std::int64_t rows : {kWhole, std::int64_t{128}}) {
    if (rows != kWhole && tokens == 1) continue;
    const std::string name = std::string(shape.name) + "/tokens:" + std::to_string(tokens) + "/" +
                             library + (rows == kWhole ? "" : ".rows128");
    benchmark::RegisterBenchmark(name.c_str(), run_sgemm, sgemm, shape, tokens, rows);
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
#ifdef MSA_BENCH_OPENBLAS
  openblas_set_num_threads(1);
  benchmark::AddCustomContext("openblas", openblas_get_config());
#endif
  const dnnl_version_t* version = dnnl_version();
  benchmark::AddCustomContext("onednn", std::to_string(version->major) + "." +
                                            std::to_string(version->minor) + "." +
                                            std::to_string(version->patch));
  for (const Shape& shape : kShapes) {
    for (std::int64_t tokens : kTokens) {
      add_sgemm("onednn", onednn, shape, tokens);
#ifdef MSA_BENCH_OPENBLAS
      add_sgemm("openblas", openblas, shape, tokens);
#endif
      for (msa::DType dtype : {msa::DType::bf16, msa::DType::f16}) {
        const std::string name = std::string(shape.name) + "/tokens:" + std::to_string(tokens) +
                                 "/linear." + msa::name_of(dtype);
        benchmark::RegisterBenchmark(name.c_str(), run_linear, shape, tokens, dtype);
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
