"""Sharded checkpoints: a safetensors file a rank, in the format of torch's distributed checkpoints, read back by any number of ranks.

No pickle: which part of a tensor a file holds stands in its header, where torch's HuggingFaceStorageReader looks for it. Torch's own writer
would keep the training thread waiting while it serialises (measured: 830 ms for 256 MB; safetensors' writer: 7 ms).
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptlab.config.errors import CheckpointError
from gptlab.config.shards import in_shards
from gptlab.hardware.world import World

_INFO, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_SIZE = "whole_size"  # beside torch's own entry, so that a part that is missing at the end is noticed


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor begins in the whole, and how large that is."""

    offsets: list[int]
    size: list[int]


@dataclass(frozen=True)
class Shard:
    """Who writes which part of a checkpoint: this rank, and the place of its part of each sharded tensor."""

    world: World
    places: dict[str, Place]


def offsets_of(tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Where this rank's part of each sharded tensor begins, and how large the whole is."""
    found = {n: (t.__create_chunk_list__(), t.shape) for n, t in tensors.items() if in_shards(t)}  # type: ignore[no-untyped-call]
    return {n: Place(list(chunks[0].offsets), list(size)) for n, (chunks, size) in found.items()}


def copied(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    """A copy of a tensor, or of this rank's part of it, in CPU memory: in `buffer` where there is one."""
    source = tensor.detach()
    if in_shards(source):
        source = source.to_local()
    if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
        buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return buffer.copy_(source, non_blocking=source.is_cuda)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the ranks' shards; every rank calls it."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def write(folder: Path, tensors: Mapping[str, Tensor], shard: Shard) -> Path | None:
    """Write this rank's file, if it holds anything. Tensors that are not sharded are rank 0's to write."""
    mine = {n: t for n, t in tensors.items() if (t.numel() if n in shard.places else shard.world.first)}
    if not mine:
        return None
    places = {n: shard.places.get(n, Place([0] * t.dim(), list(t.shape))) for n, t in mine.items()}
    info = {n: {_OFFSETS: place.offsets, _SIZE: place.size} for n, place in places.items()}
    file = folder / f"shard-{shard.world.rank + 1:05d}-of-{shard.world.size:05d}.safetensors"
    save_file(mine, file, metadata={"format": "pt", "DCP_VERSION": "1.0", _INFO: json.dumps(info)})
    return file


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's tensors lie in shards."""
    return not (folder / "model.safetensors").exists()


def load_into(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Fill tensors, sharded over any number of ranks or whole, from a checkpoint's shards or whole files. Raises CheckpointError."""
    from torch.distributed.checkpoint.api import CheckpointException  # a second of imports, which a checkpoint in one file can do without
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    found = shapes(folder)  # torch's reader casts a wrong type, and passes over a hole, without a word
    for name, tensor in tensors.items():
        if name not in found:
            raise CheckpointError(f"{folder} does not fit this run: it has no {name}")
        if found[name] != (tensor.shape, tensor.dtype):
            there, here = (f"{tuple(s)} {d}" for s, d in (found[name], (tensor.shape, tensor.dtype)))
            raise CheckpointError(f"{folder} does not fit this run: {name} is {there}, and {here} here")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group, no_dist=group is None)
    except CheckpointException as error:  # a BaseException
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder} could not be read ({' '.join(str(reason).split())[:300]})") from error


def shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and type of each whole tensor of a checkpoint. Raises CheckpointError where its parts do not make it up."""
    return {name: (_size(folder, name, parts), parts[0][1].dtype) for name, parts in _parts(folder).items()}


def load_whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together in CPU memory. Raises CheckpointError where its parts do not make it up."""
    found: dict[str, Tensor] = {}
    for name, parts in _parts(folder).items():
        made = torch.empty(_size(folder, name, parts), dtype=parts[0][1].dtype)
        for place, tensor in parts:
            made[tuple(slice(o, o + n) for o, n in zip(place.offsets, tensor.shape, strict=True))] = tensor
        found[name] = made
    return found


def _parts(folder: Path) -> dict[str, list[tuple[Place, Tensor]]]:
    """Of each tensor the parts that the files hold (mapped, not read), with their places in the whole."""
    found: dict[str, list[tuple[Place, Tensor]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                info = json.loads((opened.metadata() or {}).get(_INFO, "{}"))
                for name in opened.keys():  # noqa: SIM118, it is no dictionary
                    tensor = opened.get_tensor(name)
                    told = info.get(name, {_OFFSETS: [0] * tensor.dim(), _SIZE: list(tensor.shape)})
                    found.setdefault(name, []).append((Place(told[_OFFSETS], told[_SIZE]), tensor))
        except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    return found


def _size(folder: Path, name: str, parts: list[tuple[Place, Tensor]]) -> torch.Size:
    """The size of a whole tensor: its parts must lie in it, side by side, and leave no hole."""
    size = parts[0][0].size
    try:
        inside = all(
            place.size == size and all(0 <= o <= o + n <= s for o, n, s in zip(place.offsets, tensor.shape, size, strict=True))
            for place, tensor in parts
        )
    except (TypeError, ValueError):  # what stands there is no place
        inside = False
    if not inside or sum(t.numel() for _, t in parts) != math.prod(size) or any(_overlap(*two) for two in itertools.combinations(parts, 2)):
        raise CheckpointError(f"{folder}: its shards of {name} do not make up the whole")
    if len({tensor.dtype for _, tensor in parts}) > 1:
        raise CheckpointError(f"{folder}: its shards of {name} are of several types")
    return torch.Size(size)


def _overlap(one: tuple[Place, Tensor], two: tuple[Place, Tensor]) -> bool:
    """Whether two parts of a tensor share an element."""
    (a, first), (b, second) = one, two
    sides = zip(a.offsets, first.shape, b.offsets, second.shape, strict=True)
    return all(o < p + m and p < o + n for o, n, p, m in sides)
