
// A small helper: elements, with text as text.
function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const $ = (id) => document.getElementById(id);
const say = (text) => { $("status").textContent = text; };

// The tokens of an answer: each with its probability on hover, and what could have stood there on click.
const tokens = (() => {
  const shown = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const share = (logprob) => {
    const p = 100 * Math.exp(logprob);
    return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(1)} %` : p >= 0.01 ? `${p.toFixed(2)} %` : "below 0.01 %";
  };
  const level = (logprob) => (logprob >= Math.log(0.5) ? 4 : logprob >= Math.log(0.1) ? 3 : logprob >= Math.log(0.02) ? 2 : 1);

  function span(token) {
    const made = el("span", { textContent: token.text });
    if (token.logprob !== null && token.logprob !== undefined) {
      made.className = `t p${level(token.logprob)}${token.chosen ? " chosen" : ""}`;
      made.token = token;
    }
    return made;
  }

  function place(box, anchor) {
    box.hidden = false;
    const at = anchor.getClientRects()[0] || anchor.getBoundingClientRect(), room = 8;
    const left = Math.min(Math.max(room, at.left), innerWidth - box.offsetWidth - room);
    const above = at.top - box.offsetHeight - 6;
    const below = Math.min(at.bottom + 6, innerHeight - box.offsetHeight - room);
    box.style.left = `${left}px`;
    box.style.top = `${box.id === "tip" ? (above >= room ? above : below) : (at.bottom + 6 + box.offsetHeight <= innerHeight - room || above < room ? below : above)}px`;
  }

  function hint(of) {
    const rank = of.token.top.findIndex((one) => one.id === of.token.id);
    $("tip").textContent = `${shown(of.token.token)}  ${share(of.token.logprob)}${rank > 0 ? `, rank ${rank + 1}` : ""}`;
    place($("tip"), of);
  }
  const unhint = () => { $("tip").hidden = true; };

  let back = null; // where the focus goes when the alternatives close
  function close(refocus = true) {
    if ($("choices").hidden) return;
    $("choices").hidden = true;
    if (refocus) back?.focus();
  }

  function choose(of, box, chosen) {
    const token = of.token, drawn = { id: token.id, token: token.token, logprob: token.logprob };
    const list = token.top.some((one) => one.id === token.id) ? token.top : [...token.top, drawn];
    const buttons = list.map((one) => {
      const bar = el("span", { className: "share" });
      bar.style.width = `calc(${100 * Math.exp(one.logprob)}% - 4px)`;
      const button = el("button", { type: "button", on: { click: () => { close(); chosen(token, one); } } },
        bar, el("span", { className: "word", textContent: shown(one.token) }), el("span", { className: "number", textContent: share(one.logprob) }));
      if (one.id === token.id) button.setAttribute("aria-current", "true");
      return button;
    });
    const about = token.top.length ? "Choose what stands here; the answer goes on from it." : "The alternatives of this token are not kept any more.";
    $("choices").replaceChildren(el("p", { className: "quiet", textContent: about }), ...buttons);
    unhint();
    place($("choices"), of);
    back = box;
    (buttons.find((b) => b.hasAttribute("aria-current")) || buttons[0])?.focus();
  }

  // `chosen(token, alternative)`; the box is one stop of the keyboard, arrows go through its tokens.
  function wire(box, chosen) {
    const all = () => [...box.querySelectorAll(".t")];
    let here = null;
    const go = (to) => {
      here?.classList.remove("here");
      here = to;
      if (!to) return unhint();
      to.classList.add("here");
      to.scrollIntoView({ block: "nearest" });
      hint(to);
      say(`${shown(to.token.token)}, ${share(to.token.logprob)}`);
    };
    box.addEventListener("pointerover", (event) => { if (event.target.token && event.pointerType !== "touch") hint(event.target); });
    box.addEventListener("pointerout", unhint);
    box.addEventListener("blur", () => { if ($("choices").hidden) go(null); }); // it comes back when they close
    box.addEventListener("focus", () => { if (here?.isConnected) hint(here); });
    box.addEventListener("click", (event) => {
      if (event.target.token && getSelection().isCollapsed) choose(event.target, box, chosen);
    });
    box.addEventListener("keydown", (event) => {
      const list = all(), i = list.indexOf(here);
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: list.length - 1 }[event.key];
      if (to !== undefined && list.length) {
        event.preventDefault();
        go(list[Math.min(Math.max(to, 0), list.length - 1)]);
      } else if ((event.key === "Enter" || event.key === " ") && here) {
        event.preventDefault();
        choose(here, box, chosen);
      }
    });
  }

  $("choices").addEventListener("keydown", (event) => {
    const list = [...$("choices").querySelectorAll("button")], i = list.indexOf(document.activeElement);
    const to = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: list.length - 1 }[event.key];
    if (event.key === "Tab") close();
    else if (to !== undefined) {
      event.preventDefault();
      list[Math.min(Math.max(to, 0), list.length - 1)]?.focus();
    }
  });
  document.addEventListener("pointerdown", (event) => {
    if (!$("choices").contains(event.target)) close(false);
  });

  return { span, wire, close, unhint };
})();
