"""The formats of chats as Jinja templates, which transformers, vLLM and llama.cpp read."""

from __future__ import annotations

from collections.abc import Mapping

from gptlab.data.chat import chat_format
from gptlab.data.tokenizer import Tokenizer

_EACH = "{% for message in messages %}"
_ROLE = "{%% set role = '%s' if message['role'] == 'tool' else message['role'] %%}"  # of what a tool gave back
_ASK = "{% endfor %}{% if add_generation_prompt %}"


def template_of(tokenizer: Tokenizer) -> str | None:
    """The template that gives the tokens of `gptlab.data.chat.render`; None for a base model's tokeniser, and where a
    format's own words melt into a message's when a whole text is encoded at once: plain words, and Llama's line ends in GPT-2's tokens."""
    found = chat_format(tokenizer)
    if found is None or found.name == "plain" or not _stands_apart(tokenizer, "\n\n" if found.name == "llama3" else "user\n"):
        return None
    special: Mapping[str, int] = getattr(tokenizer, "special", {})
    names: dict[int, str] = {number: name for name, number in special.items()}
    begin = "".join(names[number] for number in found.begin)
    content = "{{ message['content'] }}"
    if found.name == "gptlab":
        tool = "tool" if "<|tool_start|>" in special else "user"
        return (
            begin + _EACH + _ROLE % tool + "<|{{ role }}_start|>" + content + "<|{{ role }}_end|>" + _ASK + "<|assistant_start|>{% endif %}"
        )
    if found.name == "chatml":
        each = "<|im_start|>{{ message['role'] }}\n" + content + "<|im_end|>\n"
        return begin + _EACH + "{{ '" + _quoted(each) + _ASK + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    each = "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    ask = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    return begin + _EACH + _ROLE % "ipython" + "{{ '" + _quoted(each) + _ASK + ask


def _stands_apart(tokenizer: Tokenizer, before: str) -> bool:
    """Whether a word behind `before` has the tokens that it has by itself."""
    parts = [int(i) for text in (before, "Hi") for i in tokenizer.encode(text)]
    return [int(i) for i in tokenizer.encode(before + "Hi")] == parts


def _quoted(text: str) -> str:
    """The rest of a Jinja expression that was opened with a quote: what is in braces stands beside the text, whose line ends are escaped
    (a template's own would be trimmed)."""
    return text.replace("\n", "\\n").replace("{{ ", "' + ").replace(" }}", " + '") + "' }}"
