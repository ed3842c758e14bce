// Attention: every head's pattern as a small picture, one of them large, and the heads that do one thing.
const SIDE = { left: 64, top: 6, right: 8, bottom: 58 };
const patterns = new Map(); // layer -> promise of { heads, row(head, query) }

/** A layer's patterns: the lower triangles, in steps of the root of a weight, deflated. */
function layerPatterns(number) {
  if (!patterns.has(number)) patterns.set(number, unpack(data.attention.layers[number]));
  return patterns.get(number);
}
async function unpack({ data: text, heads }) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = (count * (count + 1)) / 2, steps = data.attention.steps;
  const weight = Float32Array.from({ length: steps + 1 }, (_, v) => (v / steps) ** 2);
  return { heads, level: (head, q, k) => raw[head * size + (q * (q + 1)) / 2 + k], weight: (level) => weight[level] };
}
async function attentionRow(layer, head, query) {
  const found = await layerPatterns(layer);
  return Array.from({ length: query + 1 }, (_, k) => found.weight(found.level(head, query, k)));
}
/** The colours of the steps, as RGB. */
function inks() {
  const rgb = (name) => css(name).match(/[0-9a-f]{2}/gi).map((v) => parseInt(v, 16));
  const from = rgb("--paper"), to = rgb("--deep"), steps = data.attention.steps;
  return Array.from({ length: steps + 1 }, (_, v) => from.map((c, i) => c + (to[i] - c) * (v / steps)));
}
function picture(found, head, canvas) {
  canvas.width = canvas.height = count;
  const pen = canvas.getContext("2d"), image = pen.createImageData(count, count), ink = inks();
  for (let q = 0; q < count; q += 1) {
    for (let k = 0; k <= q; k += 1) {
      const [r, g, b] = ink[found.level(head, q, k)], at = 4 * (q * count + k);
      image.data[at] = r; image.data[at + 1] = g; image.data[at + 2] = b; image.data[at + 3] = 255;
    }
  }
  pen.putImageData(image, 0, 0);
}
const headName = (layer, head) => `layer ${data.attention.layers[layer].layer}, head ${head}`;
const SCORES = { previous: "previous token", duplicate: "same token before", induction: "induction" };

function attentionView() {
  const { layers, note, scores } = data.attention;
  $("attention-note").textContent = note;
  if (!layers.length) {
    for (const id of ["enlarged", "heads", "h-strongest", "strongest"]) $(id).remove();
    return;
  }
  const all = [];
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watch.unobserve(entry.target);
      drawLayer(Number(entry.target.dataset.layer));
    }
  }, { rootMargin: "400px" });
  const drawn = new Set();
  const drawLayer = async (number) => {
    drawn.add(number);
    const found = await layerPatterns(number);
    for (const { canvas, head } of all.filter((one) => one.layer === number)) picture(found, head, canvas);
  };
  layers.forEach((told, layer) => {
    const thumbs = Array.from({ length: told.heads }, (_, head) => {
      const canvas = el("canvas"), kind = strongestKind(scores, layer, head);
      const button = el("button", { type: "button", className: "thumb", tabIndex: -1, title: `${headName(layer, head)}: ${allScores(scores, layer, head)}` },
        canvas, `${head}${kind ? ` ${kind}` : ""}`);
      button.setAttribute("aria-label", headName(layer, head));
      button.addEventListener("click", () => choose({ layer, head }));
      all.push({ layer, head, canvas, button });
      return button;
    });
    const row = el("div", { className: "layer" }, el("span", {}, `layer ${told.layer}`), el("div", { className: "thumbs" }, ...thumbs));
    row.dataset.layer = layer;
    $("heads").append(row);
    watch.observe(row);
  });
  const buttons = all.map((one) => one.button);
  arrows($("heads"), () => buttons, () => layers[0].heads, (to) => choose({ layer: all[to].layer, head: all[to].head }));
  const mark = () => all.forEach(({ layer, head, button }) => {
    const on = layer === chosen.layer && head === chosen.head;
    button.setAttribute("aria-pressed", String(on));
    button.tabIndex = on ? 0 : -1;
  });
  follow((change) => { if ("head" in change || "layer" in change) mark(); enlarge(); });
  mark();
  pointing();
  enlarge();
  repainters.push(() => { enlarge(); drawn.forEach(drawLayer); });
  strongest(scores);
}
/** Of a head that does one thing: which. */
function strongestKind(scores, layer, head) {
  const found = Object.entries(SCORES).filter(([name]) => scores[name]?.[layer]?.[head] >= 0.3).sort((a, b) => scores[b[0]][layer][head] - scores[a[0]][layer][head]);
  return found.length ? { previous: "prev", duplicate: "dup", induction: "ind" }[found[0][0]] : "";
}
const allScores = (scores, layer, head) => Object.entries(SCORES).filter(([name]) => scores[name])
  .map(([name, told]) => `${told} ${scores[name][layer][head].toFixed(2)}`).join(", ");
