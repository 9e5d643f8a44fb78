// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Builds a function for wider vectors too and picks one when the program is loaded, for loops that
/// the compiler vectorises by itself. Sanitizers start later than the picking, so they get the
/// plain function alone.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MSA_WIDE_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MSA_WIDE_CLONES
#endif
