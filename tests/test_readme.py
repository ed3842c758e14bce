"""The README is true: its plugin is the one that is run, its table of experiments is complete, and its commands work as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptlab.data.tokenizer import gpt2
from gptlab.interop.tokenizers import tokenizer_json
from tests.conftest import sentences
from tests.stand_ins.hub_server import hub_server, write_repository

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> dict[str, list[str]]:
    """By heading, every `gptlab …` and `torchrun …` line of the shell blocks below it, without its comment."""
    found: dict[str, list[str]] = {}
    heading = ""
    for title, block in re.findall(r"^#+ ([^\n]*)$|^```sh\n(.*?)```", README, re.DOTALL | re.MULTILINE):
        heading = title or heading
        lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
        found.setdefault(heading, []).extend(line for line in lines if line.startswith(("gptlab ", "torchrun ")))
    return {heading: lines for heading, lines in found.items() if lines}


def test_nothing_is_left_to_fill_in_and_every_link_leads_somewhere() -> None:
    for file in (ROOT / "README.md", ROOT / "experiments" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert "@@" not in text
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (file.parent / link).exists(), link


def test_every_experiment_stands_in_the_table() -> None:
    table = README.split("| experiment | question |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == {f.stem for f in (ROOT / "experiments").glob("*.yaml")}


def test_every_data_recipe_stands_in_its_table() -> None:
    table = README.split("| recipe | text |")[1].split("\n\n")[0]
    listed = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")}
    assert listed == {f.stem for f in (ROOT / "conf" / "data").glob("*.yaml")}


def test_every_experiment_begins_with_its_question() -> None:
    for file in (ROOT / "experiments").glob("*.yaml"):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# "), file.name
        assert "?" in first, file.name


def test_every_folder_of_the_package_stands_in_the_map() -> None:
    folders = [d.name for d in (ROOT / "gptlab").iterdir() if (d / "__init__.py").is_file()]
    table = README.split("## Where is what")[1]
    assert all(f"`gptlab/{name}/`" in table or f"`{name}/`" in table for name in folders)


FEW = {"data.validation_tokens": "2048", "callbacks.samples.tokens": "8"}  # the rest of a measurement and of a sample is more of the same


def shortened(command: str, sample: Path) -> list[str]:
    """A command on our sample, with a shorter run where it would take minutes."""
    words = shlex.split(command.replace("FILE", str(sample)))
    words = [word.replace("CHATS", str(sample.with_name("chats.jsonl"))) for word in words]
    if "experiment=chatbot" in words:
        words += ["trainer.budget=2steps", "model.width=24", "model.context_length=128", "trainer.batch_tokens=2048", "model.depth=1"]
    if words == ["gptlab", "train"] or ("data=fineweb_edu" in words and "train" in words):
        words.append("trainer.budget=20steps")
    if ("train" in words or "ablate" in words) and "bench" not in words and "--help" not in words:
        words += [f"{key}={value}" for key, value in FEW.items() if not any(w.startswith(f"{key}=") for w in words)]
    if "data=fineweb_edu" in words:
        words = [w.replace("100M", "600k") for w in words] + ["data.corpus.held_out=100k"]
    if words[:3] == ["gptlab", "bench", "train"]:
        words += ["--rounds", "1"]
    if "experiment=workshop_shakespeare" in words:
        words.append("trainer.batch_tokens=4096")
    if words[:3] == ["gptlab", "bench", "checkpoint"]:
        words += ["--rounds", "1"] + (["--model", "nano"] if "--model" not in words else [])
    if words[:3] == ["gptlab", "bench", "serve"]:
        words += ["--rounds", "1", "--requests", "10"]
    if words[:3] == ["gptlab", "bench", "data"]:
        words += ["--rounds", "1", "--megabytes", "4"]
    return words


def served_until_told(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and errors of a server that is told to end once it has printed its address."""
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next((line for line in process.stdout if line.startswith("http://")), None)
        process.terminate()
        return process.wait(60), process.communicate()[1]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with something like FineWeb-Edu."""
    with hub_server() as server:
        texts = [sentences(30, seed=i) for i in range(2500)]
        server.publish("HuggingFaceFW/fineweb-edu", write_repository(tmp_path / "repository", {"sample-10BT": {"train": texts}}))
        yield server.url


@pytest.fixture
def hub_of_models(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with a GPT-2 that is small, and knows nothing."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "openai"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(gpt2())), encoding="utf-8")
    with hub_server() as server:
        server.publish("models/openai-community/gpt2", folder)
        yield server.url


@pytest.fixture
def at_home(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A text of one's own in an empty folder that also has the page's plugin, and the environment of a user who stands there."""
    text = ROOT.parent / "shared" / "data" / "text" / "tinyshakespeare.txt"
    sample = tmp_path / "own.txt"
    sample.write_bytes(text.read_bytes() if text.is_file() else (README * 40).encode())
    chats = [{"prompt": f"What is {i} plus 1?", "completion": f"{i} plus 1 is {i + 1}."} for i in range(200)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    (tmp_path / "my_norms.py").write_text(re.search(r"<!-- plugin: my_norms.py -->\n```python\n(.*?)```", README, re.DOTALL)[1])  # type: ignore[index]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return sample, {**os.environ, "PATH": path, "GPTLAB_RUNS": str(tmp_path / "runs")}


def test_there_are_commands_under_the_headings() -> None:
    assert sum(map(len, commands().values())) > 50
    assert {"Train", "Data", "Ablate", "Sweep and compare"} < commands().keys()


@pytest.mark.slow
@pytest.mark.parametrize("heading", commands())
def test_every_command_works_as_it_stands(
    heading: str, tmp_path: Path, at_home: tuple[Path, dict[str, str]], request: pytest.FixtureRequest
) -> None:
    """Those of one heading after another in one folder; `latest` is what was trained there."""
    sample, environment = at_home
    asked = commands()[heading]
    if any(command == "gptlab import gpt2" for command in asked):
        if "TIKTOKEN_CACHE_DIR" not in environment:
            pytest.skip("GPT-2's vocabulary would have to be fetched")
        environment |= {"HF_ENDPOINT": request.getfixturevalue("hub_of_models"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    if any("fineweb" in command for command in asked):
        environment |= {"HF_ENDPOINT": request.getfixturevalue("hub"), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    has_gpt2 = "TIKTOKEN_CACHE_DIR" in environment  # else its vocabulary would have to be fetched
    ran: list[list[str]] = []
    for command in asked:
        if "--against" in command:
            continue  # needs a nanoGPT checkout
        if not has_gpt2 and any(word in command for word in ("fineweb", "gpt2", "bench data")):
            continue
        words = shortened(command, sample)
        if words in ran:
            continue  # shortened to what another was
        ran.append(words)
        if words[:2] == ["gptlab", "serve"]:
            assert served_until_told(words, tmp_path, environment) == (0, ""), command
            continue
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_python_of_the_page_runs(tmp_path: Path, at_home: tuple[Path, dict[str, str]]) -> None:
    python = [block for block in blocks("python") if "compose" in block]
    command = [sys.executable, "-c", python[0]]
    done = subprocess.run(command, cwd=tmp_path, env=at_home[1], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
