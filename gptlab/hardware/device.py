"""The machine: which devices it has, and what they can do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.config.resolve import Machine
from gptlab.config.schema import HardwareConfig
from gptlab.hardware.cards import known_card
from gptlab.hardware.world import World, launched

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
GIANT = 128 << 20  # bytes of a block that is given back all the same


def machine() -> Machine:
    """What this machine offers, best device first."""
    devices = []
    gpu_bf16 = gpu_fp8 = False
    if torch.cuda.is_available():
        devices.append("cuda")
        gpu_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        gpu_fp8 = torch.cuda.get_device_capability() >= (8, 9)
    if torch.backends.mps.is_available():
        devices.append("mps")
    ranks = (launched() or World()).size
    return Machine(devices=(*devices, "cpu"), cpu_bf16=cpu_multiplies_bf16(), gpu_bf16=gpu_bf16, gpu_fp8=gpu_fp8, ranks=ranks)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a known GPU, in FLOP/s; None for anything else."""
    if device.type != "cuda":
        return None
    card = known_card(torch.cuda.get_device_name(device))
    return card.peak_flops if card else None


def set_up(config: HardwareConfig) -> torch.device:
    """The device of a resolved config, with threads and determinism set for this process. Raises ConfigError if it is not there."""
    if config.threads < 0:
        raise ConfigError(f"hardware.threads={config.threads} must be at least 0 (0: as torch finds them)")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        world = launched() or World()
        if ":" not in config.device and world.size > 1:
            device = torch.device("cuda", world.local_rank)
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"hardware.device={config.device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    _deterministic(config.deterministic)
    return device


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """What `set_up`, or a component that failed, changes in here is as before afterwards: a sweep's next job finds a clean process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        torch.set_num_threads(threads)
        _deterministic(deterministic)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _deterministic(wanted: bool) -> None:
    if wanted != torch.are_deterministic_algorithms_enabled():  # asked for only then: the call imports torch's compiler
        torch.use_deterministic_algorithms(wanted)


def _keep_freed_memory() -> None:
    """Let glibc keep what it frees: it gives every large tensor back to the kernel and takes it again page by page, each step.

    Measured on 2 cores: a product of 25 M bf16 values takes 20 ms with fresh pages and 4 ms without. But giants, as all the logits of a
    large vocabulary, are kept out of the heap: they seldom fit where one of them was, and three steps of GPT-2's loss over 4,096 tokens
    grew to 6.5 GB that need 3.0, for a quarter less time. A chunk of 1,024 tokens' logits (206 MB) is one too: two layers of GPT-2 with
    block checkpointing took 4.1 GB with it in the heap and 2.8 without, in the same time. At 16 MB nanoGPT's character model would save a
    tenth of its memory for a quarter more time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from musl
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        if not mallopt(M_MMAP_THRESHOLD, GIANT):  # some versions allow no threshold above 32 MB
            mallopt(M_MMAP_MAX, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's, or this process's, memory is used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no class of its own for the CPU


def synchronise(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(device: torch.device) -> dict[str, Any]:
    """The hardware, for a run's environment.json."""
    found: dict[str, Any] = {"device": str(device), "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _cpu_name() -> str:
    """The processor's name; Linux tells it in a file, and platform does not look there."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Largest memory held so far, in bytes: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(size if sys.platform == "darwin" else size * 1024)


def resident_memory() -> int:
    """Bytes of this process that are in memory now; where the system does not say, the most there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(torch.device("cpu"))


def device_memory(device: torch.device) -> int:
    """Bytes that a run may come to have: of a GPU all it has; of the CPU what is free, and what this process holds. 0: not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    group = Path("/sys/fs/cgroup")
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # not there, or `max`
            free.append(int((group / limit).read_text()) - int((group / used).read_text()))
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)  # macOS does not say what is free
    return max(0, min(free)) + resident_memory() if free else 0
