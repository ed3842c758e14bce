"""Sharded checkpoints: whole again for whoever reads them, and refused when a part is missing or not what was written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import load as torch_load
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from gptlab import compose, load, train
from gptlab.config.errors import CheckpointError
from gptlab.hardware.world import World
from gptlab.runner import checkpoint, sharded
from gptlab.runner.run import Run
from tests.ranks import Job, trained
from tests.tiny import tiny

WHOLE = {  # 7 rows over 3 ranks: 3, 3, 1; 2 rows: 1, 1, 0; 1 row: 1, 0, 0
    "matrix": torch.arange(7 * 5, dtype=torch.float32).reshape(7, 5),
    "two": torch.arange(8, dtype=torch.float32).reshape(2, 2, 2).to(torch.bfloat16),
    "one": torch.tensor([3.5]),
}
STEP = torch.tensor(12.0)  # not sharded: rank 0's to write


def part(tensor: Tensor, rank: int, ranks: int) -> tuple[Tensor, sharded.Place]:
    """What FSDP2 gives a rank of a tensor, and where it begins."""
    size = -(-len(tensor) // ranks)
    begin = min(rank * size, len(tensor))
    return tensor[begin : begin + size].contiguous(), sharded.Place([begin, *[0] * (tensor.dim() - 1)], list(tensor.shape))


def write(folder: Path, ranks: int, whole: dict[str, Tensor] = WHOLE) -> list[Path]:
    folder.mkdir()
    files = []
    for rank in range(ranks):
        parts = {name: part(tensor, rank, ranks) for name, tensor in whole.items()}
        shard = sharded.Shard(World(rank, ranks), {name: place for name, (_, place) in parts.items()})
        files.append(sharded.write(folder, {"step": STEP, **{name: mine for name, (mine, _) in parts.items()}}, shard))
    return [f for f in files if f is not None]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_what_any_number_of_ranks_writes_is_whole_again(tmp_path: Path, ranks: int) -> None:
    files = write(tmp_path / "made", ranks)
    assert len(files) == {1: 1, 2: 2, 3: 3, 4: 4, 8: 7}[ranks], "a rank without rows writes no file"
    for found in (sharded.load_whole(tmp_path / "made"), _loaded_into(tmp_path / "made"), _torchs_own(tmp_path / "made")):
        assert found.keys() == {"step", *WHOLE}
        assert found["step"] == STEP
        for name, tensor in WHOLE.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def _empty() -> dict[str, Tensor]:
    return {"step": torch.zeros(()), **{name: torch.full_like(tensor, -1) for name, tensor in WHOLE.items()}}


def _loaded_into(folder: Path) -> dict[str, Tensor]:
    targets = _empty()
    sharded.load_into(folder, targets, None)
    return targets


def _torchs_own(folder: Path) -> dict[str, Tensor]:
    """Read by torch's reader alone: the files are in its own format."""
    targets = _empty()
    torch_load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return targets


READERS: list[Callable[[Path], Any]] = [sharded.load_whole, sharded.shapes, _loaded_into]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_is_never_a_tensor_with_a_hole(tmp_path: Path, read: Callable[[Path], Any], missing: int) -> None:
    write(tmp_path / "made", 3)[missing].unlink()
    with pytest.raises(CheckpointError, match=r"its shards of (matrix|two) do not make up the whole|it has no (one|step)"):
        read(tmp_path / "made")


@pytest.mark.parametrize("read", READERS)
def test_shards_that_overlap_over_a_hole_are_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    files = write(tmp_path / "made", 3)  # counting elements alone would be satisfied by rank 0's rows twice in place of rank 1's
    _with_offsets(files[1], "matrix", [0, 0])
    with pytest.raises(CheckpointError, match="its shards of matrix do not make up the whole"):
        read(tmp_path / "made")


@pytest.mark.parametrize("offsets", [[-3, 0], [3], [3, "0"], "x", [3, 1]], ids=str)
def test_offsets_that_make_no_sense_are_refused(tmp_path: Path, offsets: Any) -> None:
    files = write(tmp_path / "made", 3)
    _with_offsets(files[1], "matrix", offsets)
    for read in READERS:
        with pytest.raises(CheckpointError):
            read(tmp_path / "made")


def _with_offsets(file: Path, name: str, offsets: Any) -> None:
    tensors = {k: v.clone() for k, v in load_file(file).items()}
    with sharded.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    info = json.loads(metadata["DCP_SHARDING_INFO"])
    info[name]["saved_offsets"] = offsets
    save_file(tensors, file, metadata={**metadata, "DCP_SHARDING_INFO": json.dumps(info)})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"matrix": torch.zeros(7, 4)}, r"matrix is \(7, 5\) torch.float32, and \(7, 4\) torch.float32 here"),
        ({"matrix": torch.zeros(7, 5, dtype=torch.bfloat16)}, r"matrix is \(7, 5\) torch.float32, and \(7, 5\) torch.bfloat16 here"),
        ({"another": torch.zeros(3)}, "it has no another"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, wrong: dict[str, Tensor], words: str) -> None:
    write(tmp_path / "made", 2)
    with pytest.raises(CheckpointError, match=words):
        sharded.load_into(tmp_path / "made", {**_empty(), **wrong}, None)


