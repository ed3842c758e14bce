"""A model from elsewhere is the same model here: its logits, its tokens, its run; and none of its code is run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptlab import compose, load
from gptlab.config.errors import CheckpointError, ConfigError, DataError
from gptlab.config.resolve import resolve
from gptlab.hardware.device import machine
from gptlab.interop.importing import Imported, import_run
from gptlab.runner.run import find_run
from tests.interop.conftest import LETTERS, gpt2, llama, logits, stirred, transformers

TOLERANCE = 5e-5


def bring(source: Path, tokenizer: str = "", **more: Any) -> Imported:
    return import_run(str(source), resolve(compose([]), machine()), tokenizer=tokenizer, **more)


def tokens(length: int) -> torch.Tensor:
    return torch.randint(28, (3, length), generator=torch.Generator().manual_seed(1))


STRETCH = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2, exact gelu, narrow ffn": lambda: gpt2(n_inner=31, activation_function="gelu", layer_norm_epsilon=1e-3),
    "gpt2, relu2, one head, untied": lambda: gpt2(activation_function="relu2", n_head=1, tie_word_embeddings=False),
    "llama": llama,
    "llama, one kv head, tied, far base": lambda: llama(num_key_value_heads=1, tie_word_embeddings=True, rope_theta=500.0),
    "llama, stretched": lambda: llama(max_position_embeddings=64, hidden_size=96, rope_scaling=STRETCH),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"),
    "llama, biases of attention alone": lambda: llama(attention_bias=True),
    "mistral, window": lambda: llama("Mistral", sliding_window=5),
    "qwen2": lambda: llama("Qwen2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, saved: Callable[..., Path], letters: str) -> None:
    theirs = MODELS[name]()
    made = bring(saved(theirs), letters)
    ours = load(made.run).model
    x = tokens(13)
    expected = logits(theirs, x)[..., :28]
    assert expected.std() > 0.3  # flat logits would agree with anything
    torch.testing.assert_close(logits(ours, x), expected, rtol=0, atol=TOLERANCE)
    assert made.parameters == sum(p.numel() for p in ours.parameters())


def test_an_imported_run_is_a_run(saved: Callable[..., Path], letters: str) -> None:
    folder = saved(gpt2())
    made = bring(folder, letters, name="mine")
    assert (made.run.state, made.run.study, made.run.name, made.known) == ("done", "imported", "mine", False)
    assert find_run("mine").identity == made.run.identity
    note = made.run.read("imported.json")
    assert note is not None
    assert (note["kind"], note["source"], note["parameters"]) == ("gpt2", str(folder), made.parameters)
    assert load(made.run).sample("abc", max_tokens=3, temperature=0) == load(made.run).sample("abc", max_tokens=3, temperature=0)
    again = bring(folder, letters, name="mine")
    assert again.known
    assert again.run.directory == made.run.directory
    assert not bring(folder, letters, name="mine", force=True).known
    other = stirred(gpt2())
    assert bring(saved(other, "other"), letters, name="mine").run.identity != made.run.identity, "other weights are another run"


def test_weights_in_several_files_and_in_half_precision(saved: Callable[..., Path], letters: str) -> None:
    theirs = llama().to(torch.bfloat16)
    folder = saved(theirs, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = load(bring(folder, letters).run).model
    assert ours.embedding.weight.dtype == torch.float32
    wide = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(ours, tokens(9)), logits(wide, tokens(9))[..., :28], rtol=0, atol=TOLERANCE)
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its \d+ files of weights, the first .*model-00001"):
        bring(folder, letters)


def test_gpt2s_first_files_have_no_prefix_and_carry_masks(saved: Callable[..., Path], letters: str) -> None:
    theirs = gpt2()
    folder = saved(theirs)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 13, 13) for i in range(3)}
    save_file(weights, folder / "model.safetensors")
    torch.testing.assert_close(
        logits(load(bring(folder, letters).run).model, tokens(9)), logits(theirs, tokens(9))[..., :28], rtol=0, atol=5e-5
    )


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **changes}.items() if v is not None}))


REFUSED = [
    (llama, {"model_type": "gpt_neox"}, ConfigError, r"model_type gpt_neox: there is no model of this architecture here, only gpt2, llama"),
    (llama, {"head_dim": 8}, ConfigError, r"head_dim 8 times 6 heads is not the width 36: there is no model/attention of it"),
    (llama, {"hidden_act": "relu"}, ConfigError, r"hidden_act relu: there is no model/ffn with it"),
    (llama, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ConfigError, r"rope_scaling yarn: .*model/position"),
    (llama, {"vocab_size": 20}, ConfigError, r"its tokeniser has 28 tokens, and its weights are for 20"),
    (llama, {"intermediate_size": 52}, CheckpointError, r"model\.layers\.0\.mlp\.gate_proj\.weight is \(51, 36\), and .* it \(52, 36\)"),
    (llama, {"num_hidden_layers": 4}, CheckpointError, r"there is no tensor model\.layers\.3\.input_layernorm\.weight"),
    (llama, {"num_hidden_layers": 2}, CheckpointError, r"model\.layers\.2\.\S+ has no place in Llama's shape"),
    (llama, {"hidden_size": None}, CheckpointError, r"config\.json has no 'hidden_size'; is the download complete"),
    (gpt2, {"activation_function": "relu"}, ConfigError, r"activation_function relu: there is no model/ffn with it"),
    (gpt2, {"scale_attn_by_inverse_layer_idx": True}, ConfigError, r"scale_attn_by_inverse_layer_idx=True: there is no model/attention"),
    (gpt2, {"n_inner": 78}, CheckpointError, r"transformer\.h\.0\.mlp\.c_fc\.weight is \(30, 77\), and its config makes it \(30, 78\)"),
    (gpt2, {"n_positions": 14}, CheckpointError, r"transformer\.wpe\.weight is \(13, 30\), and its config makes it \(14, 30\)"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "changes", "kind", "said"), REFUSED, ids=[str(r[1]) for r in REFUSED])
def test_what_does_not_fit_is_named(
    make: Callable[[], Any], changes: dict[str, Any], kind: type[Exception], said: str, saved: Callable[..., Path], letters: str
) -> None:
    folder = saved(make())
    edit(folder, **changes)
    with pytest.raises(kind, match=said):
        bring(folder, letters)
    with pytest.raises(ConfigError, match="no runs"):
        find_run("latest")


def test_half_a_download_is_refused(saved: Callable[..., Path], letters: str, tmp_path: Path) -> None:
    folder = saved(gpt2())
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*half a download"):
        bring(folder, letters)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: neither model\.safetensors nor pytorch_model\.bin"):
        bring(folder, letters)
    (folder / "config.json").write_text('{"model_type": "gp')
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*is the download complete"):
        bring(folder, letters)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"there is no .*empty/config\.json"):
        bring(empty)
    with pytest.raises(ConfigError, match=r"nowhere/at/all is no folder or file here, and no name on the hub"):
        bring(Path("nowhere/at/all"))
    with pytest.raises(ConfigError, match=r"is a file, and no ckpt\.pt"):
        bring(Path(letters))


def test_a_pickle_of_weights_runs_nothing(saved: Callable[..., Path], letters: str, tmp_path: Path) -> None:
    theirs = gpt2()
    folder = saved(theirs)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    torch.testing.assert_close(
        logits(load(bring(folder, letters).run).model, tokens(9)), logits(theirs, tokens(9))[..., :28], rtol=0, atol=5e-5
    )
    mark = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(mark)))
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')")
    edit(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Model"})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        bring(folder, letters)
    assert not mark.exists()


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_folder_without_a_tokeniser_says_what_would_do(saved: Callable[..., Path]) -> None:
    folder = saved(gpt2())
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json, nor vocab\.json and merges\.txt: --tokenizer"):
        bring(folder)
    with pytest.raises(ConfigError, match=r"--tokenizer char knows nothing before it has learned"):
        bring(folder, "char")
    with pytest.raises(ConfigError, match=r"data/tokenizer=chra is not registered"):
        bring(folder, "chra")
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}}))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        bring(folder)


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A checkpoint as nanoGPT's train.py writes it, of a compiled model without biases, and the table of its characters."""
    theirs = gpt2(n_inner=None, activation_function="gelu", vocab_size=28)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(".bias"):
            continue
        turned = tensor.t().contiguous() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        weights[f"_orig_mod.{name}"] = turned
    arguments = {"n_layer": 3, "n_head": 5, "n_embd": 30, "block_size": 13, "bias": False, "vocab_size": 28, "dropout": 0.0}
    folder = tmp_path / "out"
    folder.mkdir()
    torch.save({"model": weights, "model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}, folder / "ckpt.pt")
    table = {"vocab_size": 28, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(table))
    return folder


def test_nanogpts_checkpoint_comes_in(nanogpt: Path) -> None:
    made = bring(nanogpt / "ckpt.pt")
    loaded = load(made.run)
    theirs = gpt2(n_inner=None, activation_function="gelu", vocab_size=28)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    torch.testing.assert_close(logits(loaded.model, tokens(13)), logits(theirs, tokens(13)), rtol=0, atol=TOLERANCE)
    assert loaded.tokenizer.decode([3, 2, 4]) == "bac"
    assert loaded.config.model.bias is False
    note = made.run.read("imported.json")
    assert note is not None
    assert (note["kind"], note["iter_num"], note["best_val_loss"]) == ("nanogpt", 7, 1.5)


def test_nanogpts_tables_run_nothing(nanogpt: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (nanogpt / "meta.pkl").write_bytes(pickle.dumps({"itos": _Evil(mark)}))
    with pytest.raises(CheckpointError, match=r"meta\.pkl is no table of characters of nanoGPT's \(it would run"):
        bring(nanogpt / "ckpt.pt")
    (nanogpt / "meta.pkl").unlink()
    with pytest.raises(ConfigError, match=r"was trained on 28 tokens of its own.*--tokenizer PATH/meta\.pkl"):
        bring(nanogpt / "ckpt.pt")
    (nanogpt / "ckpt.pt").write_bytes(pickle.dumps({"model": _Evil(mark)}))
    with pytest.raises(CheckpointError, match=r"ckpt\.pt is no checkpoint of nanoGPT's, or half a download"):
        bring(nanogpt / "ckpt.pt")
    assert not mark.exists()


def test_the_folders_own_tokeniser_is_transformers(saved: Callable[..., Path], shared_texts: dict[str, str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(shared_texts.values(), trainer)
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")
    folder = saved(llama(vocab_size=410))
    fast.save_pretrained(folder)
    loaded = load(bring(folder).run)
    for text in shared_texts.values():
        ours = loaded.tokenizer.encode(text).tolist()
        assert [0, *ours] == fast(text, split_special_tokens=True).input_ids
        assert loaded.tokenizer.decode(ours) == text
        assert b"".join(loaded.tokenizer.token_bytes(i) for i in ours).decode() == text  # type: ignore[attr-defined]
    assert (loaded.tokenizer.end_of_text, loaded.tokenizer.vocabulary, loaded.model.embedding.num_embeddings) == (1, 330, 410)
    assert 1 not in loaded.tokenizer.encode("a </s> b").tolist(), "a special token in a text is plain text"
    shutil.rmtree(folder)
    assert load("latest").tokenizer.encode("abc").tolist() == loaded.tokenizer.encode("abc").tolist(), "the run holds all it needs"
    # What begins a text stands before a prompt, too.
    seen: list[list[int]] = []
    forward = loaded.model.forward

    def watched(ids: torch.Tensor, **more: Any) -> Any:
        seen.append(ids[0].tolist())
        return forward(ids, **more)

    loaded.model.forward = watched  # type: ignore[method-assign]
    loaded.sample("abc", max_tokens=1)
    assert seen[0] == [0, *loaded.tokenizer.encode("abc").tolist()]


@pytest.fixture
def shared_texts() -> dict[str, str]:
    return {
        "plain": "Once upon a time there was a king, and a queen; they read 12345 books a day. " * 5,
        "unicode": "Größe, naïve, 日本語, 😀 and \u00a0spaces\t\n\n  here",
        "marks": "a <s> is no token here, nor is ▁ a space",
    }
