// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "msa/backend.hpp"
#include "msa/error.hpp"
#include "msa/indexed_attention.hpp"
#include "msa/kv_cache.hpp"
#include "msa/ops.hpp"
#include "msa/tensor.hpp"
