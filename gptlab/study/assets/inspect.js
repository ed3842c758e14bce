// The inspection page: the text and its loss, what each layer would say, and what is chosen, which every part follows.
const data = JSON.parse($("data").textContent);
const { tokens, pieces } = data;
const count = tokens.length;
const [firstLayer, firstHead] = data.attention.first ?? [0, 0];
const chosen = { place: data.place, layer: firstLayer, head: firstHead, unit: null };
const followers = [];
/** What is drawn again when another place or head is chosen. */
const follow = (draw) => { followers.push(draw); };
function choose(change) {
  Object.assign(chosen, change);
  for (const draw of followers) draw(change);
}

// --- tokens as text ---------------------------------------------------------------------------------------------------

const piece = (place) => pieces[tokens[place]];
/** A token with what cannot be seen made visible. */
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
const word = (text) => el("span", { className: "word", title: visible(text) }, visible(text));
const percent = (p) => (p >= 0.9995 ? "100 %" : p >= 0.1 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toPrecision(2)} %`);
/** The page's colour at a strength from 0 to 1, under text that stays readable. */
const shade = (strength, name = "--accent") => `color-mix(in srgb, var(${name}) ${Math.round(55 * Math.min(1, Math.max(0, strength)))}%, transparent)`;
const u1 = (text, scale = 1) => Float64Array.from(bytes(text), (v) => (v / 255) * scale);
/** A share that was kept as the root of it, in 255 steps. */
const rooted = (text) => Float64Array.from(bytes(text), (v) => (v / 255) ** 2);
const u2 = (text) => new Uint16Array(bytes(text).buffer);
const u4 = (text) => new Uint32Array(bytes(text).buffer);
const f4 = (text) => new Float32Array(bytes(text).buffer);

/** Rows of a token, a bar and a figure. */
function bars(rows, full) {
  return rows.map(({ text, place, share, told, right, title }) => {
    const bar = el("span", { className: "bar" });
    bar.style.width = `${Math.max(0, Math.min(100, (100 * share) / full))}%`;
    return el("div", { className: `guess${right ? " right" : ""}`, title: title ?? "" }, el("span", {}, word(text), place === undefined ? "" : ` (${place})`), el("span", {}, bar), el("span", {}, told));
  });
}

/** Arrow keys go from one of `items` to another; `columns`: how many stand in a row. Home and End too. */
function arrows(box, items, columns, go) {
  box.addEventListener("keydown", (event) => {
    const at = items().indexOf(document.activeElement);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? items().length - 1 : step ? at + step : null;
    if (at < 0 || to === null || to < 0 || to >= items().length) return;
    event.preventDefault();
    items()[to].focus();
    go(to);
  });
}

// --- the text -----------------------------------------------------------------------------------------------------------

const loss = f4(data.loss); // of token i + 1, after token i
const guessed = { piece: u4(data.guesses.piece), p: f4(data.guesses.p), k: data.guesses.k };

function textView() {
  const box = $("text");
  const made = tokens.map((_, i) => {
    const text = piece(i);
    const shown = el("button", { type: "button", className: "token", tabIndex: i === chosen.place ? 0 : -1 });
    shown.setAttribute("role", "option");
    shown.append(text === "" ? "∅" : text.replace(/\n/g, "⏎"));
    shown.addEventListener("click", () => choose({ place: i }));
    box.append(shown);
    if (text.includes("\n")) box.append(el("br"));
    return shown;
  });
  const perRow = () => {
    const top = made[0].offsetTop, second = made.findIndex((one) => one.offsetTop > top + 4);
    return second < 0 ? made.length : second;
  };
  arrows(box, () => made, perRow, (to) => choose({ place: to }));
  const ways = { loss: "loss of the token, nats" };
  if (data.attention.layers.length) ways.attention = "attention from the chosen token by the chosen head";
  if (data.neurons.layers.length) ways.unit = "activation of the chosen neuron";
  $("colouring").append(...Object.entries(ways).map(([value, text]) => el("option", { value }, text)));
  const most = Math.max(...loss, 1e-9);
  const mark = () => made.forEach((one, i) => {
    one.setAttribute("aria-selected", String(i === chosen.place));
    one.tabIndex = i === chosen.place ? 0 : -1;
  });
  const paint = async () => {
    const way = $("colouring").value;
    let of = (i) => (i ? loss[i - 1] / most : 0);
    let high = `${most.toFixed(2)} nats`;
    if (way === "attention") {
      const { layer, head, place } = chosen, row = await attentionRow(layer, head, place);
      of = (i) => (i <= place ? Math.sqrt(row[i]) : 0);
      high = "1 (√ scale)";
    } else if (way === "unit" && chosen.unit) {
      const { prompt, high: top } = chosen.unit, values = u1(prompt.u1, 1);
      of = (i) => values[i] * (prompt.high / Math.max(top, prompt.high, 1e-9));
      high = short(Math.max(top, prompt.high));
    }
    $("scale-low").textContent = "0";
    $("scale-high").textContent = high;
    made.forEach((one, i) => {
      one.style.background = shade(of(i));
      one.title = `token ${i}: ${visible(piece(i))}${i ? `, loss ${loss[i - 1].toFixed(3)} nats` : ", nothing before it to tell it from"}`;
    });
  };
  $("colouring").addEventListener("input", paint);
  follow((change) => { if ("place" in change) { mark(); guesses(); } if ($("colouring").value !== "loss") paint(); });
  mark();
  guesses();
  paint();
}
function guesses() {
  const i = chosen.place, next = i + 1 < count ? piece(i + 1) : null;
  const rows = Array.from({ length: guessed.k }, (_, n) => {
    const at = i * guessed.k + n, id = guessed.piece[at];
    return { text: pieces[id], share: guessed.p[at], told: percent(guessed.p[at]), right: i + 1 < count && id === tokens[i + 1] };
  });
  const told = next === null ? "the text ends here" : `then comes ${visible(next)}, loss ${loss[i].toFixed(3)} nats (${percent(Math.exp(-loss[i]))})`;
  $("guesses").replaceChildren(el("h3", {}, `After token ${i}, ${visible(piece(i))}: ${told}`), ...bars(rows, 1));
}

// --- the lens -----------------------------------------------------------------------------------------------------------

function lensView() {
  const { kinds, labels, note } = data.lens;
  $("lens-note").textContent = note;
  $("lens-kind").append(...Object.keys(kinds).map((name) => el("option", { value: name }, name)));
  const cells = [];
  const head = el("tr", {}, el("th", { scope: "col" }, "after"), ...tokens.map((_, i) => el("th", { scope: "col", className: "cell" }, visible(piece(i)))));
  const rows = labels.map((label, layer) => {
    cells[layer] = tokens.map((_, i) => el("td", { className: "cell" }));
    return el("tr", {}, el("th", { scope: "row" }, label), ...cells[layer]);
  }).reverse(); // the last layer on top, as the stream rises
  const table = el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (cell) choose({ place: cell.cellIndex - 1 });
  });
  const decoded = {};
  const read = (name) => (decoded[name] ??= { top: u4(kinds[name].top), p: rooted(kinds[name].p), next: rooted(kinds[name].next) });
  const paint = () => {
    const name = $("lens-kind").value, now = read(name), by = $("lens-colour").value;
    cells.forEach((row, layer) => row.forEach((cell, i) => {
      const at = layer * count + i;
      cell.textContent = visible(pieces[now.top[at]]);
      cell.style.background = shade(by === "p" ? now.p[at] : i + 1 < count ? now.next[at] : 0);
      cell.classList.toggle("right", i + 1 < count && now.top[at] === tokens[i + 1]);
      const next = i + 1 < count ? `; ${visible(piece(i + 1))}, which follows: ${percent(now.next[at])}` : "";
      cell.title = `${labels[layer]}, after token ${i} ${visible(piece(i))}: ${visible(pieces[now.top[at]])} ${percent(now.p[at])}${next}`;
    }));
    tell();
  };
  let marked = [];
  const tell = () => {
    const now = read($("lens-kind").value), i = chosen.place, last = now.top[(labels.length - 1) * count + i];
    const first = labels.findIndex((_, layer) => labels.slice(layer).every((__, more) => now.top[(layer + more) * count + i] === last));
    $("lens-told").textContent = `After token ${i}, ${visible(piece(i))}, the model says ${visible(pieces[last])}; so it does from ${labels[first]} on. Underlined: the token that follows.`;
    for (const cell of marked) cell.classList.remove("chosen");
    marked = [...cells.map((row) => row[i]), head.children[i + 1]];
    for (const cell of marked) cell.classList.add("chosen");
  };
  for (const id of ["lens-kind", "lens-colour"]) $(id).addEventListener("input", paint);
  const reveal = () => {
    const box = $("lens"), { offsetLeft: left, offsetWidth: wide } = marked[0];
    if (left < box.scrollLeft + 80 || left + wide > box.scrollLeft + box.clientWidth) box.scrollLeft = left - box.clientWidth / 2;
  };
  follow((change) => {
    if (!("place" in change)) return;
    tell();
    reveal();
  });
  paint();
  $("lens").append(table);
  reveal();
}
