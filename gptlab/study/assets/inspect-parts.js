// What wrote the logit, how large everything is, which units fire on what, and how embeddings lie.
const repainters = []; // what is painted anew when the theme or the width changes

// --- direct logit attribution -------------------------------------------------------------------------------------------

function attributionView() {
  if (!data.attribution.components) {
    $("attribution-note").textContent = data.attribution.note;
    $("attribution").remove();
    $("s-attribution").querySelector(".scale").remove();
    return;
  }
  const { components, layers, target, note } = data.attribution, values = f4(data.attribution.values), logits = f4(data.attribution.logit);
  const n = components.length;
  const at = (place, i) => values[place * n + i];
  const heads = Math.max(0, ...components.map((c) => (c.kind === "head" ? c.head + 1 : 0)));
  const columns = [...Array.from({ length: heads }, (_, h) => `head ${h}`), ...data.attribution.columns];
  const index = new Map(components.map((c, i) => [`${c.layer} ${c.kind === "head" ? `head ${c.head}` : c.kind}`, i]));
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
  const draw = () => {
    const i = chosen.place, aim = visible(pieces[target[i]]);
    const most = Math.max(1e-9, ...components.map((_, c) => Math.abs(at(i, c))));
    const cell = (key) => {
      const c = index.get(key);
      if (c === undefined) return el("td", {}, "");
      const value = at(i, c), made = el("td", { title: `${components[c].name}: ${value.toFixed(4)}` }, signed(value));
      made.style.background = shade(Math.abs(value) / most, value < 0 ? "--worse" : "--accent");
      return made;
    };
    const sum = (pick) => components.reduce((total, c, k) => total + (pick(c) ? at(i, k) : 0), 0);
    const rows = layers.map((layer) => el("tr", {}, el("th", { scope: "row" }, `layer ${layer}`), el("td", {}, signed(sum((c) => c.layer === layer))),
      ...columns.map((name) => cell(`${layer} ${name}`)))).reverse();
    const rest = components.filter((c) => c.layer === null).map((c) => el("tr", {}, el("th", { scope: "row" }, c.kind),
      cell(`null ${c.kind}`), ...columns.map(() => el("td", {}, ""))));
    const top = el("tr", {}, el("th", { scope: "col" }, "written by"), el("th", { scope: "col" }, "sum"), ...columns.map((c) => el("th", { scope: "col" }, c)));
    $("attribution-note").textContent = `${note} After token ${i}, ${visible(piece(i))}: the logit of ${aim}` +
      `${i + 1 < count ? ", which follows" : ", the model's guess"}, is ${logits[i].toFixed(3)}; the parts below add up to ${sum(() => true).toFixed(3)}.`;
    $("attribution").replaceChildren(el("table", {}, el("thead", {}, top), el("tbody", {}, ...rows, ...rest)));
    $("attribution-low").textContent = `−${most.toFixed(2)}`;
    $("attribution-high").textContent = `+${most.toFixed(2)}`;
  };
  follow((change) => { if ("place" in change) draw(); });
  draw();
}

// --- norms ----------------------------------------------------------------------------------------------------------------