# A small rate: Adam's first updates turn the rounding of tiny gradients into whole steps, whose size a tolerance must not exceed.
NUMBERS = "hardware.precision=fp32", "optimizer.learning_rate=1e-4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, home_folder: Path) -> dict[str, Path]:
    """A run by each strategy on two ranks."""
    root = tmp_path_factory.mktemp("sharded")
    variables = {"GPTLAB_HOME": str(home_folder), "HF_HUB_OFFLINE": "1"}
    settings = ["callbacks.checkpoint.every=4", "callbacks.checkpoint.keep=3", "callbacks.checkpoint.best=false", *NUMBERS]
    jobs = [Job(root / kind, tiny(corpus_file, *settings, f"hardware/strategy={kind}")) for kind in ("ddp", "fsdp")]
    for outcomes in trained(root, jobs, environment=variables):
        assert [o["state"] for o in outcomes] == ["done", "done"]
    return {job.runs.name: job.directory for job in jobs}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Run:
    """A copy of the run of fsdp, to be damaged."""
    return Run(Path(shutil.copytree(runs["fsdp"], tmp_path / "runs" / "default" / runs["fsdp"].name)))


def test_a_sharded_run_loads_as_the_whole_model_that_ddp_made(runs: dict[str, Path]) -> None:
    whole, parts = load(str(runs["ddp"])), load(str(runs["fsdp"]))
    newest = checkpoint.require_good(parts.run.checkpoints)
    assert sorted(f.name for f in newest.glob("*.safetensors")) == [f"shard-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert parts.sample("The", max_tokens=5, temperature=0) == whole.sample("The", max_tokens=5, temperature=0)
    ours, theirs = (checkpoint.load_tensors(checkpoint.require_good(r.run.checkpoints))[1] for r in (whole, parts))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-6)


def _shard(run: Run, number: int) -> Path:
    return checkpoint.checkpoints(run.checkpoints)[0] / f"shard-{number:05d}-of-00002.safetensors"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut to half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "cut to 99 %": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 99 // 100]),
    "a bit flipped": _flip,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("how", list(DAMAGE))
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_shard_is_passed_over(run: Run, number: int, how: str) -> None:
    newest, before, _ = checkpoint.checkpoints(run.checkpoints)
    DAMAGE[how](_shard(run, number))
    complaints: list[str] = []
    assert checkpoint.newest_good(run.checkpoints, complaints) == before
    assert _shard(run, number).name in complaints[0]
    assert load(run).config.study == "default"
    with pytest.raises(CheckpointError, match=_shard(run, number).name):
        load(run, checkpoint=str(newest))


def _forge(folder: Path) -> None:
    """A manifest that fits the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]  # its own, which those of an older gptlab do not have
    names = [f.name for f in folder.iterdir() if f.name != "manifest.json"]
    manifest["files"] = {
        n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "bytes": (folder / n).stat().st_size} for n in names
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [1, 2])
def test_a_deleted_shard_with_a_manifest_to_match_never_loads(run: Run, corpus_file: Path, number: int) -> None:
    newest = checkpoint.checkpoints(run.checkpoints)[0]
    _shard(run, number).unlink()
    _forge(newest)
    assert checkpoint.problem(newest) is None
    for action in (lambda: load(run), lambda: train(compose(tiny(corpus_file, *NUMBERS)))):
        (run.directory / "done.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"do not make up the whole|does not fit|could not be read"):
            action()


class _Planted:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


def test_a_planted_metadata_pickle_runs_no_code(run: Run, tmp_path: Path, corpus_file: Path) -> None:
    mark = tmp_path / "ran"
    newest = checkpoint.checkpoints(run.checkpoints)[0]
    for name in (".metadata", "model.pt", "shard-00003-of-00003.distcp"):
        (newest / name).write_bytes(pickle.dumps(_Planted(mark)))
    _forge(newest)
    load(run)
    _loaded_as_fsdp_does(newest)
    (run.directory / "done.json").unlink()
    assert train(compose(tiny(corpus_file, *NUMBERS))).state == "done"
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Planted(mark)))
    assert mark.exists(), "it would have told"


def _loaded_as_fsdp_does(folder: Path) -> None:
    targets = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in sharded.shapes(folder).items()}
    sharded.load_into(folder, targets, None)
    for name, tensor in sharded.load_whole(folder).items():
        assert torch.equal(targets[name], tensor)


@pytest.mark.slow
def test_three_ranks_that_share_unevenly_write_and_read_the_same_model(
    runs: dict[str, Path], corpus_file: Path, home_folder: Path, tmp_path: Path
) -> None:
    variables = {"GPTLAB_HOME": str(home_folder), "HF_HUB_OFFLINE": "1"}
    size = ["model.width=10", "model.heads=1", "trainer.batch_tokens=96", "hardware.precision=fp32", "callbacks.checkpoint.best=false"]
    stop = ["+callback@callbacks.fault=signal_at", "callbacks.fault.step=6"]
    whole, parts = Job(tmp_path / "whole", tiny(corpus_file, *size)), Job(tmp_path / "parts", tiny(corpus_file, *size))
    trained(tmp_path, [whole], ranks=0, environment=variables)
    for ranks, more, expected in ((3, stop, "Stopped"), (2, [], "done")):
        job = Job(parts.runs, [*parts.overrides, "hardware/strategy=fsdp", *more])
        ((*outcomes,),) = trained(tmp_path, [job], ranks=ranks, environment=variables)
        assert [o["state"] for o in outcomes] == [expected] * ranks
        newest = checkpoint.require_good(Run(job.directory).checkpoints)
        assert len(list(newest.glob("shard-*"))) == ranks
        _loaded_as_fsdp_does(newest)
    one, two = (load(str(job.directory)).model.state_dict() for job in (whole, parts))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
