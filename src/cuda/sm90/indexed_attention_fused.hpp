// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/implementation.hpp"
#include "msa/indexed_attention.hpp"

namespace msa::cuda::sm90 {

/// A decode step in one launch. docs/kernels/sm90_decode_fused.md
extern const msa::detail::Implementation<IndexedAttentionForward> kIndexedAttentionFused;

}  // namespace msa::cuda::sm90
