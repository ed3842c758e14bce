"""The page in a real browser: by mouse, by keyboard alone, on a phone, and in front of a model that writes markup."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, browser
from tests.generate.serving import ChatTokenizer, Endless, served, serving

EVIL = '<img src=x onerror="window.ran=1"><script>window.ran=2</script>'
DONE = "document.querySelectorAll('.answer:not([data-state=streaming])').length"


class Evil(Endless):
    """Whatever the model draws is markup."""

    def token_bytes(self, token: int) -> bytes:
        return EVIL.encode()


class Letters(Endless):
    """Every token is a letter, so that nothing of an answer is half a character."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([97 + token % 26])


class ChatLetters(ChatTokenizer):
    def token_bytes(self, token: int) -> bytes:
        return bytes([97 + token % 26])


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def address(votes: Path) -> Iterator[str]:
    models = [
        served("one", tokenizer=Letters(), seed=1),
        served("two", tokenizer=Letters(), seed=2),
        served("talker", tokenizer=ChatLetters(), seed=3),
        served("evil", tokenizer=Evil()),
        served("slow", tokenizer=Letters(), slow=0.02),
    ]
    with serving(*models, votes=votes) as url:
        yield url


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def page(chromium: Browser, address: str) -> Browser:
    """The page as someone sees it who was never here."""
    chromium.look(1280, 800)
    chromium.go(address)
    chromium.evaluate("localStorage.clear()")
    chromium.events.clear()
    chromium.go(address)
    chromium.until("document.activeElement.id === 'prompt'")
    return chromium


def choose(page: Browser, *names: str) -> None:
    """These models answer."""
    for on in (True, False):
        page.evaluate(
            f"for (const box of document.querySelectorAll('#models input'))"
            f" {{ const wanted = {json.dumps(names)}.includes(box.parentElement.title);"
            f" if (wanted === {json.dumps(on)} && box.checked !== wanted) box.click(); }}"
        )


def ask(page: Browser, text: str, *, answers: int = 1) -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")
    page.until(f"{DONE} >= {answers}")


def setting(page: Browser, name: str, value: object) -> None:
    page.evaluate(f"{{ const i = document.getElementById('set-{name}'); i.value = '{value}'; i.dispatchEvent(new Event('input')); }}")


def texts(page: Browser) -> list[str]:
    found: list[str] = page.evaluate("[...document.querySelectorAll('.answer .text')].map((box) => box.textContent)")
    return found


def test_markup_that_a_model_writes_is_text_and_runs_nothing(page: Browser, address: str) -> None:
    choose(page, "evil")
    setting(page, "max_tokens", 5)
    ask(page, "hi")
    assert texts(page) == [EVIL * 5]
    page.hover(".answer .t")
    page.click(".answer .t")
    page.until("!document.getElementById('choices').hidden")
    assert page.evaluate("document.querySelectorAll('.answer img, .answer script, #choices img, #tip img').length") == 0
    assert page.evaluate("window.ran") is None
    assert page.complaints() == []
    assert {url.startswith(address) for url in page.requested()} == {True}


def test_the_policy_runs_no_script_and_makes_no_markup_of_text(page: Browser) -> None:
    refused = page.evaluate(
        "(() => { try { document.body.innerHTML = '<img src=x onerror=window.ran=1>'; return 'taken'; } catch (e) { return e.name; } })()"
    )
    assert refused == "TypeError"
    for attempt in (
        "const s = document.createElement('script'); s.text = 'window.ran = 1'; document.head.append(s)",
        "const s = document.createElement('script'); s.append('window.ran = 2'); document.head.append(s)",
        "const i = document.createElement('img'); i.setAttribute('onerror', 'window.ran = 3'); i.src = 'x'; document.body.append(i)",
        "const a = document.createElement('a'); a.href = 'javascript:window.ran = 4'; document.body.append(a); a.click()",
    ):
        page.evaluate(f"try {{ {attempt} }} catch {{}}")
    page.evaluate("fetch('https://example.com/').catch(() => 0)")
    page.until("true")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in told for told in page.complaints())


def test_two_models_answer_side_by_side_and_another_token_is_gone_on_from(page: Browser) -> None:
    choose(page, "one", "two")
    setting(page, "max_tokens", 12)
    ask(page, "hello", answers=2)
    before = texts(page)
    assert [len(text) for text in before] == [12, 12]
    places = page.evaluate("[...document.querySelectorAll('.answer')].map((a) => a.getBoundingClientRect().top)")
    assert places[0] == places[1]
    page.hover(".answer .t:nth-of-type(4)")
    assert "%" in page.until("!document.getElementById('tip').hidden && document.getElementById('tip').textContent")
    page.click(".answer .t:nth-of-type(4)")
    page.until("document.querySelectorAll('#choices button').length >= 8")
    other = page.evaluate(
        "(() => { const b = document.querySelector('#choices button:not([aria-current])'); b.click(); return b.innerText; })()"
    )
    page.until(f"document.querySelector('.answer .t.chosen') && {DONE} == 2")
    after = texts(page)
    assert after[0][:3] == before[0][:3]
    assert after[0][3] == other[0]
    assert len(after[0]) == 4 + 12
    assert after[1] == before[1]


