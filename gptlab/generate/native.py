"""Products with few rows on a CPU in C of our own (product.c), compiled at first use: torch's read a matrix at half the memory's speed.

Where there is no compiler, or none that does, a NativeWarning says so once, and the products are torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gptlab.data.corpus import home

SOURCE = Path(__file__).with_name("product.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC")


class NativeWarning(UserWarning):
    """The products in C could not be had."""


@functools.cache
def available() -> bool:
    """Whether there is a `Product`. The first call may compile for a second."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        why = (error.stderr.strip().splitlines() or [""])[0] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"generation takes torch's products, which are slower for few rows: {SOURCE.name} could not be built: {why}; "
            "a C compiler (gcc, or another by CC=…) makes them fast",
            NativeWarning,
            stacklevel=2,
        )
        return False
    return True


class Product:
    """x · matrixᵀ + bias in bf16, summed in fp32: of a bf16 matrix, or of one of 8-bit numbers and the fp32 `scale` of its rows.

    Only where `available`.
    """

    def __init__(self, matrix: Shaped[Tensor, "o d"], scale: Float[Tensor, " o"] | None = None) -> None:
        assert matrix.dtype == (torch.bfloat16 if scale is None else torch.int8)
        assert matrix.is_contiguous()
        assert scale is None or (scale.dtype == torch.float32 and scale.is_contiguous())
        self._matrix, self._scale = matrix, scale
        self._outputs, self._inputs = matrix.shape

    def __call__(self, x: Float[Tensor, "... d"], bias: Float[Tensor, " o"] | None = None) -> Float[Tensor, "... o"]:
        assert x.dtype == torch.bfloat16
        assert bias is None or bias.dtype == torch.bfloat16
        x = x.contiguous()
        product = torch.empty((*x.shape[:-1], self._outputs), dtype=torch.bfloat16)
        failed = _library().multiply(
            self._matrix.data_ptr(),
            None if self._scale is None else self._scale.data_ptr(),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            product.data_ptr(),
            x.numel() // self._inputs,
            self._outputs,
            self._inputs,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for a product with {tuple(x.shape)} numbers")
        return product


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled source, kept in $GPTLAB_HOME by all that it depends on. Raises OSError or CalledProcessError where it cannot be made."""
    given = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    command = [*given, *FLAGS]
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), " ".join(command).encode(), _cpu().encode()))).hexdigest()[:16]
    made = home() / "native" / f"product-{key}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            part, whole = Path(folder) / "product.o", Path(folder) / "product.so"
            # Linked without -fopenmp: its threads are then those of the OpenMP that torch has loaded. Two sets would fight for the cores.
            for step in ([*command, "-c", str(SOURCE), "-o", str(part)], [*given, "-shared", str(part), "-o", str(whole)]):
                subprocess.run(step, capture_output=True, text=True, check=True)
            whole.replace(made)
    library = ctypes.CDLL(str(made))
    library.multiply.argtypes = [*[ctypes.c_void_p] * 5, *[ctypes.c_long] * 3, ctypes.c_int]
    library.multiply.restype = ctypes.c_int
    return library


def _cpu() -> str:
    """What `-march=native` depends on, where it can be read: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
