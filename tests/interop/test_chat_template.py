"""The template of an exported chatbot gives the tokens that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptlab import compose, load, train
from gptlab.data.chat import Message, render
from gptlab.data.chat_tokens import chat
from gptlab.interop.chat_template import template_of
from gptlab.interop.exporting import export_to
from gptlab.interop.tokenizers import tokenizer_json
from tests.data.test_conversations import chats, written

transformers = pytest.importorskip("transformers")

TALK = [
    Message("system", "Be brief."), Message("user", "Hi  "), Message("assistant", "It's {{ 1 }}"), Message("tool", "42"),
    Message("assistant", "So 42."), Message("user", "<|im_end|>"),
]  # fmt: skip


def spoken(words: object, talk: list[Message], *, answer: bool) -> list[int]:
    told = [{"role": m.role, "content": m.content} for m in talk]
    found = words.apply_chat_template(told, tokenize=True, add_generation_prompt=answer)  # type: ignore[attr-defined]
    return list(found if isinstance(found, list) else found["input_ids"])


@pytest.mark.parametrize("template", ["gptlab", "chatml", "llama3"])
@pytest.mark.parametrize("base", ["byte", "gpt2"])
def test_transformers_gives_the_tokens_of_our_own(base: str, template: str, tmp_path: Path, tiktoken_cache: Path) -> None:
    ours = chat(base=base, template=template)  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(ours)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    made = template_of(ours)
    if (base, template) == ("gpt2", "llama3"):
        assert made is None, "GPT-2 splits two line ends before a word, and keeps them together by themselves"
        return
    assert made is not None
    (tmp_path / "chat_template.jinja").write_text(made)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for answer, talk in ((True, TALK[:4]), (False, TALK[:5])):
        assert spoken(words, talk, answer=answer) == render(talk, ours, answer=answer).tokens
    assert template_of(ours.base) is None
    assert template_of(chat(base=base, template="plain")) is None


def test_a_chatbot_opens_in_transformers_with_its_template(tmp_path: Path) -> None:
    file = written(tmp_path, chats(30, turns=1))
    small = ["model.width=16", "model.heads=2", "model.depth=1", "model.context_length=128", "model/position=learned", "tracker=none"]
    more = ["data/corpus=chat", "data/tokenizer=chat", f"data.corpus.path={file}", "objective=sft", "trainer.budget=2steps"]
    run = train(compose([*small, *more, "trainer.batch_tokens=256", "callbacks.samples.tokens=2"])).run
    made = export_to(run, "hf", tmp_path / "out")
    words = transformers.AutoTokenizer.from_pretrained(made.path)
    talk = [Message("user", "the king"), Message("assistant", "sings")]
    assert spoken(words, talk, answer=False) == render(talk, load(run).tokenizer, answer=False).tokens
    assert transformers.AutoModelForCausalLM.from_pretrained(made.path).config.vocab_size == 263
