"""Records of chats: each known form is told by itself, and a record that is no chat says why, and where it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.chat import Message
from gptlab.data.chat_corpus import ChatFiles, Preferences
from gptlab.data.chat_records import BadRecord, Example, example

ASKED, ANSWERED = Message("user", "Two and two?"), Message("assistant", "Four.")
FORMS: dict[str, Any] = {
    "openai": {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]},
    "openai, in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?"}]},
            {"role": "assistant", "content": "Four."},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
    "alpaca": {"instruction": "Two and two?", "input": "", "output": "Four."},
    "dolly": {"instruction": "Two and two?", "context": "", "response": "Four.", "category": "sums"},
    "completion": {"prompt": "Two and two?", "completion": "Four."},
    "gsm8k": {"question": "Two and two?", "answer": "Four."},
    "completion, as messages": {
        "prompt": [{"role": "user", "content": "Two and two?"}],
        "completion": [{"role": "assistant", "content": "Four."}],
    },
    "completion, as a message": {"prompt": "Two and two?", "completion": [{"role": "assistant", "content": "Four."}]},
    "input alone": {"instruction": "", "input": "Two and two?", "output": "Four."},
    "chosen alone": {"prompt": "Two and two?", "chosen": "Four."},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_told_by_itself(form: str) -> None:
    assert example(FORMS[form]) == Example((ASKED, ANSWERED))


def test_what_goes_with_an_instruction_follows_it() -> None:
    made = example({"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Be brief."})
    assert made.messages == (Message("system", "Be brief."), Message("user", "Add.\n\n2 and 2"), Message("assistant", "4"))


PREFERENCES: dict[str, Any] = {
    "texts": {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."},
    "whole chats": {"prompt": "Two and two?", "chosen": FORMS["openai"]["messages"],
                    "rejected": [FORMS["openai"]["messages"][0], {"role": "assistant", "content": "Five."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Two and two?"}], "chosen": {"from": "gpt", "value": "Four."},
                 "rejected": {"from": "gpt", "value": "Five."}},
    "chats without a prompt": {"chosen": FORMS["openai"]["messages"],
                               "rejected": [FORMS["openai"]["messages"][0], {"role": "assistant", "content": "Five."}]},
}  # fmt: skip


@pytest.mark.parametrize("form", PREFERENCES)
def test_preferences_are_two_answers_to_one_question(form: str) -> None:
    assert example(PREFERENCES[form]) == Example((ASKED, ANSWERED), "Five.")


def test_a_call_of_a_tool_is_the_assistants_and_what_it_gives_back_a_tools() -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    told = {"tools": [call], "conversations": [
        {"from": "human", "value": "Two and two?"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"}, {"from": "gpt", "value": "Four."}]}  # fmt: skip
    made = example(told)
    assert [message.role for message in made.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.dumps(call) in made.messages[0].content
    openai = {"messages": [FORMS["openai"]["messages"][0], {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
                           {"role": "tool", "content": "4"}, FORMS["openai"]["messages"][1]]}  # fmt: skip
    assert example(openai).messages[1].content == f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


BAD: list[tuple[Any, str]] = [
    ([1], "not an object"),
    ({"text": "no chat"}, "none of the known forms"),
    ({"instruction": "Add."}, "without an answer"),
    ({"messages": []}, "there is no message"),
    ({"messages": ["hi"]}, r"messages\[0\] is str"),
    ({"messages": [{"role": "king", "content": "x"}]}, "'king' is not one of"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no answer follows"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "comes first: roles are out of order"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}, "follows one of the user: roles are out of order"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "of the system, follows"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}, "of the tool, follows"),
    ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "y"}]}, "message 1, of the user, is empty"),
    ({"messages": [{"role": "user", "content": 3}]}, r"content is int, not a text"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"\['user'\] is not one of"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": 5}]}, "are int, not a list"),
    ({"prompt": "\ud83d", "completion": "y"}, "half of a surrogate pair"),
    ({"prompt": "x", "completion": "y", "label": False}, "its `label` says that the completion is a bad answer"),
    ({"prompt": "x", "chosen": 3, "rejected": "y"}, "`chosen` is int"),
    ({"prompt": "x", "chosen": "y", "rejected": 3}, "`rejected` is int"),
    ({"prompt": "x", "chosen": "y", "rejected": " "}, "`rejected` is empty"),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, "are the same answer"),
    (
        {
            "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "y"}],
            "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "z"}],
        },
        "do not answer the same messages",
    ),
    ({"prompt": "x", "rejected": "y"}, "`rejected` and no `chosen`"),
    ({"prompt": "x", "chosen": [{"role": "user", "content": "y"}], "rejected": "z"}, "does not end with a message of the assistant"),
]


@pytest.mark.parametrize(("record", "why"), BAD)
def test_a_record_that_is_no_chat_says_why(record: Any, why: str) -> None:
    with pytest.raises(BadRecord, match=why):
        example(record)


def test_the_first_bad_record_is_named_by_file_and_line(tmp_path: Path) -> None:
    rows = [FORMS["alpaca"], FORMS["sharegpt"], {"instruction": "Add."}, FORMS["openai"]]
    lines, listed = tmp_path / "chats.jsonl", tmp_path / "chats.json"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    listed.write_text(json.dumps(rows, indent=1))
    where = listed.read_text().splitlines().index('  "instruction": "Add."')  # its brace stands in the line before, counted from 1
    for file, line in ((lines, 3), (listed, where)):
        with pytest.raises(DataError, match=rf"{file}, line {line}: 'instruction' without an answer"):
            list(ChatFiles(path=str(file)).found())
        found = list(ChatFiles(path=str(file), bad="skip").found())
        assert [isinstance(one, Example) for one in found] == [True, True, False, True]
    assert len(list(ChatFiles(path=str(lines), records=2).found())) == 2


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n{broken\n', "line 2: it is no JSON"),
        ("a.json", '[{"prompt": "x", "completion": "y"},\n{broken]', "line 2: it is no JSON"),
        ("a.json", '{"prompt": "x"}', "is no list of records"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=why):
        list(ChatFiles(path=str(tmp_path / name)).found())


def test_a_folder_without_chats_and_chats_without_pairs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no \.json or \.jsonl file"):
        ChatFiles(path=str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMS["alpaca"]))
    with pytest.raises(ConfigError, match="records=-1"):
        ChatFiles(path=str(tmp_path), records=-1)
    with pytest.raises(DataError, match="no `rejected` answer"):
        list(Preferences(path=str(tmp_path)).found())
