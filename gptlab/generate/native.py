"""Generation on a CPU in C of our own, compiled at first use: products with few rows (product.c), since torch's read a matrix at half the
memory's speed, and whole steps made of them (step.c, which step.py calls).

Where there is no compiler, or none that does, a NativeWarning says so once, and all is torch's.
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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("product.c", "step.c"))
HEADER = Path(__file__).with_name("product.h")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC")
PARTS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # numbers in a word of 32 bits: how product.h tells what a matrix is of


class NativeWarning(UserWarning):
    """The C could not be had."""


class Matrix(ctypes.Structure):
    """product.h's `linear`. Whoever makes one keeps its tensors."""

    _fields_ = (
        ("matrix", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_long),
        ("k", ctypes.c_long),
        ("parts", ctypes.c_long),
    )

    @classmethod
    def of(cls, matrix: Shaped[Tensor, "o d"], scale: Float[Tensor, " o"] | None, bias: Float[Tensor, " o"] | None) -> Matrix:
        """Of fp32, bf16, or 8-bit numbers with the fp32 `scale` of their rows; `bias` in fp32 for fp32, else in bf16."""
        assert matrix.is_contiguous()
        assert (scale is not None) == (matrix.dtype == torch.int8)
        assert scale is None or (scale.dtype == torch.float32 and scale.is_contiguous())
        assert bias is None or bias.dtype == (torch.float32 if matrix.dtype == torch.float32 else torch.bfloat16)
        return cls(matrix.data_ptr(), _pointer(scale), _pointer(bias), *matrix.shape, PARTS[matrix.dtype])


@functools.cache
def available() -> bool:
    """Whether there is a `Product` and a `Step`. The first call may compile for some seconds."""
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        why = (error.stderr.strip().splitlines() or [""])[0] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"generation takes torch's products, which are slower for few rows: {SOURCES[0].name} could not be built: {why}; "
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
        self._matrix, self._scale = matrix, scale
        self._outputs, self._inputs = matrix.shape

    def __call__(self, x: Float[Tensor, "... d"], bias: Float[Tensor, " o"] | None = None) -> Float[Tensor, "... o"]:
        assert x.dtype == torch.bfloat16
        x = x.contiguous()
        product = torch.empty((*x.shape[:-1], self._outputs), dtype=torch.bfloat16)
        by = Matrix.of(self._matrix, self._scale, bias)
        if library().multiply(ctypes.byref(by), x.data_ptr(), product.data_ptr(), x.numel() // self._inputs, threads()):
            raise MemoryError(f"no memory for a product with {tuple(x.shape)} numbers")
        return product


def threads() -> int:
    """How many work on a call: torch's. In a forked process one, since those that OpenMP counts on stayed behind, and it would wait for
    them for ever; so does torch, unless it is set to one."""
    return 1 if _forked else torch.get_num_threads()


def _fork() -> None:
    global _forked
    _forked = True


_forked = False
if hasattr(os, "register_at_fork"):  # where there are forks
    os.register_at_fork(after_in_child=_fork)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled sources, kept in $GPTLAB_HOME by all they depend on. Raises OSError or CalledProcessError where they cannot be made."""
    given = shlex.split(os.environ.get("CC", "")) or [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    command = [*given, *FLAGS]
    parts = [*(source.read_bytes() for source in (*SOURCES, HEADER)), " ".join(command).encode(), _cpu().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    made = home() / "native" / f"generate-{key}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            objects, whole = [str(Path(folder) / f"{source.stem}.o") for source in SOURCES], Path(folder) / "generate.so"
            for source, part in zip(SOURCES, objects, strict=True):
                subprocess.run([*command, "-c", str(source), "-o", part], capture_output=True, text=True, check=True)
            # Linked without -fopenmp: its threads are then those of the OpenMP that torch has loaded. Two sets would fight for the cores.
            subprocess.run([*given, "-shared", *objects, "-o", str(whole), "-lm"], capture_output=True, text=True, check=True)
            whole.replace(made)
    found = ctypes.CDLL(str(made))
    found.multiply.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_int]
    found.step.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_long, *[ctypes.c_void_p] * 2, *[ctypes.c_long] * 2]
    found.step_work.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 3]
    found.step.restype, found.step_work.restype = None, ctypes.c_long
    return found


def _cpu() -> str:
    """What `-march=native` depends on, where it can be read: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
