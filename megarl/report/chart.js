// Line charts: a faint raw line, a bold smoothed one, a crosshair that all charts share, linear or logarithmic.

const HEIGHT = 168, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 24;
const axis = { x: "step", smooth: 0.6, charts: [] };

/** About `n` round values that cover [low, high]. */
function ticks(low, high, n) {
  const rough = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((s) => s * power >= rough) * power;
  const found = [];
  for (let v = Math.ceil(low / size - 1e-9) * size; v <= high + size * 1e-9; v += size) found.push(Math.abs(v) < size * 1e-9 ? 0 : v);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) found.push(10 ** e);
  const every = Math.ceil(found.length / 5);
  return found.filter((v, i) => i % every === 0 && v >= low * 0.999 && v <= high * 1.001);
}

/** Short text of an axis value. */
function short(v) {
  const size = Math.abs(v);
  if (v === 0) return "0";
  if (size >= 1e6) return `${Number((v / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((v / 1e3).toPrecision(3))}k`;
  return size < 1e-3 ? Number(v.toPrecision(3)).toExponential() : String(Number(v.toPrecision(3)));
}

/** Exponential moving average with the start's bias taken out; holes stay. */
function smoothed(values, weight) {
  let mean = 0, norm = 0;
  return values.map((v) => {
    if (typeof v !== "number") return null;
    mean = weight * mean + (1 - weight) * v;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}

/** The points of a line; at most two a pixel, the extremes of each pixel kept. */
function path(xs, ys, toX, toY) {
  let out = "", open = false, last = null, low = 0, high = 0;
  const flush = () => { if (last !== null && high - low > 1) out += `V${low.toFixed(1)}V${high.toFixed(1)}`; };
  for (let i = 0; i < xs.length; i++) {
    if (typeof ys[i] !== "number" || !Number.isFinite(toY(ys[i]))) continue;
    const x = toX(xs[i]), y = toY(ys[i]);
    if (last !== null && x - last < 0.5) { low = Math.min(low, y); high = Math.max(high, y); continue; }
    flush();
    out += `${open ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
    open = true; last = x; low = high = y;
  }
  return out;
}

/** A card with a title. `unit` "%" shows shares. */
function card(title, note) {
  const head = el("figcaption", {}, el("h3", {}, title), note ? el("small", {}, note) : null);
  const body = el("div", { class: "plot" });
  return { node: el("figure", { class: "card" }, head, body), head, body };
}

/**
 * lines: [{label, key (colour class), xs, ys, run, marks (points rather than a line)}].
 * The plot is a slider: the pointer or the arrow keys move the crosshair of every chart.
 */
function lineChart(title, lines, { note, percent, log, exact } = {}) {
  const { node, head, body } = card(title, note);
  const positive = lines.every((l) => l.ys.every((v) => typeof v !== "number" || v > 0));
  const state = { log: Boolean(log) && positive };
  if (positive) {
    const button = el("button", { type: "button", class: "mini", "aria-pressed": String(state.log), onclick() {
      state.log = !state.log; button.setAttribute("aria-pressed", String(state.log)); draw(body.clientWidth);
    } }, "log");
    head.append(button);
  }
  if (lines.length > 1) {
    head.append(el("p", { class: "legend" }, lines.map((l) => el("span", {}, el("i", { class: `key ${l.key}${l.marks ? " dot" : ""}` }), l.label))));
  }
  const show = percent ? (v) => `${Number((100 * v).toPrecision(4))} %` : figure;
  const all = [...new Set(lines.flatMap((l) => l.steps.filter((_, i) => typeof l.ys[i] === "number")))].sort((a, b) => a - b);
  const slider = el("div", { role: "slider", tabindex: 0, "aria-label": `${title}, by step`, "aria-valuemin": all[0] ?? 0,
    "aria-valuemax": all.at(-1) ?? 0, "aria-valuenow": all.at(-1) ?? 0 });
  body.append(slider);
  let scale = null;

  const rows = (step) => lines.map((l) => {
    const i = l.steps.indexOf(step);
    return i < 0 || l.ys[i] === null ? null : [l.label, typeof l.ys[i] === "number" ? show(l.ys[i]) : l.ys[i], l.key];
  }).filter(Boolean);
  const text = (step) => [`step ${step}`, ...rows(step).map(([label, value]) => `${label} ${value}`)].join(", ");

  function draw(width) {
    if (!width) return;
    const data = lines.map((l) => ({ ...l, x: l.xs(axis.x), soft: l.marks || exact ? l.ys : smoothed(l.ys, axis.smooth) }));
    const xs = data.flatMap((l) => l.x.filter((_, i) => typeof l.ys[i] === "number"));
    const ys = data.flatMap((l) => l.ys.filter((v) => typeof v === "number"));
    let [x0, x1] = [Math.min(...extremes(xs)), Math.max(...extremes(xs))], [y0, y1] = extremes(ys);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
    if (state.log) { y0 = 10 ** Math.floor(Math.log10(y0) + 1e-9); y1 = 10 ** Math.ceil(Math.log10(y1) - 1e-9); if (y0 === y1) y1 *= 10; }
    else { if (y0 === 0 && y1 === 0) y1 = 1; if (y0 === y1) { y0 -= Math.abs(y0) / 2; y1 += percent && y1 === 1 ? 0 : Math.abs(y1) / 2; } const pad = (y1 - y0) * 0.07; if (y0 < 0 || y0 > pad) y0 -= pad; else y0 = 0; y1 += pad; }
    const toX = (v) => LEFT + ((v - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
    const f = state.log ? Math.log10 : (v) => v;
    const toY = (v) => TOP + (1 - (f(v) - f(y0)) / (f(y1) - f(y0))) * (HEIGHT - TOP - BOTTOM);
    const svg = el("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
    for (const v of state.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
      svg.append(el("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(v), y2: toY(v) }),
        el("text", { class: "tick", x: LEFT - 7, y: toY(v) + 3.5, "text-anchor": "end" }, percent ? `${short(100 * v)}%` : short(v)));
    }
    for (const v of ticks(x0, x1, Math.max(2, width / 90)).filter((v) => axis.x !== "step" || Number.isInteger(v))) {
      svg.append(el("text", { class: "tick", x: toX(v), y: HEIGHT - 7, "text-anchor": "middle" }, short(v)));
    }
    for (const l of data) {
      if (l.marks) {
        svg.append(el("path", { class: `line thin ${l.key}`, d: path(l.x, l.ys, toX, toY) }));
        l.x.forEach((x, i) => typeof l.ys[i] === "number" && svg.append(el("circle", { class: `mark ${l.key}`, cx: toX(x), cy: toY(l.ys[i]), r: 3.5 })));
        continue;
      }
      if (axis.smooth > 0 && !exact) svg.append(el("path", { class: `line raw ${l.key}`, d: path(l.x, l.ys, toX, toY) }));
      svg.append(el("path", { class: `line ${l.key}`, d: path(l.x, l.soft, toX, toY) }));
    }
    const cross = el("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    svg.append(cross);
    slider.replaceChildren(svg);
    scale = { data, toX, cross, width };
  }

  /** Put the crosshair at a step; null takes it away. */
  function point(step) {
    if (!scale) return;
    const l = scale.data.find((d) => d.steps.includes(step));
    if (step === null || !l) { scale.cross.setAttribute("visibility", "hidden"); return; }
    const x = scale.toX(l.x[l.steps.indexOf(step)]);
    scale.cross.setAttribute("x1", x); scale.cross.setAttribute("x2", x);
    scale.cross.setAttribute("visibility", "visible");
    slider.setAttribute("aria-valuenow", step);
    slider.setAttribute("aria-valuetext", text(step));
  }

  function nearest(clientX) {
    const x = clientX - slider.getBoundingClientRect().left;
    let best = null, gap = Infinity;
    for (const l of scale.data) l.x.forEach((v, i) => {
      const d = Math.abs(scale.toX(v) - x);
      if (typeof l.ys[i] === "number" && d < gap) { gap = d; best = l.steps[i]; }
    });
    return best;
  }
  const move = (step, x, y) => { for (const chart of axis.charts) chart.point(step); tip.show([["step", figure(step)], ...rows(step)], x, y); };
  slider.addEventListener("pointermove", (e) => scale && move(nearest(e.clientX), e.clientX, e.clientY));
  slider.addEventListener("pointerleave", () => { tip.hide(); for (const chart of axis.charts) chart.point(null); });
  slider.addEventListener("blur", () => { tip.hide(); for (const chart of axis.charts) chart.point(null); });
  slider.addEventListener("keydown", (e) => {
    const at = all.indexOf(Number(slider.getAttribute("aria-valuenow")));
    const to = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, PageDown: at - 10, PageUp: at + 10, Home: 0, End: all.length - 1 }[e.key];
    if (e.key === "Escape") tip.hide();
    if (to === undefined) return;
    e.preventDefault();
    const step = all[Math.max(0, Math.min(all.length - 1, to))], box = slider.getBoundingClientRect();
    point(step);
    move(step, box.left + Number(scale.cross.getAttribute("x1")), box.top + 20);
  });
  slider.setAttribute("aria-valuetext", all.length ? text(all.at(-1)) : "no figures");
  onWidth(body, draw);
  axis.charts.push({ draw: () => draw(body.clientWidth), point });
  return node;
}

/** [lowest, highest] without spreading a long array over a call. */
function extremes(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return [low, high];
}
