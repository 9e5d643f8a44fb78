# SPDX-License-Identifier: Apache-2.0
"""Arrays in and out: no copies, strides, dtypes, libraries, and what is refused."""

import ml_dtypes
import numpy as np
import pytest
from conftest import Case

import msa_cpp
from msa_cpp import _arrays, _core

P = Case.problem


def pointer(array, writable=False):
    return _arrays.import_array("x", array, writable=writable, stream=None).pointer


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float64,
        np.float16,
        np.int8,
        np.int32,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
    ],
)
def test_numpy_is_not_copied(dtype):
    array = np.zeros((3, 4), dtype)
    assert pointer(array, writable=True) == array.ctypes.data
    assert pointer(array[1:, ::2]) == array[1:, ::2].ctypes.data
    array.flags.writeable = False
    assert pointer(array) == array.ctypes.data


def test_outputs_are_written_in_place(case32):
    out = np.full(case32.q.shape, np.nan, np.float32)
    returned, _ = msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P, out=out)
    assert returned is out and np.isfinite(out).all()


def strided(array, step):
    """The same values with heads before tokens in memory, and 7 in the gaps: between elements for a step
    above 1, after each row."""
    tokens, heads, dim = array.shape
    memory = np.full((heads, tokens, step * dim + 4), 7, array.dtype)
    view = memory.swapaxes(0, 1)[:, :, : step * dim : step]
    view[...] = array
    return view


# The CPU backend takes rows whose elements are neighbours and leaves the others to the reference.
@pytest.mark.parametrize("backend, step", [("reference", 3), ("reference", 1), ("cpu", 1)])
def test_strides_change_nothing(case32, backend, step):
    shared = dict(problem=P, backend=backend)
    plain = (case32.q, case32.k, case32.v, case32.index_q, case32.index_k)
    q, k, v, index_q, index_k = (strided(x, step) for x in plain)
    ids = msa_cpp.indexer(index_q, index_k, **shared)
    np.testing.assert_array_equal(ids, msa_cpp.indexer(*plain[3:], **shared))
    expected, _ = msa_cpp.sparse_attention_forward(*plain[:3], ids, **shared)
    out = strided(np.zeros_like(expected), step)
    msa_cpp.sparse_attention_forward(q, k, v, ids, out=out, **shared)
    np.testing.assert_array_equal(out, expected)
    gaps = out.base.copy()
    gaps[:, :, : step * 16 : step] = 7
    assert (gaps == 7).all()


def test_a_gradient_with_strides_of_zero(case32):
    out, lse = msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P)
    ones = np.ones_like(out)
    expanded = np.broadcast_to(np.float32(1.0), out.shape)
    args = (case32.q, case32.k, case32.v, None, out, lse)
    expected = msa_cpp.sparse_attention_backward(*args, ones, problem=P, backend="reference")
    got = msa_cpp.sparse_attention_backward(*args, expanded, problem=P, backend="reference")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_buffer_of_another_library(case32):
    """Anything with __dlpack__ will do; outputs are then numpy arrays."""

    class Wrapped:
        def __init__(self, array):
            self.array, self.shape, self.dtype = array, array.shape, array.dtype

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    wrapped = [Wrapped(x) for x in (case32.q, case32.k, case32.v)]
    out, _ = msa_cpp.dense_attention_forward(*wrapped, problem=P)
    expected, _ = msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P)
    np.testing.assert_array_equal(out, expected)


def test_read_only_outputs_are_refused(case32):
    out = np.zeros_like(case32.q)
    out.flags.writeable = False
    with pytest.raises(TypeError, match="out is written to"):
        msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P, out=out)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.complex64, ">f4", ml_dtypes.float8_e5m2])
def test_unknown_dtypes_are_refused(case32, dtype):
    with pytest.raises(ValueError, match="q has dtype"):
        msa_cpp.dense_attention_forward(case32.q.astype(dtype), case32.k, case32.v, problem=P)


def test_a_known_dtype_in_the_wrong_place(case32):
    with pytest.raises(ValueError, match="block_ids"):
        msa_cpp.sparse_attention_forward(
            case32.q, case32.k, case32.v, np.zeros((2, 200, 3), np.float32), problem=P
        )


