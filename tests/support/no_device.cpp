// SPDX-License-Identifier: Apache-2.0
#include "msa/error.hpp"
#include "tests/support/device.hpp"

namespace msa::testing {
namespace {

[[noreturn]] void refuse() { throw Error(ErrorCode::unsupported, why_no_device()); }

}  // namespace

std::string why_no_device() { return "no CUDA device: built without MSA_CUDA"; }

DeviceBuffer::DeviceBuffer(std::size_t) { refuse(); }
void DeviceBuffer::Free::operator()(std::byte*) const {}
void DeviceBuffer::fill(std::byte) const { refuse(); }
void DeviceBuffer::upload(std::span<const std::byte>) const { refuse(); }
void DeviceBuffer::download(std::span<std::byte>) const { refuse(); }

DeviceStream::DeviceStream() { refuse(); }
void DeviceStream::Destroy::operator()(void*) const {}
void DeviceStream::wait() const { refuse(); }
void DeviceStream::run_as_graph(const std::function<void(Stream)>&) const { refuse(); }

}  // namespace msa::testing
