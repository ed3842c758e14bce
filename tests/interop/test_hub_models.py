"""Models from the hub and for it, through the real client against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from gptlab import compose, load, train
from gptlab.cli.exchange import export_model
from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.resolve import resolve
from gptlab.hardware.device import machine
from gptlab.interop.hub import push
from gptlab.interop.importing import Imported, import_run
from tests.data.conftest import hub as hub  # the fixture
from tests.interop.conftest import gpt2, logits, transformers
from tests.stand_ins.hub_server import COMMIT, Server
from tests.tiny import tiny


@pytest.fixture
def empty_home(tmp_path: Path) -> Path:
    return tmp_path


def bring(name: str, tokenizer: str, **more: str) -> Imported:
    return import_run(name, resolve(compose([]), machine()), tokenizer=tokenizer, **more)  # type: ignore[arg-type]


def test_a_models_name_is_fetched_once_without_its_code(hub: Server, saved: Callable[..., Path], letters: str) -> None:
    theirs = gpt2()
    folder = saved(theirs)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.publish("models/openai-community/gpt2", folder)
    made = bring("gpt2", letters)
    assert (made.run.name, (made.run.read("imported.json") or {})["commit"]) == ("gpt2", COMMIT)
    x = torch.arange(13)[None]
    torch.testing.assert_close(logits(load(made.run).model, x), logits(theirs, x)[..., :28], rtol=0, atol=5e-5)
    asked = [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path]
    assert sorted(Path(p).name for p in asked) == ["config.json", "generation_config.json", "model.safetensors"]
    assert bring("openai-community/gpt2", letters).run.identity == made.run.identity
    assert [r.path for r in hub.requests if r.method == "GET" and "/resolve/" in r.path] == asked, "what is here is not fetched again"


def test_what_the_hub_refuses_is_told(hub: Server, saved: Callable[..., Path], letters: str) -> None:
    folder = saved(gpt2())
    hub.publish("models/owner/gated", folder, members=frozenset({"hf_member"}))
    for name, more, kind, said in (
        ("owner/nothing", {}, ConfigError, r"owner/nothing: the hub has no such model, .*nor is it a folder here"),
        ("owner/gated", {"revision": "v9"}, ConfigError, r"owner/gated@v9: the hub has no such revision"),
        ("owner/gated", {}, ConfigError, r"owner/gated is gated: ask for access on its page"),
    ):
        with pytest.raises(kind, match=said):
            bring(name, letters, **more)
    hub.switch_off()
    with pytest.raises(IOFailure, match=r"owner/gated: the hub could not be reached .*HF_HUB_OFFLINE=1"):
        bring("owner/gated", letters)


def test_what_is_pushed_opens_from_the_hub(
    hub: Server, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the hub here knows LFS alone
    hub.writers["hf_me"] = "me"
    run = train(compose(tiny(corpus_file, "model=gpt2", "model.depth=1"))).run
    with pytest.raises(ConfigError, match=r"--push me/small: the hub does not let this account write there"):
        export_model(str(run.directory), to="hf", output=tmp_path / "out", push="me/small")
    assert (tmp_path / "out" / "config.json").exists(), "the folder is here all the same"
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with pytest.raises(ConfigError, match=r"--push you/small: the hub does not let this account write there"):
        push(tmp_path / "out", "you/small", private=True)
    with pytest.raises(ConfigError, match=r"--push small is no name on the hub: OWNER/MODEL"):
        push(tmp_path / "out", "small", private=True)
    with pytest.raises(ConfigError, match=r"--push sends a folder of --to hf, not of --to gguf"):
        export_model(str(run.directory), to="gguf", push="me/small")
    for _ in range(2):  # a second time it is there already
        export_model(str(run.directory), to="hf", output=tmp_path / "out", push="me/small", force=True)
        assert f"sent to {hub.url}/me/small" in capsys.readouterr().out
    there = hub.repositories["models/me/small"].commits[COMMIT]
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert hub.large, "the weights went by LFS"
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(huggingface_hub.snapshot_download("me/small"))
    ours, x = load(run), torch.arange(16)[None]
    torch.testing.assert_close(logits(theirs, x), logits(ours.model, x), rtol=0, atol=5e-6)
    again = bring("me/small", "")
    assert load(again.run).tokenizer.decode(load(again.run).tokenizer.encode("the king").tolist()) == "the king"
    assert json.loads((there / "config.json").read_text())["model_type"] == "gpt2"
