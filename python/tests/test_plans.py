# SPDX-License-Identifier: Apache-2.0
"""Plans, the argument classes against the C++ header, and what a build says of itself."""

import dataclasses
import pathlib
import re
import sys
import threading

import numpy as np
import pytest
from conftest import Case

import msa_cpp
from msa_cpp import _core, operations

P = Case.problem
INCLUDE = pathlib.Path(__file__).parents[2] / "include" / "msa"
HEADERS = [INCLUDE / "ops.hpp", INCLUDE / "indexed_attention.hpp"]
CLASSES = [c for c in vars(operations).values() if isinstance(c, type)]
OPERATIONS = [c for c in CLASSES if issubclass(c, msa_cpp.Operation) and c is not msa_cpp.Operation]


def header_fields(struct):
    """Names and defaults of a struct's fields, in order."""
    text = re.sub(r"//[^\n]*", "", "".join(header.read_text(encoding="utf-8") for header in HEADERS))
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.S)[1]
    fields = re.findall(
        r"(?:TensorView|Problem|Batch|float|int|std::int64_t)\s+(\w+)\s*(?:\{\}|= ([^;]+));", body
    )
    return [(name, default.rstrip("f") or None) for name, default in fields]


@pytest.mark.parametrize("cls", OPERATIONS, ids=lambda c: c.__name__)
def test_fields_are_those_of_the_header(cls):
    fields = header_fields(cls.__name__)
    assert [f.name for f in dataclasses.fields(cls)] == [name for name, _ in fields]
    assert getattr(_core, cls.__name__).field_names() == [
        *cls.tensor_names(),
        *cls.scalar_names(),
    ]
    for name, default in fields:
        if default is not None:
            assert float(default) == getattr(cls(), name)
    assert set(cls.outputs) <= set(cls.tensor_names())


def test_every_operation_is_there():
    names = {c.__name__ for c in OPERATIONS}
    assert names == {row.operation for row in msa_cpp.implementations()}
    for name in names:
        function = re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
        assert callable(getattr(msa_cpp, function)), function


@pytest.mark.parametrize("cls", [msa_cpp.Problem, msa_cpp.Batch], ids=lambda c: c.__name__)
def test_problem_and_batch_have_the_header_s_defaults(cls):
    fields = header_fields(cls.__name__)
    assert [f.name for f in dataclasses.fields(cls)] == [name for name, _ in fields]
    for name, default in fields:
        assert getattr(cls(), name) == (None if default is None else float(default))


def request(case):
    out = np.empty_like(case.q)
    return msa_cpp.DenseAttentionForward(P, q=case.q, k=case.k, v=case.v, out=out)


def test_a_plan_is_reused(case32):
    args = request(case32)
    plan = msa_cpp.plan(args, backend="cpu")
    assert plan.implementation == "cpu" and plan.workspace_bytes > 0
    workspace = np.empty(plan.workspace_bytes + 64, np.int8)
    workspace = workspace[-workspace.ctypes.data % 64 :][: plan.workspace_bytes]
    plan.run(args, workspace=workspace)
    first = args.out.copy()

    other = request(Case(np.float32, seed=9))
    plan.run(other)
    assert not np.array_equal(other.out, first)
    np.testing.assert_array_equal(
        other.out, msa_cpp.dense_attention_forward(other.q, other.k, other.v, problem=P).out
    )


def test_what_a_plan_refuses(case32):
    plan = msa_cpp.plan(request(case32))
    with pytest.raises(ValueError, match="planned was"):
        plan.run(request(Case(np.float32, num_queries=100)))
    with pytest.raises(ValueError, match="workspace has 3 bytes"):
        plan.run(request(case32), workspace=np.empty(3, np.uint8))
    backwards = np.empty(plan.workspace_bytes + 64, np.int8)[::-1]
    with pytest.raises(ValueError, match="workspace is not contiguous"):
        plan.run(request(case32), workspace=backwards)
    with pytest.raises(TypeError, match="the plan is one for DenseAttentionForward"):
        plan.run(msa_cpp.Indexer(P))


def test_out_is_required_of_a_plan(case32):
    with pytest.raises(ValueError, match="out"):
        msa_cpp.plan(msa_cpp.DenseAttentionForward(P, q=case32.q, k=case32.k, v=case32.v))


def test_run_releases_the_interpreter(case):
    """With a switch interval of minutes, another thread gets a turn only while run() lets go of the lock;
    some of many runs will see one, however busy the machine."""
    args = request(case)
    plan = msa_cpp.plan(args, backend="reference")
    turns = 0
    done = threading.Event()
    started = threading.Event()

    def count():
        nonlocal turns
        started.set()
        while not done.wait(0.0005):
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    started.wait()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(300.0)
    try:
        before = turns
        runs = 0
        while turns == before and runs < 1000:
            plan.run(args)
            runs += 1
        during = turns - before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    assert during > 0


def test_two_threads_share_a_plan(case32):
    expected = request(case32)
    plan = msa_cpp.plan(expected, backend="reference")
    plan.run(expected)
    requests = [request(case32) for _ in range(2)]
    threads = [threading.Thread(target=plan.run, args=(r,)) for r in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for r in requests:
        np.testing.assert_array_equal(r.out, expected.out)


def test_backends_and_threads():
    backends = {b.name: b for b in msa_cpp.backends()}
    assert backends["reference"].available and backends["cpu"].available
    threads = msa_cpp.num_threads()
    msa_cpp.set_num_threads(1)
    assert msa_cpp.num_threads() == 1
    msa_cpp.set_num_threads(threads)
    with pytest.raises(ValueError, match="0"):
        msa_cpp.set_num_threads(0)
    assert re.fullmatch(r"\d+\.\d+\.\d+", msa_cpp.__version__)
