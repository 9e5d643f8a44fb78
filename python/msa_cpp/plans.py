# SPDX-License-Identifier: Apache-2.0
"""plan(args), plan.run(args): check and choose once, run often."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from . import _core
from ._arrays import Place, import_array, import_bytes
from .operations import Operation, Problem

_PROBLEM = tuple(field.name for field in dataclasses.fields(Problem))
Args = TypeVar("Args", bound=Operation)


def place_of(args: Operation, stream: Any = None) -> Place:
    return Place(args.tensors().values(), stream)


def bind(args: Operation, place: Place) -> _core.Request:
    """The C++ argument struct."""
    lengths = (args.batch.max_seq_len_q, args.batch.max_seq_len_k)
    request: _core.Request = getattr(_core, type(args).__name__)(
        tuple(getattr(args.problem, name) for name in _PROBLEM), lengths
    )
    for name, array in args.tensors().items():
        writable = name in args.outputs
        request.set_tensor(name, import_array(name, array, writable=writable, stream=place.stream))
    for name in args.scalar_names():
        request.set_float(name, getattr(args, name))
    return request


def run_bound(
    native: _core.OperationPlan, request: _core.Request, place: Place, workspace: Any
) -> None:
    if workspace is None:
        workspace = place.workspace(native.workspace_bytes)
    memory = None if workspace is None else import_bytes("workspace", workspace, place.stream)
    native.run(request, memory, place.stream or 0)


class Plan(Generic[Args]):
    """A checked request bound to one implementation, for any arrays of the planned shapes, strides
    and dtypes. Immutable; threads may share it as long as each brings its own workspace."""

    def __init__(self, native: _core.OperationPlan, operation: type[Args]) -> None:
        self._native = native
        self._operation = operation

    @property
    def workspace_bytes(self) -> int:
        """Bytes that run() needs, aligned to 64 (256 on a GPU)."""
        return self._native.workspace_bytes

    @property
    def implementation(self) -> str:
        """Name of the chosen implementation, for example "cpu"."""
        return self._native.implementation

    def run(self, args: Args, *, workspace: Any = None, stream: Any = None) -> None:
        """Runs on `args`, outputs included.

        workspace: a contiguous int8 or uint8 array of workspace_bytes on the device of `args`; without one it
            is allocated. stream: a CUDA stream, by default PyTorch's current one for its tensors and
            else the default stream. On a GPU the call returns before the work is done.
        """
        if type(args) is not self._operation:
            raise TypeError(
                f"the plan is one for {self._operation.__name__}, args are {type(args).__name__}"
            )
        place = place_of(args, stream)
        with place.current():
            run_bound(self._native, bind(args, place), place, workspace)

    def __repr__(self) -> str:
        return (
            f"Plan({self._operation.__name__}, implementation={self.implementation!r}, "
            f"workspace_bytes={self.workspace_bytes})"
        )


def plan(args: Args, *, backend: str | None = None, deterministic: bool = True) -> Plan[Args]:
    """Checks `args`, which must name its outputs, and chooses a backend.

    backend: name of the implementation to use; None: $MSA_BACKEND, or else the first that takes the
        request. deterministic: results are bitwise repeatable; others decline.
    Raises ValueError for a request that contradicts itself and NotImplementedError for one that no
    backend takes, with each backend's reason.
    """
    place = place_of(args)
    with place.current():
        native = bind(args, place).plan(backend, deterministic)
    return Plan(native, type(args))


def execute(
    args: Operation,
    place: Place,
    *,
    backend: str | None,
    deterministic: bool,
    workspace: Any,
) -> None:
    """plan() and run() in one, for a request whose place has been made current."""
    request = bind(args, place)
    run_bound(request.plan(backend, deterministic), request, place, workspace)
