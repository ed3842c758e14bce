
// What the page does.
(() => {
  const NUMBERS = [
    { name: "temperature", label: "Temperature", value: 0.8, min: 0, max: 10, step: 0.1, help: "0: the likeliest" },
    { name: "max_tokens", label: "Tokens", value: 200, min: 1, step: 1, help: "at most, an answer" },
    { name: "top_k", label: "Top k", value: 50, min: 0, step: 1, help: "0: all tokens" },
    { name: "top_p", label: "Top p", value: 1, min: 0, max: 1, step: 0.05, help: "1: all tokens" },
    { name: "min_p", label: "Min p", value: 0, min: 0, max: 1, step: 0.01, help: "0: all tokens" },
    { name: "repetition_penalty", label: "Repetition", value: 1, min: 0, max: 10, step: 0.05, help: "1: no penalty" },
    { name: "seed", label: "Seed", value: null, min: 0, step: 1, help: "empty: random" },
  ];
  const ALTERNATIVES = 8;
  const settings = Object.assign({ system: "", text: false, tint: false }, Object.fromEntries(NUMBERS.map((f) => [f.name, f.value])), store.settings());
  let all = [], limits = {}, chosen = new Set(), conversation = fresh(), parts = new Map();
  const running = new Set(), gone = new Set(); // requests under way; conversations that were deleted

  function newId() {
    return [...crypto.getRandomValues(new Uint8Array(9))].map((b) => b.toString(16).padStart(2, "0")).join("");
  }
  function fresh(kind = "talk") {
    return { id: newId(), kind, title: "", created: Date.now(), changed: Date.now(), turns: [] };
  }
  const model = (name) => all.find((m) => m.id === name);
  const picked = () => all.filter((m) => chosen.has(m.id));
  const talks = (m) => Boolean(m.chat_format) && !settings.text;
  const blind = () => conversation.kind === "blind";

  function notice(text) {
    $("notice").hidden = !text;
    $("notice").replaceChildren(text || "");
  }

  // ---- what is asked

  function numbers() {
    const given = {};
    for (const { name } of NUMBERS) if (settings[name] !== null && settings[name] !== "") given[name] = settings[name];
    return given;
  }

  // What a model is asked for a turn: its own answers to the turns before, or, where it gave none, another's.
  function request(name, format, turn) {
    const before = blind() ? [] : conversation.turns.slice(0, conversation.turns.indexOf(turn));
    const answerOf = (earlier) => (earlier.answers[name] || Object.values(earlier.answers)[0])?.text || "";
    const body = { model: name, stream: true, ...numbers() };
    if (!format) return ["/v1/completions", { ...body, prompt: before.map((t) => t.prompt + answerOf(t)).join("") + turn.prompt, logprobs: ALTERNATIVES }];
    const messages = settings.system ? [{ role: "system", content: settings.system }] : [];
    for (const earlier of before) {
      if (answerOf(earlier)) messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: answerOf(earlier) });
    }
    messages.push({ role: "user", content: turn.prompt });
    return ["/v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: ALTERNATIVES }];
  }

  async function run(turn, key, [path, body], kept = []) {
    const given = turn.answers[key], control = new AbortController(), began = performance.now();
    const own = conversation;
    Object.assign(given, { tokens: [...kept], text: kept.map((t) => t.text).join(""), state: "streaming", error: "", made: 0, first: 0, seconds: 0 });
    if (kept.length) body.answer_tokens = kept.map((t) => t.id);
    running.add(control);
    let first = 0;
    try {
      for await (const chunk of api.stream(path, body, control.signal)) {
        const choice = chunk.choices[0];
        if (!choice) continue;
        const told = choice.logprobs?.content || [];
        let text = choice.text ?? choice.delta?.content ?? "";
        if ((text || told.length) && !first) {
          first = performance.now();
          given.first = first - began;
        }
        for (const one of told) {
          add(given, { id: one.id, token: one.token, text: one.text, logprob: one.logprob, top: one.top_logprobs.map(({ id, token, logprob }) => ({ id, token, logprob: Number(logprob.toFixed(4)) })) });
          text = text.slice(one.text.length);
        }
        if (text) add(given, { id: null, token: text, text, logprob: null, top: [] });
        given.made += told.length || (text ? 1 : 0);
      }
      given.state = "done";
    } catch (error) {
      given.state = error.name === "AbortError" ? "stopped" : "failed";
      if (error.name !== "AbortError") given.error = error.message;
      if (error.status === 401) askForToken();
    }
    given.seconds = first ? (performance.now() - first) / 1000 : 0;
    running.delete(control);
    parts.get(given)?.settle();
    if (!gone.has(own.id)) notice(store.save(own));
    if (!running.size) finished(turn);
  }

  function add(given, token) {
    given.tokens.push(token);
    given.text += token.text;
    parts.get(given)?.add(token);
  }

  function finished(turn) {
    const answers = Object.values(turn.answers);
    busy();
    listed();
    if (blind() && answers.every((a) => a.state === "done")) {
      shown();
      say("Both answers are here: vote for A or B.");
    } else say(answers.map((a) => a.error || `${a.label}: ${a.text}`).join("\n"));
  }

  // ---- what a person does

  const label = (name) => model(name)?.label || name;
  const begun = (name) => ({ label: label(name), tokens: [], text: "", state: "streaming", error: "", made: 0 });

  async function send(text) {
    if (blind()) return sendBlind(text);
    const turn = { prompt: text, answers: {} };
    for (const m of picked()) turn.answers[m.id] = begun(m.id);
    conversation.turns.push(turn);
    conversation.title ||= text.trim().slice(0, 80) || "Untitled";
    shown();
    view.toEnd();
    await Promise.all(picked().map((m) => run(turn, m.id, request(m.id, talks(m), turn))));
  }

  async function sendBlind(text) {
    const two = picked().length > 1 ? picked() : all;
    let pair;
    try {
      pair = await api.json("/v1/blind", { models: two.map((m) => m.id) });
    } catch (error) {
      return notice(error.message);
    }
    const turn = { prompt: text, pair: pair.pair, answers: {} };
    for (const side of ["a", "b"]) turn.answers[side] = { ...begun(side), label: side.toUpperCase() };
    conversation.turns.push(turn);
    conversation.title ||= `Blind: ${text.trim().slice(0, 70)}`;
    shown();
    view.toEnd();
    await Promise.all(["a", "b"].map((side) => {
      const [path, body] = request(`blind-${pair.pair}-${side}`, pair.chat && !settings.text, turn);
      delete body.logprobs; // how sure a model is would tell which it is
      delete body.top_logprobs;
      return run(turn, side, [path, body]);
    }));
  }

  // The conversation up to a turn; where more came after it, in a copy, so that nothing is lost.
  function cutAfter(turn) {
    stop();
    const i = conversation.turns.indexOf(turn);
    if (i < conversation.turns.length - 1) conversation = { ...structuredClone(conversation), id: newId(), created: Date.now(), title: `${conversation.title} (again)` };
    conversation.turns.length = i + 1;
    return conversation.turns[i];
  }

  const act = {
    get blind() { return blind(); },
    again(turn, key) {
      const own = cutAfter(turn);
      if (!model(key)) return notice("That model is not served any more.");
      begin(own, key);
    },
    branch(turn, key, token, other) {
      const i = turn.answers[key].tokens.indexOf(token);
      if (!model(key)) return notice("That model is not served any more.");
      const own = cutAfter(turn), tokensOf = own.answers[key].tokens;
      if (tokensOf.slice(0, i).some((t) => t.id === null)) return notice("The tokens of that answer are not known.");
      const chosenToken = { ...tokensOf[i], id: other.id, token: other.token, text: other.id === token.id ? token.text : other.token, logprob: other.logprob, chosen: true };
      begin(own, key, [...tokensOf.slice(0, i), chosenToken]);
    },
    resend(turn, text) {
      const own = cutAfter(turn);
      if (!text.trim()) return shown();
      conversation.turns.pop();
      if (conversation.turns.length === 0) conversation.title = "";
      own.answers = {};
      send(text);
      $("prompt").focus();
    },
    async vote(turn, vote) {
      try {
        const told = await api.json("/v1/votes", { pair: turn.pair, vote });
        turn.vote = vote;
        turn.names = { a: told.a.label, b: told.b.label };
        for (const side of ["a", "b"]) turn.answers[side].label = `${side.toUpperCase()}: ${turn.names[side]}`;
      } catch (error) {
        return notice(error.message);
      }
      notice(store.save(conversation));
      shown();
      $("prompt").focus();
      say(`Thank you. A was ${turn.names.a}, B was ${turn.names.b}.`);
    },
  };

  function begin(turn, key, kept = []) {
    const given = turn.answers[key];
    Object.assign(given, { tokens: kept, text: kept.map((t) => t.text).join(""), state: "streaming", error: "", made: 0 });
    shown();
    run(turn, key, request(key, talks(model(key)), turn), kept);
    busy();
  }

  function stop() {
    for (const control of running) control.abort();
  }

  // ---- what is shown

  function shown() {
    const empty = blind()
      ? ["A blind test", "Two models answer the same, as A and B in random order. Vote; then you are told which was which, and gptlab compare counts it."]
      : picked().some(talks) ? ["Ask something", "Hover a token for its probability; click it for what else could have stood there."]
        : ["Begin a text", "A base model goes on with what you write. Hover a token for its probability; click it for what else could have stood there."];
    parts = view.show(conversation, act, empty);
    $("blind").setAttribute("aria-pressed", String(blind()));
    const talking = picked().some(talks);
    $("prompt-label").textContent = talking ? "Message" : "Text to go on from";
    $("prompt").placeholder = talking ? "Message" : "Text to go on from";
    $("hint").textContent = "Enter sends, Shift+Enter is a new line, Escape stops.";
    busy();
    listed();
  }

  function busy() {
    $("send").textContent = running.size ? "Stop" : "Send";
    $("log").setAttribute("aria-busy", String(running.size > 0));
  }

  function listed() {
    view.list(store.conversations(), conversation.id, (one) => {
      if (one.id !== conversation.id) {
        stop();
        conversation = one;
        shown();
        view.toEnd();
      }
      drawer(false);
    }, (one) => {
      if (!confirm(`Delete “${one.title}”?`)) return;
      if (one.id === conversation.id) stop();
      gone.add(one.id);
      store.remove(one.id);
      if (one.id === conversation.id) conversation = fresh();
      shown();
      $("new").focus();
    });
  }

  function drawer(open) {
    const was = $("list").classList.contains("open");
    $("list").classList.toggle("open", open);
    $("open-list").setAttribute("aria-expanded", String(open));
    shade();
    if (open) $("new").focus();
    else if (was) $("open-list").focus();
  }

  function panel(open) {
    const was = !$("settings").hidden;
    $("settings").hidden = !open;
    $("open-settings").setAttribute("aria-expanded", String(open));
    shade();
    if (open) $("settings").querySelector("input")?.focus();
    else if (was) $("open-settings").focus();
  }

  const narrow = matchMedia("(max-width: 900px)");
  function shade() {
    $("shade").hidden = !narrow.matches || !($("list").classList.contains("open") || !$("settings").hidden);
    const covered = !$("shade").hidden; // what lies below is out of reach of the keyboard, too
    for (const part of [document.querySelector("main"), document.querySelector(".bar")]) part.inert = covered;
  }

  function fields() {
    const made = NUMBERS.map((f) => {
      const input = el("input", { type: "number", id: `set-${f.name}`, step: "any", value: settings[f.name] ?? "", inputMode: "decimal", "aria-describedby": `help-${f.name}` });
      input.addEventListener("input", () => {
        settings[f.name] = input.value === "" ? null : Number(input.value);
        store.keepSettings(settings);
      });
      for (const bound of ["min", "max"]) if (f[bound] !== undefined) input[bound] = f[bound];
      input.step = f.step;
      return el("div", { className: "field" }, el("label", { for: input.id, textContent: f.label }), input, el("span", { className: "help", id: `help-${f.name}`, textContent: f.help }));
    });
    const check = (name, text, changed) => {
      const box = el("input", { type: "checkbox", checked: settings[name], on: { change: () => { settings[name] = box.checked; store.keepSettings(settings); changed(); } } });
      return el("div", { className: "field whole" }, el("label", { className: "check" }, box, text));
    };
    const tint = check("tint", "Colour tokens by probability", tinted);
    const scale = el("div", { className: "whole scale tinted" }, ...[["p1", "< 2 %"], ["p2", "≥ 2 %"], ["p3", "≥ 10 %"], ["p4", "≥ 50 %"]].map(([c, t]) => el("span", { className: c, textContent: t })));
    const more = [];
    if (all.some((m) => m.chat_format)) {
      const system = el("textarea", { id: "set-system", value: settings.system, rows: 3, on: { input: () => { settings.system = system.value; store.keepSettings(settings); } } });
      more.push(el("div", { className: "field whole" }, el("label", { for: "set-system", textContent: "System message" }), system),
        check("text", "Continue text, without chat tokens", shown));
    }
    const reset = el("button", { type: "button", className: "whole", textContent: "As they were at first", on: { click: () => {
      Object.assign(settings, { system: "", text: false, tint: false }, Object.fromEntries(NUMBERS.map((f) => [f.name, f.value])));
      store.keepSettings(settings);
      fields();
      tinted();
      shown();
    } } });
    $("fields").replaceChildren(...made, ...more, tint, scale, reset);
  }
  const tinted = () => $("log").classList.toggle("tinted", Boolean(settings.tint));

  function download(name, value) {
    const link = el("a", { href: URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  const exported = (one) => ({ title: one.title, kind: one.kind, created: new Date(one.created).toISOString(), turns: one.turns });

  function theme(dark) {
    const now = dark ?? matchMedia("(prefers-color-scheme: dark)").matches;
    if (dark !== null && dark !== undefined) document.documentElement.dataset.theme = dark ? "dark" : "light";
    $("theme").setAttribute("aria-pressed", String(now));
    return now;
  }

  function askForToken() {
    const input = el("input", { type: "password", id: "token", autocomplete: "off" });
    const form = el("form", { on: { submit: (event) => { event.preventDefault(); api.useToken(input.value.trim()); notice(""); start(); } } },
      el("label", { for: "token", textContent: "Token" }), input, el("button", { type: "submit", className: "primary", textContent: "Use it" }));
    notice("This server asks for its token; the terminal of gptlab serve shows it.");
    $("notice").append(form);
    input.focus();
  }

  async function start() {
    let told;
    try {
      told = await api.json("/v1/models");
    } catch (error) {
      return error.status === 401 ? askForToken() : notice(error.message);
    }
    all = told.data;
    limits = told.gptlab;
    const kept = (store.settings().models || []).filter((name) => model(name));
    chosen = new Set(kept.length ? kept : [all[0].id]);
    document.title = all.length === 1 ? `${all[0].label} · gptlab` : "gptlab";
    $("blind").hidden = !limits.blind;
    NUMBERS.find((f) => f.name === "max_tokens").max = limits.max_tokens;
    view.models(all, chosen, (m, on) => {
      if (on) chosen.add(m.id);
      else if (chosen.size > 1) chosen.delete(m.id);
      else return false; // one answers at least
      settings.models = [...chosen];
      store.keepSettings(settings);
      shown();
      return true;
    });
    fields();
    tinted();
    shown();
  }

  // ---- wiring

  function grow() {
    $("prompt").style.height = "auto";
    $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
  }
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.size) return stop();
    const text = $("prompt").value, goesOn = !blind() && !picked().some(talks) && conversation.turns.length > 0;
    if (!all.length || (!text.trim() && !goesOn)) return;
    $("prompt").value = "";
    grow();
    send(text);
    busy();
  });
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
      event.preventDefault();
      if (!running.size) $("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (!$("choices").hidden) tokens.close();
    else if ($("list").classList.contains("open")) drawer(false);
    else if (!$("settings").hidden && $("settings").contains(document.activeElement)) panel(false);
    else stop();
  });
  $("new").addEventListener("click", () => { stop(); conversation = fresh(); shown(); drawer(false); $("prompt").focus(); });
  $("blind").addEventListener("click", () => { stop(); conversation = fresh(blind() ? "talk" : "blind"); shown(); $("prompt").focus(); });
  $("export").addEventListener("click", () => download("conversation.json", { version: 1, conversations: [exported(conversation)] }));
  $("export-all").addEventListener("click", () => download("conversations.json", { version: 1, conversations: store.conversations().map(exported) }));
  $("open-list").addEventListener("click", () => drawer(true));
  $("open-settings").addEventListener("click", () => panel($("settings").hidden));
  $("close-settings").addEventListener("click", () => panel(false));
  $("shade").addEventListener("click", () => { drawer(false); panel(false); });
  narrow.addEventListener("change", shade);
  $("theme").addEventListener("click", () => {
    const dark = $("theme").getAttribute("aria-pressed") !== "true";
    store.keepTheme(dark);
    theme(dark);
  });
  $("log").addEventListener("scroll", () => { tokens.unhint(); });
  theme(store.theme());
  start().then(() => { if (!matchMedia("(pointer: coarse)").matches && $("notice").hidden) $("prompt").focus(); });
})();
