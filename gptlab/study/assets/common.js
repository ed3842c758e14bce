"use strict";
// What gptlab's pages share: building elements, numbers, colours, packed columns.
const $ = (id) => document.getElementById(id);

/** An element with properties and children; texts enter as text. */
function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}
function tableOf(head, lines, words = new Set()) {
  const kind = (i) => (words.has(i) ? "words" : "");
  const top = el("tr", {}, ...head.map((h, i) => el("th", { scope: "col", className: kind(i) }, h)));
  const body = lines.map((line) => el("tr", {}, ...line.map((cell, i) =>
    el("td", { className: `${kind(i)} ${cell.className ?? ""}` }, cell.text ?? cell))));
  return el("table", {}, el("thead", {}, top), el("tbody", {}, ...body));
}

// --- numbers --------------------------------------------------------------------------------------------------------

const UNITS = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
function short(value) {
  const unit = UNITS.find(([size]) => Math.abs(value) >= size);
  return unit ? `${Number((value / unit[0]).toPrecision(3))} ${unit[1]}` : String(Number(value.toPrecision(3)));
}
const whole = (value) => Math.round(value).toLocaleString("en");
function ticks(low, high, count) {
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * size).find((s) => s >= raw) ?? size;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(Number((i * step).toPrecision(6)));
  return found;
}
function bytes(text) {
  const raw = atob(text), made = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) made[i] = raw.charCodeAt(i);
  return made;
}
/** A column of numbers, as page.py packs them. */
function column(packed) {
  if ("n" in packed) {
    const step = (packed.last - packed.first) / Math.max(1, packed.n - 1);
    return Float64Array.from({ length: packed.n }, (_, i) => packed.first + i * step);
  }
  if ("f4" in packed) return Float64Array.from(new Float32Array(bytes(packed.f4).buffer));
  const step = (packed.high - packed.low) / 65534;
  return Float64Array.from(new Uint16Array(bytes(packed.u2).buffer), (v) => (v === 65535 ? NaN : packed.low + v * step));
}

// --- colours: Okabe & Ito's -----------------------------------------------------------------------------------------

const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31"];
const DARK = ["#56b4e9", "#e8844a", "#35c29b", "#dd9dc2", "#f0b73f", "#9fd3f5", "#c7a76a"];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = () => css("color-scheme") === "dark" || getComputedStyle(document.documentElement).colorScheme === "dark";