def test_lists_are_refused(case32):
    with pytest.raises(TypeError, match="cu_seqlens_q is a list"):
        batch = msa_cpp.Batch(cu_seqlens_q=[0, 200])
        msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P, batch=batch)


def test_too_many_dimensions():
    with pytest.raises(ValueError, match="index_q has 6 dimensions"):
        _core.Tensor(np.zeros((1,) * 6, np.float32), "index_q", False, None)


def test_message_names_field_and_shapes(case32):
    with pytest.raises(ValueError, match=r"SparseAttentionForward: k .*200.*2.*16"):
        msa_cpp.sparse_attention_forward(
            case32.q, case32.k[:, :1], case32.v, np.zeros((2, 200, 3), np.int32), problem=P
        )


def test_offsets_are_checked(case32):
    batch = msa_cpp.Batch(
        cu_seqlens_q=np.array([0, 300, 200], np.int32), cu_seqlens_k=np.array([0, 300, 200], np.int32)
    )
    with pytest.raises(ValueError, match="cu_seqlens"):
        msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P, batch=batch)


def test_no_backend_takes_it(case):
    with pytest.raises(NotImplementedError, match="cpu: "):
        msa_cpp.dense_attention_forward(case.q, case.k, case.v, problem=P, backend="cpu")
    with pytest.raises(NotImplementedError, match="named 'nonsense'"):
        msa_cpp.dense_attention_forward(case.q, case.k, case.v, problem=P, backend="nonsense")


def test_stream_of_no_kind(case32):
    with pytest.raises(TypeError, match="stream is a str"):
        msa_cpp.dense_attention_forward(case32.q, case32.k, case32.v, problem=P, stream="default")


class TestJax:
    @pytest.fixture
    def jax(self):
        jax = pytest.importorskip("jax")
        with jax.default_device(jax.devices("cpu")[0]):
            yield jax

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_in_and_out(self, jax, case32, dtype):
        numpy_dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
        arrays = [x.astype(numpy_dtype) for x in (case32.q, case32.k, case32.v)]
        out, lse = msa_cpp.dense_attention_forward(*map(jax.numpy.asarray, arrays), problem=P)
        assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
        assert out.dtype == numpy_dtype and lse.dtype == np.float32
        expected, expected_lse = msa_cpp.dense_attention_forward(*arrays, problem=P)
        np.testing.assert_array_equal(np.asarray(out), expected)
        np.testing.assert_array_equal(np.asarray(lse), expected_lse)

    def test_is_not_copied(self, jax):
        array = jax.numpy.arange(12.0).reshape(3, 4)
        assert pointer(array) == array.unsafe_buffer_pointer()
        place = _arrays.Place([array])
        for dtype in ("f32", "bf16", "i32"):
            memory = place.empty((3, 4), dtype)
            address = memory.ctypes.data
            result = place.finish(memory)
            assert result.unsafe_buffer_pointer() == address
            del memory
            assert np.asarray(result).shape == (3, 4)

    def test_unfinished_work_is_awaited(self, jax, case32):
        squared = jax.jit(lambda x: x * x)
        q = squared(jax.numpy.asarray(case32.q))
        out, _ = msa_cpp.dense_attention_forward(
            q, jax.numpy.asarray(case32.k), jax.numpy.asarray(case32.v), problem=P
        )
        expected, _ = msa_cpp.dense_attention_forward(
            np.square(case32.q), case32.k, case32.v, problem=P
        )
        np.testing.assert_array_equal(np.asarray(out), expected)

    def test_outputs_stay_immutable(self, jax, case32):
        with pytest.raises(TypeError, match="immutable"):
            msa_cpp.dense_attention_forward(
                case32.q, case32.k, case32.v, problem=P, out=jax.numpy.zeros(case32.q.shape)
            )

    def test_selection_and_numpy_mix(self, jax, case32):
        ids = msa_cpp.indexer(jax.numpy.asarray(case32.index_q), case32.index_k, problem=P)
        assert isinstance(ids, jax.Array)
        np.testing.assert_array_equal(
            np.asarray(ids), msa_cpp.indexer(case32.index_q, case32.index_k, problem=P)
        )