function strongest(scores) {
  const names = Object.keys(SCORES).filter((name) => scores[name]);
  const every = data.attention.layers.flatMap((told, layer) => Array.from({ length: told.heads }, (_, head) => ({ layer, head })));
  const best = new Set(names.flatMap((name) => [...every].sort((a, b) => scores[name][b.layer][b.head] - scores[name][a.layer][a.head]).slice(0, 3)));
  const lines = [...best].map(({ layer, head }) => {
    const button = el("button", { type: "button" }, headName(layer, head));
    button.addEventListener("click", () => { choose({ layer, head }); $("enlarged").scrollIntoView({ block: "nearest" }); });
    return [{ text: button }, ...names.map((name) => scores[name][layer][head].toFixed(3)), scores.entropy[layer][head].toFixed(2)];
  });
  $("strongest").append(tableOf(["head", ...names.map((name) => SCORES[name]), "entropy, nats"], lines), el("p", { className: "quiet" }, scores.note));
}

// --- the large one ------------------------------------------------------------------------------------------------------

let cursor = null; // [query, key]
let frame = null; // where the pattern lies on the canvas
async function enlarge() {
  const { layer, head, place } = chosen, found = await layerPatterns(layer);
  const canvas = $("pattern"), ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || 320;
  const cell = (width - SIDE.left - SIDE.right) / count, height = SIDE.top + cell * count + SIDE.bottom;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.aspectRatio = `${width} / ${height}`;
  frame = { cell, width, height };
  const pen = canvas.getContext("2d"), small = el("canvas");
  pen.scale(ratio, ratio);
  picture(found, head, small);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, SIDE.left, SIDE.top, cell * count, cell * count);
  pen.strokeStyle = css("--line");
  pen.strokeRect(SIDE.left, SIDE.top, cell * count, cell * count);
  pen.strokeStyle = css("--worse");
  pen.strokeRect(SIDE.left, SIDE.top + place * cell, cell * count, Math.max(cell, 1));
  axis(pen, cell);
  if (cursor) {
    pen.strokeStyle = css("--ink");
    pen.strokeRect(SIDE.left + cursor[1] * cell - 0.5, SIDE.top + cursor[0] * cell - 0.5, Math.max(cell, 2) + 1, Math.max(cell, 2) + 1);
  }
  $("head-name").textContent = `${headName(layer, head)}: ${allScores(data.attention.scores, layer, head)}`;
  canvas.setAttribute("aria-label", `attention of ${headName(layer, head)}, ${count} tokens; arrow keys read single weights`);
  const row = await attentionRow(layer, head, place);
  const most = row.map((weight, k) => ({ weight, k })).sort((a, b) => b.weight - a.weight).slice(0, 6);
  $("head-told").replaceChildren(el("h3", {}, `From token ${place}, ${visible(piece(place))} (the marked row), to`),
    ...bars(most.map(({ weight, k }) => ({ text: piece(k), place: k, share: weight, told: percent(weight) })), 1));
}
function axis(pen, cell) {
  pen.font = "11px ui-monospace, monospace";
  pen.fillStyle = css("--quiet");
  const every = Math.max(1, Math.ceil(13 / cell)), step = [1, 2, 4, 8, 16, 32, 64].find((n) => n >= every) ?? every;
  for (let i = 0; i < count; i += step) {
    const text = `${visible(piece(i)).slice(0, 6)} ${i}`, at = (i + 0.5) * cell;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillText(text, SIDE.left - 5, SIDE.top + at);
    pen.save();
    pen.translate(SIDE.left + at, SIDE.top + cell * count + 5);
    pen.rotate(-Math.PI / 2);
    pen.fillText(text, 0, 0);
    pen.restore();
  }
}
function pointing() {
  const canvas = $("pattern");
  const show = async (at) => {
    cursor = at;
    await enlarge();
    const tip = $("tip");
    tip.hidden = !at;
    if (!at) return;
    const [q, k] = at, { layer, head } = chosen, found = await layerPatterns(layer);
    const weight = k <= q ? found.weight(found.level(head, q, k)) : 0;
    tip.textContent = `${visible(piece(q))} (${q}) attends to ${visible(piece(k))} (${k}): ${weight.toFixed(weight < 0.1 ? 4 : 3)}`;
    const x = SIDE.left + k * frame.cell + 14, room = frame.width - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(x, room))}px`;
    tip.style.top = `${Math.max(0, SIDE.top + q * frame.cell - 34)}px`;
  };
  const under = (event) => {
    const q = Math.floor((event.offsetY - SIDE.top) / frame.cell), k = Math.floor((event.offsetX - SIDE.left) / frame.cell);
    return q >= 0 && k >= 0 && q < count && k <= q ? [q, k] : null;
  };
  canvas.addEventListener("pointermove", (event) => show(under(event)));
  canvas.addEventListener("pointerleave", () => show(null));
  canvas.addEventListener("blur", () => show(null));
  canvas.addEventListener("click", (event) => { const at = under(event); if (at) choose({ place: at[0] }); });
  canvas.addEventListener("keydown", (event) => {
    const [dq, dk] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if (event.key === "Escape") show(null);
    if (event.key === "Enter" && cursor) choose({ place: cursor[0] });
    if (!dq && !dk) return;
    event.preventDefault();
    const [q, k] = cursor ?? [chosen.place, 0], to = Math.min(count - 1, Math.max(0, q + dq));
    show([to, Math.min(to, Math.max(0, k + dk))]);
  });
}
