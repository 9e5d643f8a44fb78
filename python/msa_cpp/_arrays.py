# SPDX-License-Identifier: Apache-2.0
"""Arrays of numpy, PyTorch, JAX and other DLPack libraries: in without a copy, and out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from . import _core


@runtime_checkable
class Array(Protocol):
    """An array of any library that speaks DLPack, on the CPU or a CUDA device."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


# The library's names of element types, by those that numpy, PyTorch and JAX share.
_DTYPES = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "int8": "i8",
    "int32": "i32",
}
# The same by the libraries' own objects, as they come along.
_known: dict[Any, str] = {}
_NAMES = {short: name for name, short in _DTYPES.items()}
_BITS = {"bf16": np.uint16, "e4m3": np.uint8}


def is_torch(array: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_jax(array: object) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.Array)


def dtype_of(name: str, array: Any) -> str:
    """The library's name of an array's element type: "f32", "bf16", ..."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} is a {type(array).__name__}, expected an array with __dlpack__")
    if dtype in _known:
        return _known[dtype]
    text = str(dtype).rpartition(".")[2]
    if text not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    return _known.setdefault(dtype, _DTYPES[text])


def stream_handle(stream: Any) -> int:
    """A cudaStream_t as a number, of a number or of a stream object of PyTorch, CuPy or CUDA Python."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "ptr"):
        return int(stream.ptr)
    raise TypeError(f"stream is a {type(stream).__name__}, expected a number or a CUDA stream object")


def import_array(name: str, array: Any, *, writable: bool, stream: int | None) -> _core.Tensor:
    """A view of `array`. `stream`: where a CUDA array will be used."""
    dtype = dtype_of(name, array)
    if is_torch(array):
        from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

        array = array.detach()
        if array.is_neg():
            if writable:
                raise TypeError(f"{name} is written to, but is a negated view of other memory")
            array = array.resolve_neg()
        if dtype == "e4m3":
            # Not every version of PyTorch exports it.
            import torch

            return _core.Tensor(to_dlpack(array.view(torch.uint8)), name, writable, dtype)
        return _core.Tensor(to_dlpack(array), name, writable, None)
    if isinstance(array, np.ndarray):
        if dtype in _BITS:
            return _core.Tensor(array.view(_BITS[dtype]), name, writable, dtype)
        return _core.Tensor(array, name, writable, None)
    if is_jax(array):
        if writable:
            raise TypeError(f"{name} is written to, but is a JAX array: those are immutable")
        array.block_until_ready()
    if hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) == 2:
        # The producer makes `stream` wait for its own work; 1 is the legacy default stream.
        capsule = array.__dlpack__(stream=stream or 1)
        return _core.Tensor(capsule, name, writable, None)
    return _core.Tensor(array, name, writable, None)


def import_bytes(name: str, array: Any, stream: int | None) -> _core.Tensor:
    """A writable view of an array of int8 or uint8."""
    if getattr(array, "dtype", None) == np.uint8:
        array = array.view("int8")
    elif is_torch(array):
        import torch

        if array.dtype == torch.uint8:
            array = array.view(torch.int8)
    return import_array(name, array, writable=True, stream=stream)


class Place:
    """Where the arrays of one call live: their library, device and stream."""

    def __init__(self, arrays: Iterable[Any], stream: Any = None) -> None:
        first: Any = next((array for array in arrays if array is not None), None)
        self.kind = "numpy"
        self.device: Any = None
        self.is_cuda = False
        if is_torch(first):
            self.kind = "torch"
            self.device = first.device
            self.is_cuda = first.device.type == "cuda"
        elif first is not None and not isinstance(first, np.ndarray):
            self.kind = "jax" if is_jax(first) else "other"
            if hasattr(first, "__dlpack_device__"):
                self.is_cuda = int(first.__dlpack_device__()[0]) in (2, 13)
        self._explicit_stream = stream is not None
        self.stream: int | None = None
        if self._explicit_stream:
            self.stream = stream_handle(stream)
        elif self.kind == "torch" and self.is_cuda:
            import torch

            self.stream = torch.cuda.current_stream(self.device).cuda_stream

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """The device of the arrays is the current one, and so is an explicit stream, so that PyTorch
        does not hand the call's memory to another stream too early."""
        if self.kind != "torch" or not self.is_cuda:
            yield
            return
        import torch

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.cuda.device(self.device))
            if self._explicit_stream:
                external: Any = torch.cuda.ExternalStream
                external = external(self.stream, device=self.device)
                stack.enter_context(torch.cuda.stream(external))
            yield

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """New memory for an output: a tensor for PyTorch, else a numpy array."""
        if self.kind == "torch":
            import torch

            return torch.empty(tuple(shape), dtype=getattr(torch, _NAMES[dtype]), device=self.device)
        if self.is_cuda:
            raise TypeError(
                "outputs on a CUDA device are allocated for PyTorch tensors only; give every output, "
                "and a workspace"
            )
        if dtype in _BITS:
            import ml_dtypes

            numpy_dtype = np.dtype(getattr(ml_dtypes, _NAMES[dtype]))
        else:
            numpy_dtype = np.dtype(_NAMES[dtype])
        count = int(np.prod(shape, dtype=np.int64))
        return aligned_bytes(count * numpy_dtype.itemsize).view(numpy_dtype).reshape(tuple(shape))

    def workspace(self, num_bytes: int) -> Any:
        if num_bytes == 0:
            return None
        if self.kind == "torch":
            import torch

            # PyTorch aligns CPU memory to 64 bytes and CUDA memory to 512.
            return torch.empty(num_bytes, dtype=torch.int8, device=self.device)
        if self.is_cuda:
            raise TypeError(f"give a workspace of {num_bytes} bytes (int8) on the tensors' CUDA device")
        return aligned_bytes(num_bytes).view(np.int8)

    def finish(self, array: Any) -> Any:
        """What the caller gets for an array of empty()."""
        if self.kind != "jax" or not isinstance(array, np.ndarray):
            return array
        import jax

        dtype = dtype_of("output", array)
        bits = array.view(_BITS[dtype]) if dtype in _BITS else array
        return jax.dlpack.from_dlpack(_core.export_as(bits, dtype))


def aligned_bytes(num_bytes: int, alignment: int = 64) -> np.ndarray:
    memory = np.empty(num_bytes + alignment, np.uint8)
    begin = -memory.ctypes.data % alignment
    return memory[begin : begin + num_bytes]
