"""Where the numbers live: NumPy on the CPU or CuPy on the GPU. The only file that names CuPy or knows a BLAS.

Everywhere else `xp` stands for the array module, so that a formula is written once. `use("cuda")` switches it
before any array is made. Arrays enter the device through `to_device` and leave it through `to_host`, nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ml_dtypes
import numpy as np
from threadpoolctl import ThreadpoolController

__all__ = [
    "Array",
    "HostArray",
    "cores",
    "fill",
    "floats",
    "from_host",
    "limit_cores",
    "matmul_transposed",
    "memory_bytes",
    "narrow",
    "on_cpu",
    "one_core_for_products",
    "peak_memory_bytes",
    "random_generator",
    "read_only",
    "slices_of_rows",
    "supports",
    "to_device",
    "to_host",
    "use",
    "use_module",
    "widen",
    "xp",
]

HostArray: TypeAlias = "np.ndarray[Any, Any]"  # always NumPy's
Array: TypeAlias = "np.ndarray[Any, Any]"  # on the GPU: cupy.ndarray, which has the same interface

_module: Any = np

# --- The array module ---


class _ArrayModule:
    """Forwards every name to the array module in use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_module, name)


if TYPE_CHECKING:
    import numpy as xp
else:
    xp = _ArrayModule()


def use(device: str, number: int = 0) -> str:
    """Choose `cpu`, `cuda` or `auto` (a GPU if one answers), and return the choice made.

    Of several GPUs it takes the one of that number, counted on from the first again after the last.
    Raises RuntimeError, with what to install, if `cuda` is asked for and CuPy or a GPU is missing.
    """
    global _module
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is unknown: choose auto, cpu or cuda")
    _module = np
    if device == "cpu":
        return "cpu"
    try:
        import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]

        cupy.cuda.Device(number % cupy.cuda.runtime.getDeviceCount()).use()
        cupy.zeros(1)
    except Exception as error:  # CuPy is missing, or it finds no driver or GPU: each raises something else
        if device == "cuda":
            raise RuntimeError(
                f"no usable GPU ({error}): install CuPy for your CUDA with `pip install 'minilora[cuda12]'` or "
                "`'minilora[cuda13]'`, or choose --device cpu"
            ) from error
        return "cpu"
    _module = cupy
    return "cuda"


def use_module(module: Any) -> Any:
    """Put any module with NumPy's interface behind `xp` and return the one it replaces (for tests)."""
    global _module
    previous, _module = _module, module
    return previous


def on_cpu() -> bool:
    """Whether arrays are NumPy's, or stand for them (`counting`)."""
    return bool(getattr(_module, "on_cpu", _module is np))


# --- Arrays that go to the device and come from it ---


def from_host(make: Callable[[], np.ndarray[Any, Any]], shape: tuple[int, ...], dtype: Any) -> Array:
    """The host array that `make` returns, on the device. A module whose arrays have no numbers (`counting`) has
    `outline`, and only needs to know shape and dtype."""
    if hasattr(_module, "outline"):
        return cast(Array, _module.outline(shape, dtype))
    return to_device(make())


def to_device(array: np.ndarray[Any, Any]) -> Array:
    """A host array as an array of the device in use (no copy on the CPU)."""
    return xp.asarray(array)


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """An array of the device as a NumPy array (no copy on the CPU)."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def floats(scalars: Sequence[Array]) -> list[float]:
    """The values of arrays without dimensions. The device is waited for once, not for each of them."""
    return [float(x) for x in scalars] if on_cpu() else list(xp.stack(scalars).tolist())


def fill(target: Array, values: HostArray) -> None:
    """Write host values into an array, which may itself be one of the host."""
    target[...] = values if isinstance(target, np.ndarray) else to_device(values)


def read_only(array: Array) -> Array:
    """Mark an array as frozen. NumPy then refuses every write to it; CuPy has no such mark."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = False
    return array


def random_generator(*seeds: int) -> Any:
    """The device's random generator for these seeds: the same seeds give the same draws on the same device.

    CuPy's default generator would start hundreds of thousands of states anew, each a long computation. Philox's start
    at once (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").
    """
    seed = np.random.SeedSequence(seeds).generate_state(1, np.uint64).item()
    if hasattr(xp.random, "Philox4x3210"):
        return xp.random.Generator(xp.random.Philox4x3210(seed))
    return xp.random.default_rng(seed)


# --- Numbers of 16 bits ---


