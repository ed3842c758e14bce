(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { comparison, arms, axes } = data;
  const rows = comparison.rows;

  // --- numbers --------------------------------------------------------------------------------------------------------

  const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);
  function duration(seconds) {
    if (seconds < 100) return `${seconds.toFixed(1)} s`;
    return seconds < 6000 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }
  function difference(row) {
    if (row.baseline) return "baseline";
    if (!row.difference) return "no common seed";
    return signed(row.difference.mean) + (row.difference.half === null ? "" : ` ± ${row.difference.half.toFixed(4)}`);
  }

  // --- colours: Okabe & Ito's, the baseline in the page's ink -------------------------------------------------------------

  const DASHES = [[], [7, 4], [2, 3], [8, 3, 2, 3]];
  const colour = (i) => (i === 0 ? css("--ink") : (dark() ? DARK : LIGHT)[(i - 1) % LIGHT.length]);
  const dash = (i) => DASHES[i % DASHES.length]; // a line that lies on another is still seen

  // --- tables -----------------------------------------------------------------------------------------------------------

  const WORDS = { better: "better", worse: "worse", same: "no difference", undecided: "undecided", none: "" };
  function verdictTable() {
    if (!rows.length) {
      $("s-verdict").remove();
      $("summary").textContent = "no run is finished yet";
      return;
    }
    const extra = [...new Set(rows.flatMap((r) => Object.keys(r.extra)))].sort();
    const head = ["arm", "seeds", comparison.metric, "difference, 95 %", "verdict", "parameters", "steps", "tokens", "FLOPs",
      "time", "tokens/s", "peak memory", ...extra];
    const lines = rows.map((r) => {
      const kind = r.verdict?.kind ?? "none";
      return [r.label, String(r.seeds.length), r.loss.mean.toFixed(4), { text: difference(r), className: kind },
        { text: WORDS[kind] ?? kind, className: kind }, whole(r.parameters), whole(r.steps), short(r.tokens), short(r.flops),
        duration(r.seconds), whole(r.tokens_per_second), `${short(r.peak_memory)}B`,
        ...extra.map((name) => (name in r.extra ? String(Number(r.extra[name].toPrecision(4))) : ""))];
    });
    $("verdict").append(tableOf(head, lines, new Set([4])));
    const judged = rows.filter((r) => r.verdict_text);
    const counts = Object.entries(WORDS).map(([kind, word]) => [judged.filter((r) => r.verdict.kind === kind).length, word]);
    const told = counts.filter(([n, word]) => n && word).map(([n, word]) => `${n} ${word}`).join(", ");
    const runs = arms.reduce((sum, arm) => sum + arm.runs.filter((run) => run.state === "done").length, 0);
    $("summary").textContent = `${rows.length} arm${rows.length > 1 ? "s" : ""}, ${runs} runs; against ${rows[0].label}: ${told || "no verdict yet"}`;
  }
  function differsTable() {
    if (!data.differences.length) return $("s-differs").remove();
    const shown = (v) => (v === null || v === undefined ? "" : typeof v === "string" ? v : JSON.stringify(v));
    const words = new Set(arms.map((_, i) => i + 1));
    return $("differs").append(tableOf(["setting", ...arms.map((arm) => arm.label)], data.differences.map((d) => [d.key, ...d.values.map(shown)]), words));
  }
  function votesTable() {
    const votes = data.comparison.votes ?? [];
    if (!votes.length) return $("s-votes").remove();
    const share = (x) => `${Math.round(100 * x)} %`;
    return $("votes").append(tableOf(["arm", "votes", "won", "lost", "tie", "both bad", "won, 95 %"], votes.map((v) =>
      [`${v.arm} against ${v.against}`, v.votes, v.won, v.lost, v.ties, v.bad, v.rate === null ? "" : `${share(v.rate)} (${share(v.low)} to ${share(v.high)})`])));
  }
  function samples() {
    const told = arms.filter((arm) => arm.sample);
    if (!told.length) return $("s-samples").remove();
    return $("samples").append(...told.map((arm) => {
      const text = el("pre", { tabIndex: 0 }, arm.sample);
      return el("div", { className: "card" }, el("h3", {}, `${arm.label}, seed ${arm.sample_seed}`), text);
    }));
  }
  function again() {
    $("again").append(...arms.map((arm) => {
      if (!arm.command) {
        const why = el("p", { className: "quiet" }, "no command of gptlab train made it, or it was not kept yet");
        return el("div", { className: "card" }, el("div", {}, el("h3", {}, arm.label), why));
      }
      const button = el("button", { type: "button", title: `copy the command of ${arm.label}` }, "copy");
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(arm.command);
        button.textContent = "copied";
        setTimeout(() => { button.textContent = "copy"; }, 1500);
      });
      return el("div", { className: "card" }, el("div", {}, el("h3", {}, arm.label), el("pre", {}, arm.command)), button);
    }));
  }
  function notes() {
    const told = [...data.remarks];
    $("notes").append(...told.map((note) => el("li", {}, note)));
    if (!told.length) $("notes").append(el("li", {}, "none"));
    const made = Object.entries(data.made).filter(([, value]) => value).map(([name, value]) => `${name} ${value}`);
    $("made").textContent = `made by ${made.join(" · ")}`;
  }

  /** What a study that is watched is doing now; the server has the page loaded again. */
  function progress() {
    const open = arms.flatMap((arm) => arm.runs.filter((run) => run.state !== "done").map((run) => {
      const steps = Object.values(run.curves).map((curve) => column(curve.step)).map((s) => s[s.length - 1]);
      return `${arm.label}, seed ${run.seed}: ${run.state}${steps.length ? ` at step ${whole(Math.max(...steps))}` : ""}`;
    }));
    const more = open.length > 6 ? `; and ${open.length - 6} more` : "";
    if (data.live) $("progress").textContent = open.length ? open.slice(0, 6).join("; ") + more : "every run that was begun is done";
  }

  // --- the forest of differences ---------------------------------------------------------------------------------------------

  function forest() {
    const told = rows.filter((r) => r.difference);
    if (!told.length) return $("s-forest").remove();
    const width = Math.max(280, $("forest").clientWidth), narrow = width < 620;
    const left = narrow ? 8 : Math.min(300, width * 0.32), right = width - (narrow ? 8 : 190);
    const step = narrow ? 46 : 30, top = 10, height = top + told.length * step + 40;
    const effect = told[0].verdict.effect;
    const ends = told.flatMap((r) => [r.difference.mean - (r.difference.half ?? 0), r.difference.mean + (r.difference.half ?? 0)]);
    const low = Math.min(...ends, -effect), high = Math.max(...ends, effect), room = (high - low) * 0.04;
    const x = (v) => left + ((v - low + room) / (high - low + 2 * room)) * (right - left);
    const label = told.map((r) => `${r.label} ${difference(r)}`).join("; ");
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `differences of ${comparison.metric}: ${label}` });
    const bands = narrow ? told.map((_, i) => [top + i * step + 25, 16]) : [[top, told.length * step]]; // a phone's names stand above each
    for (const [y, tall] of bands) {
      drawn.append(svg("rect", { x: x(-effect), y, width: x(effect) - x(-effect), height: tall, fill: css("--line"), opacity: 0.5 }));
      drawn.append(svg("line", { x1: x(0), x2: x(0), y1: y, y2: y + tall, stroke: css("--quiet") }));
    }
    const halo = { "paint-order": "stroke", stroke: css("--paper"), "stroke-width": 4 };
    const text = (x_, y, what, more = {}) => drawn.append(svg("text", { x: x_, y, fill: css("--ink"), "font-size": 13, ...halo, ...more }, what));
    told.forEach((r, i) => {
      const y = top + i * step + (narrow ? 32 : step / 2);
      const { mean, half } = r.difference, kind = r.verdict.kind;
      const ink = kind in WORDS && kind !== "undecided" && kind !== "none" ? css(`--${kind}`) : css("--quiet");
      if (half !== null) drawn.append(svg("line", { x1: x(mean - half), x2: x(mean + half), y1: y, y2: y, stroke: ink, "stroke-width": 2.5 }));
      drawn.append(svg("circle", { cx: x(mean), cy: y, r: 4.5, fill: ink }));
      const most = Math.floor((narrow ? width * 0.5 : left - 12) / 7);
      const name = r.label.length > most ? `${r.label.slice(0, most - 1)}…` : r.label;
      if (narrow) { text(8, y - 12, name); text(width - 8, y - 12, difference(r), { "text-anchor": "end", fill: ink }); }
      else { text(0, y + 4, name); text(width, y + 4, difference(r), { "text-anchor": "end", fill: ink }); }
    });
    const bottom = top + told.length * step;
    for (const tick of ticks(low - room, high + room, narrow ? 4 : 7)) {
      drawn.append(svg("line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4, stroke: css("--quiet") }));
      text(x(tick), bottom + 17, String(tick), { "text-anchor": "middle", fill: css("--quiet"), "font-size": 12 });
    }
    const under = `left is better; grey: less than ${effect}, not worth knowing`;
    text(left, bottom + 35, narrow ? under : `${comparison.metric}: ${under}`, { fill: css("--quiet"), "font-size": 12 });
    return $("forest").replaceChildren(drawn);
  }

  // --- curves -----------------------------------------------------------------------------------------------------------------

  const hidden = new Set();
  const decoded = new Map();
  let lines = [], cursor = null, place = null;

  function curveOf(run, metric) {
    const key = `${run.identity} ${metric}`;
    if (!decoded.has(key)) {
      const packed = run.curves[metric];
      decoded.set(key, packed ? Object.fromEntries([...axes, "y"].map((name) => [name, column(packed[name])])) : null);
    }
    return decoded.get(key);
  }
  /** An exponential mean, corrected for its beginning. */
  function smoothed(values, weight) {
    if (!weight) return values;
    const found = new Float64Array(values.length);
    let sum = 0, mass = 0;
    values.forEach((value, i) => {
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      found[i] = sum / mass;
    });
    return found;
  }
  /** The lines to draw: an arm's mean over its seeds with a band from the lowest to the highest, or each seed. */
  function makeLines() {
    const metric = $("metric").value, axis = $("axis").value, weight = Number($("smooth").value), each = $("seeds").checked;
    lines = [];
    arms.forEach((arm, i) => {
      if (hidden.has(i)) return;
      const runs = arm.runs.map((run) => [run.seed, curveOf(run, metric)]).filter(([, c]) => c)
        .map(([seed, c]) => ({ seed, step: c.step, x: c[axis], y: smoothed(c.y, weight) }));
      if (!runs.length) return;
      if (each || runs.length === 1) {
        for (const run of runs) lines.push({ arm: i, name: each ? `${arm.label}, seed ${run.seed}` : arm.label, x: run.x, mean: run.y });
        return;
      }
      const counts = new Map();
      runs.forEach((run) => run.step.forEach((s, at) => counts.set(s, [...(counts.get(s) ?? []), [run, at]])));
      const common = [...counts.entries()].filter(([, found]) => found.length === runs.length).sort((a, b) => a[0] - b[0]);
      const of = (pick) => Float64Array.from(common, ([, found]) => pick(found));
      const mean = (field) => (found) => found.reduce((sum, [run, at]) => sum + run[field][at], 0) / found.length;
      const values = (found) => found.map(([run, at]) => run.y[at]);
      lines.push({ arm: i, name: arm.label, x: of(mean("x")), mean: of(mean("y")),
        low: of((f) => Math.min(...values(f))), high: of((f) => Math.max(...values(f))) });
    });
  }
  function range(values, trim) {
    const finite = values.filter(Number.isFinite).sort((a, b) => a - b);
    if (!finite.length) return [0, 1];
    const low = finite[0], high = finite[Math.min(finite.length - 1, Math.floor(finite.length * trim))];
    return high > low ? [low, high] : [low - 0.5, high + 0.5];
  }
  function draw() {
    const canvas = $("canvas"), ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const box = { left: 58, right: width - 12, top: 10, bottom: height - 40 };
    const log = $("logx").checked;
    const at = (v) => (log ? Math.log10(Math.max(v, 1e-9)) : v);
    const xs = lines.flatMap((l) => [at(l.x.find((v) => !log || v > 0) ?? 1), at(l.x[l.x.length - 1])]);
    const [x0, x1] = range(xs, 1);
    // the first steps, from far above, would leave the rest no room
    const [y0, y1] = range(lines.flatMap((l) => [...l.mean, ...(l.low ?? []), ...(l.high ?? [])]), !log && lines.some((l) => l.x.length > 30) ? 0.97 : 1);
    const pad = (y1 - y0) * 0.05;
    const X = (v) => box.left + ((at(v) - x0) / (x1 - x0)) * (box.right - box.left);
    const Y = (v) => box.bottom - ((v - y0 + pad) / (y1 - y0 + 2 * pad)) * (box.bottom - box.top);
    place = { X, Y, box };
    pen.font = "12px system-ui, sans-serif";
    pen.fillStyle = css("--quiet");
    pen.strokeStyle = css("--line");
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticks(y0 - pad, y1 + pad, 6)) {
      stroke(pen, [[box.left, Y(tick)], [box.right, Y(tick)]]);
      pen.fillText(String(tick), box.left - 8, Y(tick));
    }
    pen.textBaseline = "top";
    const most = Math.max(2, Math.floor((box.right - box.left) / 90));
    const marks = log ? logTicks(x0, x1) : ticks(x0, x1, most);
    for (const tick of marks) {
      pen.textAlign = "center";
      pen.fillText(short(tick), X(tick), box.bottom + 7);
    }
    pen.textAlign = "right";
    pen.fillText($("axis").value, box.right, box.bottom + 23);
    pen.save();
    pen.beginPath();
    pen.rect(box.left, box.top - 2, box.right - box.left + 2, box.bottom - box.top + 4);
    pen.clip();
    for (const line of lines) {
      pen.strokeStyle = pen.fillStyle = colour(line.arm);
      if (line.low) {
        pen.globalAlpha = 0.15;
        pen.beginPath();
        line.x.forEach((x, i) => pen.lineTo(X(x), Y(line.high[i])));
        for (let i = line.x.length - 1; i >= 0; i -= 1) pen.lineTo(X(line.x[i]), Y(line.low[i]));
        pen.fill();
        pen.globalAlpha = 1;
      }
      pen.lineWidth = line.low || lines.length <= arms.length ? 1.8 : 1;
      pen.setLineDash(dash(line.arm));
      stroke(pen, Array.from(line.x, (x, i) => [X(x), Y(line.mean[i])]));
      pen.setLineDash([]);
      if (line.x.length <= 30) line.x.forEach((x, i) => dot(pen, X(x), Y(line.mean[i]), 2.2));
    }
    if (cursor !== null) {
      pen.strokeStyle = css("--quiet");
      pen.lineWidth = 1;
      stroke(pen, [[cursor, box.top], [cursor, box.bottom]]);
    }
    pen.restore();
  }
  function stroke(pen, points) {
    pen.beginPath();
    for (const [x, y] of points) if (Number.isFinite(y)) pen.lineTo(x, y);
    pen.stroke();
  }
  function dot(pen, x, y, radius) {
    pen.beginPath();
    pen.arc(x, y, radius, 0, 7);
    pen.fill();
  }
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.ceil(low); power <= high; power += 1) found.push(10 ** power);
    return found.length > 1 ? found : [10 ** low, 10 ** high];
  }
  function nearest(line, pixel) {
    let low = 0, high = line.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (place.X(line.x[middle]) < pixel) low = middle; else high = middle;
    }
    return Math.abs(place.X(line.x[low]) - pixel) <= Math.abs(place.X(line.x[high]) - pixel) ? low : high;
  }
  function point(pixel) {
    const tip = $("tip");
    cursor = pixel === null ? null : Math.min(Math.max(pixel, place.box.left), place.box.right);
    draw();
    if (cursor === null || !lines.length) { tip.hidden = true; return; }
    const found = lines.map((line) => ({ line, at: nearest(line, cursor) })).filter(({ line }) => line.x.length)
      .map(({ line, at }) => ({ name: line.name, arm: line.arm, x: line.x[at], y: line.mean[at] })).sort((a, b) => a.y - b.y);
    const told = found.slice(0, 12).map((f) => {
      const mark = el("span", {}, "● ");
      mark.style.color = colour(f.arm);
      return el("div", {}, mark, `${f.y.toFixed(4)}  ${f.name}`);
    });
    if (found.length > told.length) told.push(el("div", {}, `and ${found.length - told.length} more`));
    tip.replaceChildren(el("div", {}, el("strong", {}, `${$("axis").value} ${short(found[0].x)}`)), ...told);
    tip.hidden = false;
    const room = $("plot").clientWidth, wide = tip.offsetWidth;
    tip.style.left = `${cursor + 14 + wide < room ? cursor + 14 : Math.max(0, cursor - 14 - wide)}px`;
    tip.style.top = "12px";
  }
  function refresh() {
    makeLines();
    draw();
    const many = Math.max(...arms.map((arm) => arm.runs.length));
    $("curve-note").textContent = $("seeds").checked || many < 2 ? "" : "Lines are means over the seeds, bands go from the lowest to the highest.";
  }
  function controls() {
    const found = [...new Set(arms.flatMap((arm) => arm.runs.flatMap((run) => Object.keys(run.curves))))].sort();
    const first = found.includes(comparison.metric) ? comparison.metric : found[0];
    $("metric").append(...found.map((name) => el("option", { selected: name === first }, name)));
    $("axis").append(...axes.map((name) => el("option", { value: name }, name)));
    recall();
    for (const id of CONTROLS) $(id).addEventListener("input", () => { refresh(); remember(); });
    $("legend").append(...arms.map((arm, i) => {
      const box = el("input", { type: "checkbox", checked: !hidden.has(i) });
      box.addEventListener("input", () => { if (box.checked) hidden.delete(i); else hidden.add(i); refresh(); remember(); });
      const swatch = svg("svg", { viewBox: "0 0 28 10", "aria-hidden": "true", class: "swatch" });
      swatch.append(svg("line", { x1: 0, x2: 28, y1: 5, y2: 5, "stroke-width": 3, "stroke-dasharray": dash(i).join(" ") }));
      return el("label", {}, box, swatch, arm.label);
    }));
    const canvas = $("canvas");
    canvas.tabIndex = 0;
    canvas.addEventListener("pointermove", (event) => point(event.offsetX));
    canvas.addEventListener("pointerleave", () => point(null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
      if (step) { point((cursor ?? place.box.left) + step); event.preventDefault(); }
      if (event.key === "Escape") point(null);
    });
    canvas.addEventListener("blur", () => point(null));
  }
  /** What is shown stands in the address, so that it survives a reload and can be sent on. */
  const CONTROLS = ["metric", "axis", "smooth", "seeds", "logx"];
  const value = (control) => (control.type === "checkbox" ? String(control.checked) : control.value);
  function remember() {
    const told = new URLSearchParams(CONTROLS.map((id) => [id, value($(id))]));
    if (hidden.size) told.set("hidden", [...hidden].join(","));
    history.replaceState(null, "", `#${told}`);
  }
  function recall() {
    const told = new URLSearchParams(location.hash.slice(1));
    for (const id of CONTROLS.filter((name) => told.has(name))) {
      const control = $(id);
      if (control.type === "checkbox") control.checked = told.get(id) === "true";
      else if (control.tagName !== "SELECT" || [...control.options].some((o) => o.value === told.get(id))) control.value = told.get(id);
    }
    for (const i of (told.get("hidden") ?? "").split(",").filter(Boolean)) hidden.add(Number(i));
  }
  function paint() {
    [...$("legend").querySelectorAll("line")].forEach((line, i) => line.setAttribute("stroke", colour(i)));
    if ($("forest")) forest();
    draw();
  }

  verdictTable();
  progress();
  differsTable();
  votesTable();
  samples();
  again();
  notes();
  controls();
  refresh();
  paint();
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    paint();
  });
  window.addEventListener("resize", paint);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
})();
