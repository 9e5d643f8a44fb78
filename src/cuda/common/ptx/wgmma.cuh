// SPDX-License-Identifier: Apache-2.0
//
// wgmma of sm_90a: D[64][N] (+)= A[64][32 bytes] B[N][32 bytes], issued by a warpgroup of 128
// threads whose first warp is a multiple of 4. Layouts as measured on an H100 (docs/kernels).
//
// Rules that the compiler does not check: fence() before the first wgmma after registers of D or A
// were written; registers of D and A stay untouched until wait() has returned for their group;
// pin() the results behind wait(), else the compiler moves their use above it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace msa::cuda::ptx {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// All but the newest `kPending` groups have finished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// No instruction: the compiler must have these registers in place here.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <class T, int kCount>
__device__ __forceinline__ void pin(T (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

/// Row and column of D that accumulator i of this thread holds.
__device__ __forceinline__ int accumulator_row(int i) {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 +
         i / 2 % 2 * 8;
}
__device__ __forceinline__ int accumulator_column(int i) {
  return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

/// Descriptor of an operand whose K axis is contiguous (see k_major in swizzle.cuh), 128-byte
/// swizzle. Add k_major_step through advance().
__device__ __forceinline__ std::uint64_t k_major_descriptor(std::uint32_t address) {
  const std::uint32_t low = (address & 0x3FFFF) >> 4 | 1u << 16;
  const std::uint32_t high = 1024 >> 4 | 1u << 30;  // 8 rows are 1024 bytes apart
  return std::uint64_t{high} << 32 | low;
}
/// Descriptor of an operand of 16-bit elements whose M or N axis is contiguous: panels of 64
/// columns, `k_rows` rows each.
__device__ __forceinline__ std::uint64_t mn_major_descriptor(std::uint32_t address,
                                                             std::uint32_t k_rows) {
  const std::uint32_t low = (address & 0x3FFFF) >> 4 | (k_rows * 128 >> 4) << 16;
  const std::uint32_t high = 1024 >> 4 | 1u << 30;
  return std::uint64_t{high} << 32 | low;
}
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, std::uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000ull) |
         (static_cast<std::uint32_t>(descriptor) + (bytes >> 4));
}

/// ss(): A and B from shared memory. rs(): A from registers (for 16-bit elements a[i] holds row
/// l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next of the warp's 16 rows, as in
/// m16n8k16). accumulate == 0 overwrites d. kTransB: B is MN-major (16-bit types only).
template <class T, int kN>
struct Wgmma;

// clang-format off
#define MSA_REGS4 "%0,%1,%2,%3"
#define MSA_REGS8 MSA_REGS4 ",%4,%5,%6,%7"
#define MSA_REGS16 MSA_REGS8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MSA_REGS32 MSA_REGS16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MSA_REGS64 MSA_REGS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MSA_REGS128 MSA_REGS64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MSA_OUT4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define MSA_OUT16(c, i) MSA_OUT4(c, i), MSA_OUT4(c, i + 4), MSA_OUT4(c, i + 8), MSA_OUT4(c, i + 12)
#define MSA_OUT64(c, i) MSA_OUT16(c, i), MSA_OUT16(c, i + 16), MSA_OUT16(c, i + 32), MSA_OUT16(c, i + 48)
#define MSA_OUTS4(c) MSA_OUT4(c, 0)
#define MSA_OUTS8(c) MSA_OUT4(c, 0), MSA_OUT4(c, 4)
#define MSA_OUTS16(c) MSA_OUT16(c, 0)
#define MSA_OUTS32(c) MSA_OUT16(c, 0), MSA_OUT16(c, 16)
#define MSA_OUTS64(c) MSA_OUT64(c, 0)
#define MSA_OUTS128(c) MSA_OUT64(c, 0), MSA_OUT64(c, 64)
#define MSA_PREDICATE(p) "{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"
#define MSA_A_REGS(i, j, k, l) "{%" #i ",%" #j ",%" #k ",%" #l "}"
#define MSA_A_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// R = N / 2 accumulators a thread are the operands 0 .. R-1 of the asm statement; p0 .. p6 are the
// numbers R .. R+6. TYPES names d, a and b; FLAGS are the sign immediates that integers lack.
#define MSA_WGMMA_16BIT(T, TYPES, N, R, p0, p1, p2, p3, p4, p5, p6)                                \
  template <> struct Wgmma<T, N> {                                                                 \
    template <int kTransB>                                                                         \
    static __device__ __forceinline__ void ss(float (&d)[R], std::uint64_t a, std::uint64_t b,     \
                                              int accumulate) {                                    \
      asm volatile(MSA_PREDICATE(p2) "wgmma.mma_async.sync.aligned.m64n" #N "k16." TYPES " {"      \
                   MSA_REGS##R "}, %" #p0 ", %" #p1 ", p, 1, 1, 0, %" #p3 ";\n}\n"                 \
                   : MSA_OUTS##R("+f") : "l"(a), "l"(b), "r"(accumulate), "n"(kTransB));           \
    }                                                                                              \
    template <int kTransB>                                                                         \
    static __device__ __forceinline__ void rs(float (&d)[R], const std::uint32_t (&a)[4],          \
                                              std::uint64_t b, int accumulate) {                   \
      asm volatile(MSA_PREDICATE(p5) "wgmma.mma_async.sync.aligned.m64n" #N "k16." TYPES " {"      \
                   MSA_REGS##R "}, " MSA_A_REGS(p0, p1, p2, p3) ", %" #p4 ", p, 1, 1, %" #p6       \
                   ";\n}\n"                                                                        \
                   : MSA_OUTS##R("+f") : MSA_A_IN, "l"(b), "r"(accumulate), "n"(kTransB));         \
    }                                                                                              \
  };
#define MSA_WGMMA_8BIT(T, D, C, TYPES, FLAGS, N, R, p0, p1, p2, p3, p4, p5)                        \
  template <> struct Wgmma<T, N> {                                                                 \
    static __device__ __forceinline__ void ss(D (&d)[R], std::uint64_t a, std::uint64_t b,         \
                                              int accumulate) {                                    \
      asm volatile(MSA_PREDICATE(p2) "wgmma.mma_async.sync.aligned.m64n" #N "k32." TYPES " {"      \
                   MSA_REGS##R "}, %" #p0 ", %" #p1 ", p" FLAGS ";\n}\n"                           \
                   : MSA_OUTS##R(C) : "l"(a), "l"(b), "r"(accumulate));                            \
    }                                                                                              \
    static __device__ __forceinline__ void rs(D (&d)[R], const std::uint32_t (&a)[4],              \
                                              std::uint64_t b, int accumulate) {                   \
      asm volatile(MSA_PREDICATE(p5) "wgmma.mma_async.sync.aligned.m64n" #N "k32." TYPES " {"      \
                   MSA_REGS##R "}, " MSA_A_REGS(p0, p1, p2, p3) ", %" #p4 ", p" FLAGS ";\n}\n"     \
                   : MSA_OUTS##R(C) : MSA_A_IN, "l"(b), "r"(accumulate));                          \
    }                                                                                              \
  };
#define MSA_WGMMA(N, R, p0, p1, p2, p3, p4, p5, p6)                                                \
  MSA_WGMMA_16BIT(__nv_bfloat16, "f32.bf16.bf16", N, R, p0, p1, p2, p3, p4, p5, p6)                \
  MSA_WGMMA_16BIT(__half, "f32.f16.f16", N, R, p0, p1, p2, p3, p4, p5, p6)                         \
  MSA_WGMMA_8BIT(__nv_fp8_e4m3, float, "+f", "f32.e4m3.e4m3", ", 1, 1", N, R, p0, p1, p2, p3, p4,  \
                 p5)                                                                               \
  MSA_WGMMA_8BIT(std::int8_t, std::int32_t, "+r", "s32.s8.s8", "", N, R, p0, p1, p2, p3, p4, p5)
MSA_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
MSA_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
MSA_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
MSA_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
MSA_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
MSA_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef MSA_WGMMA
#undef MSA_WGMMA_8BIT
#undef MSA_WGMMA_16BIT
#undef MSA_A_IN
#undef MSA_A_REGS
#undef MSA_PREDICATE
#undef MSA_OUTS128
#undef MSA_OUTS64
#undef MSA_OUTS32
#undef MSA_OUTS16
#undef MSA_OUTS8
#undef MSA_OUTS4
#undef MSA_OUT64
#undef MSA_OUT16
#undef MSA_OUT4
#undef MSA_REGS128
#undef MSA_REGS64
#undef MSA_REGS32
#undef MSA_REGS16
#undef MSA_REGS8
#undef MSA_REGS4
// clang-format on

}  // namespace msa::cuda::ptx