def test_the_keyboard_alone_is_enough(page: Browser) -> None:
    setting(page, "max_tokens", 9)
    ask(page, "hello")
    first = texts(page)[0]
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    for _ in range(4):  # back over the message, to the answer's Copy and Again, and its tokens
        page.press("Tab", shift=True)
    assert "text" in page.evaluate("document.activeElement.className")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.evaluate("document.querySelector('.t.here') === document.querySelectorAll('.t')[1]")
    assert "%" in page.evaluate("document.getElementById('status').textContent")
    page.press("Enter")
    page.until("document.activeElement.closest('#choices')")
    page.press("Escape")
    assert page.evaluate("document.getElementById('choices').hidden && document.activeElement.classList.contains('text')")
    page.press("Enter")
    page.press("ArrowDown")
    page.press("Enter")
    page.until(f"document.querySelector('.chosen') && {DONE} == 1")
    assert texts(page)[0][0] == first[0]
    assert len(texts(page)[0]) == 2 + 9


def test_an_answer_is_stopped_and_a_message_edited(page: Browser) -> None:
    choose(page, "slow")
    page.evaluate("document.getElementById('prompt').focus()")
    page.type("first")
    page.press("Enter")
    page.until("document.querySelectorAll('.t').length > 2")
    assert page.evaluate("document.getElementById('send').textContent") == "Stop"
    page.press("Escape")
    page.until("document.querySelector('.answer').dataset.state === 'stopped'")
    assert 2 < len(texts(page)[0]) < 200
    choose(page, "one")
    setting(page, "max_tokens", 4)
    ask(page, "second", answers=2)
    page.evaluate("document.querySelector('.asked button').click()")
    page.until("document.activeElement.tagName === 'TEXTAREA' && document.activeElement.closest('.asked')")
    page.type(" edited")
    page.press("Enter")
    page.until(f"document.querySelectorAll('.turn').length === 1 && {DONE} === 1")
    assert page.evaluate("document.querySelector('.said').textContent") == "first edited"
    assert page.evaluate("document.querySelectorAll('#conversations li').length") == 2  # what came after the first message is kept


def test_a_chat_is_asked_as_one_and_a_failure_is_told(page: Browser) -> None:
    choose(page, "talker")
    assert page.evaluate("document.getElementById('prompt').placeholder") == "Message"
    setting(page, "system", "Be brief.")
    setting(page, "max_tokens", 3)
    ask(page, "hello")
    ask(page, "and again", answers=2)
    asked = [
        json.loads(e["params"]["request"]["postData"])
        for e in page.events
        if e.get("method") == "Network.requestWillBeSent" and "postData" in e["params"]["request"]
    ]
    assert [m["role"] for m in asked[-1]["messages"]] in (
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    )  # an empty answer is left out
    setting(page, "temperature", -1)
    ask(page, "hello", answers=3)
    assert "temperature -1" in page.evaluate("[...document.querySelectorAll('.wrong')].at(-1).textContent")


def test_conversations_are_kept_and_exported(page: Browser, address: str) -> None:
    setting(page, "max_tokens", 6)
    ask(page, "remember me")
    said = texts(page)
    page.go(address)
    page.until("document.querySelectorAll('#conversations li').length === 1")
    page.evaluate("document.querySelector('#conversations .title').click()")
    assert texts(page) == said
    page.evaluate("URL.createObjectURL = (blob) => { window.blob = blob; return '#'; }")
    page.evaluate("document.getElementById('export-all').click()")
    exported = json.loads(page.evaluate("window.blob.text()"))
    (turn,) = exported["conversations"][0]["turns"]
    assert (turn["prompt"], turn["answers"]["one"]["text"]) == ("remember me", said[0])
    assert len(turn["answers"]["one"]["tokens"]) == 6
    page.evaluate('localStorage.setItem(\'gptlab.conversation.x\', \'{"id": "x", "tur\')')
    page.evaluate("localStorage.setItem('gptlab.settings', 'no JSON')")
    page.go(address)
    page.until("document.querySelectorAll('#conversations li').length === 1")  # what is damaged is left out
    assert page.complaints() == []


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_deleted(page: Browser) -> None:
    setting(page, "max_tokens", 3)
    ask(page, "first")
    choose(page, "slow")
    setting(page, "max_tokens", 150)
    page.evaluate("document.getElementById('prompt').focus()")
    page.type("second")
    page.press("Enter")
    page.until("document.querySelectorAll('.answer[data-state=streaming] .t').length > 1")
    page.evaluate("window.confirm = () => true")
    page.click("#conversations li .icon")
    page.until("document.querySelectorAll('#conversations li').length === 0 && document.getElementById('send').textContent === 'Send'")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation')).length") == 0