/** Lines over the layers: each the mean over the tokens, in a band from the lowest to the highest, and a dot for the chosen token. */
function chart(box, series, xs, xLabel, yLabel, place) {
  const width = Math.max(300, box.clientWidth), height = 300, left = 56, right = width - 12, top = 10, bottom = height - 44;
  const values = series.flatMap((s) => s.rows.flatMap((row) => [Math.min(...row), Math.max(...row)])).filter((v) => v > 0);
  const low = Math.log10(Math.min(...values)), high = Math.log10(Math.max(...values) * 1.1), span = high - low || 1;
  const X = (i) => left + ((i + 0.5) / xs.length) * (right - left), Y = (v) => bottom - ((Math.log10(Math.max(v, 10 ** low)) - low) / span) * (bottom - top);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${yLabel} over ${xLabel}` });
  const text = (x, y, what, more = {}) => drawn.append(svg("text", { x, y, fill: css("--quiet"), "font-size": 12, ...more }, what));
  const marks = [];
  for (let power = Math.floor(low); power <= high; power += 1) for (const lead of span < 1.5 ? [1, 2, 5] : [1, 3]) marks.push(lead * 10 ** power);
  for (const mark of marks.filter((m) => Math.log10(m) >= low && Math.log10(m) <= high)) {
    drawn.append(svg("line", { x1: left, x2: right, y1: Y(mark), y2: Y(mark), stroke: css("--line") }));
    text(left - 7, Y(mark) + 4, String(Number(mark.toPrecision(2))), { "text-anchor": "end" });
  }
  const every = Math.ceil(xs.length / Math.max(2, Math.floor((right - left) / 42)));
  xs.forEach((name, i) => { if (i % every === 0) text(X(i), bottom + 17, name, { "text-anchor": "middle" }); });
  text(right, bottom + 36, xLabel, { "text-anchor": "end" });
  text(left, bottom + 36, `${yLabel}, log scale`);
  series.forEach(({ rows, from }, s) => {
    const ink = (dark() ? DARK : LIGHT)[s % LIGHT.length];
    const points = rows.map((row, i) => [X(i + from), row]);
    const line = (f) => points.map(([x, row]) => `${x},${Y(f(row))}`);
    const mean = (row) => row.reduce((a, b) => a + b, 0) / row.length;
    drawn.append(svg("polygon", { points: [...line((r) => Math.max(...r)), ...line((r) => Math.min(...r)).reverse()].join(" "), fill: ink, opacity: 0.15 }));
    drawn.append(svg("polyline", { points: line(mean).join(" "), fill: "none", stroke: ink, "stroke-width": 2 }));
    for (const [x, row] of points) {
      drawn.append(svg("circle", { cx: x, cy: Y(row[place]), r: 3.5, fill: css("--paper"), stroke: ink, "stroke-width": 1.5 }));
    }
  });
  const keys = series.map(({ name }, s) => {
    const mark = svg("svg", { viewBox: "0 0 28 10", class: "swatch", "aria-hidden": "true" });
    mark.append(svg("line", { x1: 0, x2: 28, y1: 5, y2: 5, "stroke-width": 3, stroke: (dark() ? DARK : LIGHT)[s % LIGHT.length] }));
    return el("span", {}, mark, name);
  });
  box.replaceChildren(el("div", { className: "keys" }, ...keys), drawn);
}
function normsView() {
  const { labels, series, note } = data.norms;
  const read = series.map(({ name, from, values, layers }) => {
    const all = f4(values);
    return { name, from, rows: Array.from({ length: layers }, (_, i) => [...all.subarray(i * count, (i + 1) * count)]) };
  });
  const draw = () => {
    $("norms-note").textContent = `${note} Lines: mean over the tokens, in a band from the lowest to the highest. Circles: token ${chosen.place}, ${visible(piece(chosen.place))}.`;
    chart($("norms"), read, labels, "layer", "length of the vector (L2 norm)", chosen.place);
  };
  repainters.push(draw);
  follow((change) => { if ("place" in change) draw(); });
  draw();
}

// --- neurons --------------------------------------------------------------------------------------------------------------

function neuronsView() {
  const { layers, note, nothing } = data.neurons;
  $("neurons-note").textContent = note;
  if (!layers.length) {
    $("neuron-layer").closest(".controls").remove();
    return;
  }
  $("neuron-layer").append(...layers.map((one, i) => el("option", { value: i }, String(one.layer))));
  const units = () => layers[$("neuron-layer").value].units;
  const fill = () => {
    $("neuron-unit").replaceChildren(...units().map((one, i) => el("option", { value: i }, String(one.unit))));
    draw();
  };
  const coloured = (ids, values, high) => ids.map((id, i) => {
    const text = pieces[id], shown = el("span", { className: "token", title: `${visible(text)}: ${short(values[i])}` }, text.replace(/\n/g, "⏎"));
    shown.style.background = shade(values[i] / high);
    return shown;
  });
  const draw = () => {
    const unit = units()[$("neuron-unit").value], high = Math.max(unit.high, unit.prompt.high, 1e-9);
    $("neuron-high").textContent = `${short(high)}, activation`;
    const own = u1(unit.prompt.u1, unit.prompt.high);
    const snippet = (title, ids, values) => el("div", { className: "snippet" }, el("h3", {}, title), ...coloured(ids, values, high));
    const told = unit.texts.map((text) => snippet(`${text.where}: up to ${short(text.high)}`, text.tokens, u1(text.u1, text.high)));
    if (!told.length && nothing) told.push(el("p", { className: "quiet" }, nothing));
    $("neurons").replaceChildren(snippet(`this text: up to ${short(unit.prompt.high)}`, tokens, own), ...told);
    choose({ unit });
  };
  $("neuron-layer").addEventListener("input", fill);
  $("neuron-unit").addEventListener("input", draw);
  fill();
}

// --- embeddings -----------------------------------------------------------------------------------------------------------

function neighboursView() {
  const { near, analogies, note } = data.neighbours, of = new Map(near.map((one) => [one.token, one.near]));
  $("neighbours-note").textContent = note;
  const draw = () => {
    const places = [...new Set([chosen.place, ...tokens.keys()].map((i) => tokens[i]))].filter((id) => of.has(id)).slice(0, 6);
    const lines = places.map((id) => [{ text: word(pieces[id]) }, ...of.get(id).map(([other, cosine]) => ({ text: el("span", {}, word(pieces[other]), ` ${cosine.toFixed(2)}`) }))]);
    $("neighbours").replaceChildren(tableOf(["token", ...(of.get(places[0]) ?? []).map((_, i) => `${i + 1}.`)], lines, new Set(Array.from({ length: 20 }, (_, i) => i + 1))));
  };
  follow((change) => { if ("place" in change) draw(); });
  draw();
  if (!analogies.length) return;
  const lines = analogies.map((one) => [one.asked, ...one.near.map(([other, cosine]) => ({ text: el("span", {}, word(pieces[other]), ` ${cosine.toFixed(2)}`) }))]);
  $("analogies").append(el("h3", {}, "Analogies"), tableOf(["asked", ...analogies[0].near.map((_, i) => `${i + 1}.`)], lines, new Set(Array.from({ length: 20 }, (_, i) => i + 1))));
}
function positionsView() {
  const { note, n, step, matrix, bias } = data.positions;
  $("positions-note").textContent = note;
  if (matrix) {
    const values = u1(matrix), canvas = el("canvas", { width: n, height: n, role: "img" });
    canvas.setAttribute("aria-label", "cosine similarity of position embeddings");
    const told = el("p", { className: "quiet", role: "status" }, `Down and across: positions 0 to ${(n - 1) * step}. Colour: cosine, from `);
    const legend = el("div", { className: "scale" }, el("span", {}, "−1"), el("span", { className: "ramp strong" }), el("span", {}, "1, cosine"), el("span", { id: "position-told" }));
    const draw = () => {
      const rgb = (name) => css(name).match(/[0-9a-f]{2}/gi).map((v) => parseInt(v, 16)), from = rgb("--paper"), to = rgb("--deep");
      const pen = canvas.getContext("2d"), image = pen.createImageData(n, n);
      values.forEach((v, i) => {
        for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = from[c] + (to[c] - from[c]) * v;
        image.data[4 * i + 3] = 255;
      });
      pen.putImageData(image, 0, 0);
    };
    canvas.addEventListener("pointermove", (event) => {
      const cell = canvas.clientWidth / n, i = Math.min(n - 1, Math.floor(event.offsetY / cell)), j = Math.min(n - 1, Math.floor(event.offsetX / cell));
      if (i >= 0 && j >= 0) $("position-told").textContent = `positions ${i * step} and ${j * step}: ${(2 * values[i * n + j] - 1).toFixed(2)}`;
    });
    told.textContent = `Down and across: positions 0 to ${(n - 1) * step}.`;
    $("positions").append(canvas, told, legend);
    repainters.push(draw);
    draw();
  }
  if (bias) {
    const columns = f4(bias.values), head = ["head", ...bias.distances.map((d) => `${d} back`)];
    const lines = Array.from({ length: bias.heads }, (_, h) => [String(h), ...bias.distances.map((_, i) => columns[h * bias.distances.length + i].toFixed(2))]);
    $("positions").append(el("div", { className: "scroll" }, tableOf(head, lines)));
  }
}

// --- the whole ------------------------------------------------------------------------------------------------------------

$("summary").textContent = data.summary;
$("remarks").append(...data.remarks.map(({ text, warn }) => el("li", { className: warn ? "warn" : "" }, text)));
$("made").textContent = data.made;
for (const part of [textView, lensView, attentionView, attributionView, normsView, neuronsView, neighboursView, positionsView]) part();
const repaint = () => { for (const draw of repainters) draw(); };
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  repaint();
});
window.addEventListener("resize", repaint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
document.documentElement.dataset.ready = "true";