def supports(dtype: Any) -> bool:
    """Whether the array module can convert to this dtype and multiply in it: CuPy to bfloat16 from version 14."""
    try:
        ones = xp.ones((2, 2), np.float32).astype(dtype)
        return bool((ones @ ones).shape == ones.shape)
    except Exception:  # each version refuses in its own way
        return False


def narrow(array: Array) -> Array:
    """A bfloat16 array as its bits in uint16, the form that both NumPy and CuPy can hold and shift; others as is."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def widen(array: Array, dtype: Any) -> Array:
    """A stored array in the dtype of the computation. A uint16 array holds bfloat16 bits.

    bfloat16 is the upper half of a float32, so widening is a shift by 16 bits, and exact.
    """
    if array.dtype == np.uint16 and on_cpu():
        array = array.view(ml_dtypes.bfloat16).astype(np.float32)  # the same in one pass
    elif array.dtype == np.uint16:
        bits = array.astype(np.uint32)
        bits <<= 16
        array = bits.view(np.float32)
    return array.astype(dtype, copy=False)


# --- Matrix products ---

FEW_ROWS, VERY_FEW_ROWS = 32, 8  # rows of x
PIECE = 64  # rows of W that are multiplied at a time
# Numbers of a W that are widened at a time: as many as the cache of one core holds. A GPU wants large products.
SLICE, SLICE_ON_GPU = 2**18, 2**26


def matmul_transposed(x: Array, W: Array) -> Array:
    """x Wᵀ: x (N, in), W (out, in) → (N, out). (docs: O1)

    When x has few rows, as in generation, OpenBLAS is faster with W as the left factor. The result is still put in
    the usual order in memory, because the next product rounds according to that order. With very few rows W is
    multiplied in pieces: OpenBLAS takes such small products as they are, and does not lay W out for itself first.
    """
    if not (on_cpu() and 1 < len(x) <= FEW_ROWS):
        return x @ W.T
    out_features, in_features = W.shape
    if len(x) <= VERY_FEW_ROWS and out_features % PIECE == 0:
        W = W.reshape(-1, PIECE, in_features)
    return xp.ascontiguousarray((W @ x.T).reshape(out_features, len(x)).T)


def slices_of_rows(shape: tuple[int, int]) -> list[slice]:
    """The rows of a matrix in slices that are small enough to be widened and multiplied one after the other.

    A slice is a whole number of the pieces that `matmul_transposed` makes, if it holds at least one.
    """
    rows, columns = shape
    size = max(1, (SLICE if on_cpu() else SLICE_ON_GPU) // columns)
    size = size // PIECE * PIECE or size
    return [slice(start, start + size) for start in range(0, rows, size)]


@functools.cache
def _blas() -> ThreadpoolController:
    """NumPy's library of matrix products, and those of other packages that were imported before the first call."""
    return ThreadpoolController().select(user_api="blas")


def cores() -> int:
    """The number of cores that a matrix product may use: what OPENBLAS_NUM_THREADS and its like say, else all of them.

    It is 1 on a GPU, and where the library cannot be limited to fewer cores (Apple's Accelerate).
    """
    if not on_cpu():
        return 1
    return max((int(library["num_threads"]) for library in _blas().info()), default=1)


def limit_cores(number: int) -> None:
    """From now on products use at most so many cores."""
    _blas().limit(limits=min(number, cores()))


def one_core_for_products() -> AbstractContextManager[object]:
    """From now on each matrix product uses one core; as a context manager, until the context is left.

    Libraries built on OpenMP count their cores for each thread separately, so each new thread has to call this too.
    """
    limited: AbstractContextManager[object] = _blas().limit(limits=1)
    return limited


# --- Memory ---


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU if one is in use, else of the machine."""
    if _module is not np and hasattr(_module, "get_default_memory_pool"):
        return int(_module.get_default_memory_pool().total_bytes())
    if platform.system() == "Windows":
        return 0
    if platform.system() == "Linux":  # its account in `resource` begins with the peak of the parent
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # kibibytes
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, others kibibytes


def memory_bytes() -> int:
    """The memory of this machine, or of the container this process is in; 0 where it cannot be told."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    given = limit.read_text().strip() if limit.is_file() else "max"
    return machine if given == "max" else min(machine, int(given))


def _keep_large_temporaries() -> None:
    """Tell glibc to reuse large freed arrays instead of returning them to the system.

    Every forward makes and drops temporaries of many megabytes. By default each is mapped afresh, so the system
    zeroes its pages again and again: about a fifth of a training step on the CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
        libc.mallopt(m_arena_max, 1)  # else each thread would keep freed arrays of its own


_keep_large_temporaries()
