// Elements, numbers and chunks. Text always goes in by textContent: responses are foreign.

const $ = (selector, root = document) => root.querySelector(selector);

/** An element with attributes (`on…` are listeners, `class`, `data-…`), then children or texts. */
function el(name, attributes = {}, ...children) {
  const svg = /^(svg|g|path|line|rect|circle|text|polyline)$/.test(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A figure for people: four significant digits, thousands apart. */
function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** The JSON of an embedded chunk. */
async function chunk(name) {
  const text = document.getElementById(`chunk-${name}`).textContent;
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** The last few values of `make(key)`, kept. */
function remembered(make, limit) {
  const kept = new Map();
  return (key) => {
    if (!kept.has(key)) {
      kept.set(key, make(key));
      if (kept.size > limit) kept.delete(kept.keys().next().value);
    }
    return kept.get(key);
  };
}

const tip = {
  node: $("#tip"),
  /** Show rows of [label, value] beside a point of the window. */
  show(rows, x, y) {
    this.node.replaceChildren(...rows.map(([label, value, key]) =>
      el("div", {}, key === undefined ? null : el("i", { class: `key ${key}` }), el("span", {}, label), el("b", {}, value))));
    this.node.hidden = false;
    const box = this.node.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - box.width - 14 : x + 14;
    this.node.style.left = `${Math.max(6, Math.min(left, innerWidth - box.width - 6))}px`;
    this.node.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - box.height - 6))}px`;
  },
  hide() { this.node.hidden = true; },
};
const say = (text) => { $("#live").textContent = text; };
addEventListener("scroll", () => tip.hide(), { passive: true });

/** Call `draw` with the width of `node` now and whenever it changes. */
function onWidth(node, draw) {
  let known = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width && width !== known) { known = width; draw(width); }
  }).observe(node);
}