def test_without_a_store_of_the_browser_the_page_works_all_the_same(page: Browser, address: str) -> None:
    forbidden = (
        "for (const n of ['localStorage', 'sessionStorage']) Object.defineProperty(window, n, { get() { throw new Error('no'); } });"
    )
    made = page.call("Page.addScriptToEvaluateOnNewDocument", source=forbidden)["identifier"]
    try:
        page.go(address)
        page.until("document.activeElement.id === 'prompt'")
        setting(page, "max_tokens", 3)
        ask(page, "first")
        assert page.evaluate("document.querySelectorAll('#conversations li').length") == 1
        assert page.complaints() == []
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=made)


def test_a_blind_vote_tells_who_was_who_afterwards(page: Browser, votes: Path) -> None:
    choose(page, "one", "two")
    setting(page, "max_tokens", 8)
    page.click("#blind")
    ask(page, "compare", answers=2)
    page.until("document.querySelectorAll('.votes button:not(:disabled)').length === 4")
    log = page.evaluate("document.getElementById('log').innerText")
    assert "one" not in log.lower().split()
    assert page.evaluate("document.querySelectorAll('.answer .t').length") == 0  # how sure it is would tell
    page.click(".votes button:nth-of-type(2)")
    said = page.until("document.querySelector('.votes p') && document.querySelector('.votes p').textContent")
    line = json.loads(votes.read_text().splitlines()[-1])
    assert said == f"You chose B: {line['b']['label']}. A was {line['a']['label']}."
    assert {line["a"]["run"], line["b"]["run"]} == {"one", "two"}
    assert [line[side]["answer"] for side in ("a", "b")] == texts(page)


def test_the_token_comes_with_the_address_or_is_asked_for(chromium: Browser) -> None:
    with serving(served("one", tokenizer=Letters()), local=False, token="open-sesame") as url:
        chromium.go("about:blank")
        chromium.go(url)
        chromium.until("document.activeElement.id === 'token'")
        chromium.type("wrong")
        chromium.press("Enter")
        chromium.until("document.activeElement.id === 'token' && document.activeElement.value === ''")
        chromium.type("open-sesame")
        chromium.press("Enter")
        chromium.until("document.getElementById('notice').hidden && document.querySelectorAll('#fields input').length > 5")
        chromium.evaluate("sessionStorage.clear()")
        chromium.go("about:blank")
        chromium.go(f"{url}/#token=open-sesame")
        chromium.until("document.querySelectorAll('#fields input').length > 5")
        assert chromium.evaluate("location.href") == f"{url}/"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off_or_lies_over_something_else(page: Browser, width: int, dark: bool) -> None:
    choose(page, "one", "two")
    setting(page, "max_tokens", 40)
    ask(page, "A longer message that takes more than one line on a phone, so that it has to wrap somewhere.", answers=2)
    page.look(width, 844, dark=dark)
    page.evaluate("document.getElementById('open-settings').click(); document.getElementById('close-settings').click()")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate("""[...document.querySelectorAll('button, textarea, label, h1, h3, .said')].filter((e) => {
      const r = e.getBoundingClientRect(), style = getComputedStyle(e);
      if (!r.width || style.visibility === 'hidden' || e.closest('#fields, .hidden, .skip')) return false;
      return r.left < -1 || r.right > innerWidth + 1 || (e.scrollWidth > e.clientWidth + 1 && e.tagName === 'BUTTON');
    }).map((e) => e.outerHTML.slice(0, 120))""")
    assert cut == []
    over = page.evaluate("""(() => { const found = [], all = [...document.querySelectorAll('.bar > *, #models label, #composer > *')]
      .map((e) => [e, e.getBoundingClientRect()]).filter(([e, r]) => r.width > 1 && r.height > 1);
      const meet = (p, q) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1;
      for (const [a, p] of all) for (const [b, q] of all) if (a !== b && meet(p, q)) found.push(a.outerHTML.slice(0, 60));
      return found; })()""")
    assert over == []
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") != dark


def test_axe_finds_nothing(page: Browser) -> None:
    axe = os.environ.get("AXE_CORE", "")
    if not axe:
        pytest.skip("needs AXE_CORE=FILE, the axe.min.js of the npm package axe-core")
    script = Path(axe).read_text(encoding="utf-8")
    choose(page, "one", "two")
    setting(page, "max_tokens", 20)
    ask(page, "hello", answers=2)
    states: dict[str, list[Any]] = {}
    for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
        page.look(width, 844, dark=dark)
        for state in ("plain", "choices", "settings", "list"):
            opened = {"choices": "document.querySelector('.t').click()", "settings": "document.getElementById('open-settings').click()"}
            if state == "list" and width > 900:
                continue
            page.evaluate(opened.get(state, "document.getElementById('open-list').click()" if state == "list" else "0"))
            page.evaluate(f"{script};0")
            page.evaluate("new Promise((done) => setTimeout(done, 250))")
            states[f"{width} {dark} {state}"] = page.evaluate("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes[0].html]))")
            page.press("Escape")
    assert {state: found for state, found in states.items() if found} == {}
