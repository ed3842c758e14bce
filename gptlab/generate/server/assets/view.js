
// A conversation on the page. `act` is what its buttons do.
const view = (() => {
  const button = (text, name, click, more = {}) => {
    const made = el("button", { type: "button", className: "small", textContent: text, on: { click }, ...more });
    if (name) made.setAttribute("aria-label", name);
    return made;
  };
  const icon = (path) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 20 20");
    svg.setAttribute("aria-hidden", "true");
    drawn.setAttribute("d", path);
    svg.append(drawn);
    return svg;
  };

  function nearEnd() {
    const log = $("log");
    return log.scrollHeight - log.scrollTop - log.clientHeight < 90;
  }
  const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

  // One answer: `add` a token as it comes, `settle` when it has ended.
  function answer(turn, key, given, act) {
    const box = el("div", { className: "text", role: "group", tabIndex: 0 });
    const about = el("span", { className: "quiet" }), wrong = el("p", { className: "wrong", hidden: true });
    const name = el("h3", { textContent: given.label });
    const again = button("Again", `Answer again: ${given.label}`, () => act.again(turn, key));
    const copy = button("Copy", `Copy the answer: ${given.label}`, async () => {
      const done = await navigator.clipboard?.writeText(given.text).then(() => true, () => false);
      copy.textContent = done ? "Copied" : "Not allowed";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    const node = el("section", { className: "answer", "aria-label": `Answer of ${given.label}` }, el("header", {}, name),
      box, wrong, el("footer", {}, ...(act.blind ? [] : [again]), copy, about));

    const made = {
      node,
      add(token) {
        const follow = nearEnd();
        if (token.text) box.append(tokens.span(token));
        if (follow) toEnd();
      },
      settle() {
        node.dataset.state = given.state;
        again.disabled = given.state === "streaming";
        box.setAttribute("aria-label", `${given.label}, the answer` + (given.tokens.some((t) => t.id !== null) ? "; arrow keys go through its tokens" : ""));
        wrong.hidden = !given.error;
        wrong.textContent = given.error || "";
        const words = [];
        if (given.state === "stopped") words.push("stopped");
        if (given.made) words.push(`${given.made} token${given.made > 1 ? "s" : ""}`);
        if (given.made > 1 && given.seconds && !act.blind) words.push(`${Math.round((given.made - 1) / given.seconds)}/s`);
        if (given.first && !act.blind) words.push(`first after ${Math.round(given.first)} ms`);
        about.textContent = given.state === "streaming" ? "" : words.join(" · ");
        if (given.state !== "streaming" && !given.text && !given.error) about.textContent = "an empty answer";
      },
    };
    tokens.wire(box, (token, other) => act.branch(turn, key, token, other));
    for (const token of given.tokens) if (token.text) box.append(tokens.span(token));
    made.settle();
    return made;
  }

  function asked(turn, act) {
    const said = el("div", { className: "said", textContent: turn.prompt || "(goes on)" });
    const node = el("div", { className: "asked" }, el("h2", { className: "hidden", textContent: "You" }), said);
    if (!act.blind) {
      const edit = button("Edit", "Edit and send again", () => {
        const text = el("textarea", { value: turn.prompt, rows: 3, "aria-label": "Your message" });
        const cancel = el("button", { type: "button", textContent: "Cancel", on: { click: () => { form.replaceWith(said, edit); edit.focus(); } } });
        const form = el("form", { on: {
          submit: (event) => { event.preventDefault(); act.resend(turn, text.value); },
          keydown: (event) => {
            if (event.key === "Escape") cancel.click();
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
          },
        } }, text, el("div", { className: "pair" }, cancel, el("button", { type: "submit", className: "primary", textContent: "Send again" })));
        edit.remove();
        said.replaceWith(form);
        text.focus();
      });
      node.append(edit);
    }
    return node;
  }

  function votes(turn, act) {
    const bar = el("div", { className: "votes", role: "group", "aria-label": "Your vote" });
    if (turn.vote) {
      const said = { a: `You chose A: ${turn.names.a}. B was ${turn.names.b}.`, b: `You chose B: ${turn.names.b}. A was ${turn.names.a}.`,
        tie: `A tie of A, ${turn.names.a}, and B, ${turn.names.b}.`, bad: `Both bad: A was ${turn.names.a}, B was ${turn.names.b}.` }[turn.vote];
      bar.append(el("p", { textContent: said }));
    } else {
      const ready = ["a", "b"].every((side) => turn.answers[side]?.state === "done");
      for (const [vote, text] of [["a", "A is better"], ["b", "B is better"], ["tie", "A tie"], ["bad", "Both are bad"]]) {
        bar.append(el("button", { type: "button", textContent: text, disabled: !ready, on: { click: () => act.vote(turn, vote) } }));
      }
    }
    return bar;
  }

  // The whole conversation; gives back the parts of its answers, by turn and key.
  function show(conversation, act, empty) {
    tokens.close(false);
    tokens.unhint();
    const parts = new Map();
    const turns = conversation.turns.map((turn, i) => {
      const answers = Object.entries(turn.answers).map(([key, given]) => {
        const made = answer(turn, key, given, act);
        parts.set(given, made);
        return made.node;
      });
      const node = el("article", { className: "turn", "aria-label": `Turn ${i + 1}` }, asked(turn, act), el("div", { className: "answers" }, ...answers));
      if (act.blind) node.append(votes(turn, act));
      return node;
    });
    $("log").replaceChildren(...(turns.length ? turns : [el("div", { className: "empty" }, el("h2", { textContent: empty[0] }), el("p", { textContent: empty[1] }))]));
    return parts;
  }

  function list(conversations, current, open, remove) {
    $("conversations").replaceChildren(...conversations.map((one) => {
      const title = el("button", { type: "button", className: "title", on: { click: () => open(one) } }, el("span", { textContent: one.title }));
      const item = el("li", {}, title, el("button", { type: "button", className: "icon", "aria-label": `Delete: ${one.title}`, on: { click: () => remove(one) } },
        icon("M5 5l10 10M15 5L5 15")));
      if (one.id === current) {
        item.dataset.current = "";
        title.setAttribute("aria-current", "true");
      }
      return item;
    }));
  }

  function models(all, chosen, changed) {
    $("models").replaceChildren(el("legend", { className: "hidden", textContent: "Models that answer" }), ...(all.length < 2 ? [] : all.map((model) => {
      const box = el("input", { type: "checkbox", checked: chosen.has(model.id), on: { change: () => { if (!changed(model, box.checked)) box.checked = true; } } });
      return el("label", { title: model.id }, box, el("span", { textContent: model.label }), el("span", { className: "quiet", textContent: model.chat_format ? "chat" : "text" }));
    })));
  }

  return { show, list, models, toEnd };
})();
