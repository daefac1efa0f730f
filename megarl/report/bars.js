// Bars over steps, shares of a whole, histograms and the calibration of the probes.

/** Stacked bars over the steps: parts [{label, key, ys}]. With more steps than pixels, neighbours are averaged. */
function stackedChart(title, steps, parts, { note, unit = "" } = {}) {
  const { node, head, body } = card(title, note);
  const totals = parts.map((p) => p.ys.reduce((a, v) => a + (v || 0), 0));
  const whole = totals.reduce((a, b) => a + b, 0) || 1;
  head.append(el("p", { class: "legend" }, parts.map((p, i) =>
    el("span", {}, el("i", { class: `key ${p.key}` }), `${p.label} `, el("b", {}, `${(100 * totals[i] / whole).toFixed(totals[i] / whole < 0.0995 ? 1 : 0)} %`)))));
  const holder = el("div", { role: "img", "aria-label": `${title}: ${parts.map((p, i) => `${p.label} ${(100 * totals[i] / whole).toFixed(1)} percent`).join(", ")}` });
  body.append(holder);
  onWidth(body, (width) => {
    const inner = width - LEFT - RIGHT, per = Math.ceil(steps.length / Math.max(1, Math.floor(inner / 3)));
    const n = Math.ceil(steps.length / per), size = inner / n;
    const mean = (ys, b) => { const part = ys.slice(b * per, (b + 1) * per); return part.reduce((a, v) => a + (v || 0), 0) / part.length; };
    const heights = Array.from({ length: n }, (_, b) => parts.map((p) => mean(p.ys, b)));
    const high = extremes(heights.map((h) => h.reduce((a, v) => a + v, 0)))[1] || 1;
    const toY = (v) => TOP + (1 - v / high) * (HEIGHT - TOP - BOTTOM);
    const svg = el("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
    for (const v of ticks(0, high, 4)) {
      svg.append(el("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(v), y2: toY(v) }),
        el("text", { class: "tick", x: LEFT - 7, y: toY(v) + 3.5, "text-anchor": "end" }, short(v)));
    }
    heights.forEach((h, b) => {
      let sum = 0;
      h.forEach((v, i) => {
        if (v > 0) svg.append(el("rect", { class: `fill ${parts[i].key}`, x: LEFT + b * size, y: toY(sum + v), width: Math.max(size - (size > 5 ? 1 : 0), 0.5), height: Math.max(toY(sum) - toY(sum + v), 0) }));
        sum += v;
      });
    });
    const every = Math.ceil(n / Math.max(1, Math.floor(width / 70)));
    for (let b = 0; b < n; b += every) svg.append(el("text", { class: "tick", x: LEFT + (b + 0.5) * size, y: HEIGHT - 7, "text-anchor": "middle" }, short(steps[b * per])));
    holder.replaceChildren(svg);
    holder.onpointermove = (e) => {
      const b = Math.floor((e.clientX - holder.getBoundingClientRect().left - LEFT) / size);
      if (b < 0 || b >= n) return tip.hide();
      tip.show([["step", per > 1 ? `${steps[b * per]} …, mean of ${per}` : steps[b]], ...parts.map((p, i) => [p.label, figure(heights[b][i]) + unit, p.key])], e.clientX, e.clientY);
    };
    holder.onpointerleave = () => tip.hide();
  });
  return node;
}

/** Counts over tenths of [0, 1]; sets [{label, key, counts}] side by side. */
function histogram(title, sets, note) {
  const { node, head, body } = card(title, note);
  if (sets.length > 1) head.append(el("p", { class: "legend" }, sets.map((s) => el("span", {}, el("i", { class: `key ${s.key}` }), s.label))));
  const holder = el("div", { role: "img", "aria-label": `${title}: ${sets.map((s) => `${s.label} ${s.counts.join(", ")}`).join("; ")}` });
  body.append(holder);
  onWidth(body, (width) => {
    const shares = sets.map((s) => { const sum = s.counts.reduce((a, b) => a + b, 0) || 1; return s.counts.map((c) => c / sum); });
    const high = Math.max(...shares.flat()) || 1, bins = sets[0].counts.length, size = (width - LEFT - RIGHT) / bins;
    const toY = (v) => TOP + (1 - v / high) * (HEIGHT - TOP - BOTTOM);
    const svg = el("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
    for (const v of ticks(0, high, 4)) svg.append(el("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(v), y2: toY(v) }),
      el("text", { class: "tick", x: LEFT - 7, y: toY(v) + 3.5, "text-anchor": "end" }, `${short(100 * v)}%`));
    shares.forEach((row, s) => row.forEach((v, b) => svg.append(el("rect", { class: `fill ${sets[s].key}`, x: LEFT + b * size + 2 + (s * (size - 4)) / sets.length, y: toY(v), width: Math.max((size - 4) / sets.length - 1, 1), height: HEIGHT - BOTTOM - toY(v) }))));
    for (let b = 0; b <= bins; b += 2) svg.append(el("text", { class: "tick", x: LEFT + b * size, y: HEIGHT - 7, "text-anchor": "middle" }, (b / bins).toFixed(1)));
    holder.replaceChildren(svg);
    holder.onpointermove = (e) => {
      const b = Math.floor((e.clientX - holder.getBoundingClientRect().left - LEFT) / size);
      if (b < 0 || b >= bins) return tip.hide();
      tip.show([["between", `${(b / bins).toFixed(1)} and ${((b + 1) / bins).toFixed(1)}`], ...sets.map((s, i) => [s.label, `${figure(s.counts[b])} (${(100 * shares[i][b]).toFixed(1)} %)`, s.key])], e.clientX, e.clientY);
    };
    holder.onpointerleave = () => tip.hide();
  });
  return node;
}

/** Confidence against correctness; on the dashed line a probe is as often right as it is sure. Area = probes. */
function calibrationChart(sets) {
  const { node, head, body } = card("Probe calibration", "share of completions that are right, by the confidence of their probes");
  if (sets.length > 1) head.append(el("p", { class: "legend" }, sets.map((s) => el("span", {}, el("i", { class: `key ${s.key} dot` }), s.label))));
  const words = (rows) => rows.filter(([n]) => n).map(([n, c, r]) => `confidence ${c.toFixed(2)}: right ${r.toFixed(2)} of ${n}`).join(", ");
  const holder = el("div", { role: "img", "aria-label": `Probe calibration: ${sets.map((s) => `${s.label} ${words(s.rows)}`).join("; ")}` });
  body.append(holder);
  onWidth(body, (width) => {
    const toX = (v) => LEFT + v * (width - LEFT - RIGHT - 8), toY = (v) => TOP + (1 - v) * (HEIGHT - TOP - BOTTOM);
    const svg = el("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" });
    for (const v of [0, 0.25, 0.5, 0.75, 1]) svg.append(el("line", { class: "grid", x1: LEFT, x2: toX(1), y1: toY(v), y2: toY(v) }),
      el("text", { class: "tick", x: LEFT - 7, y: toY(v) + 3.5, "text-anchor": "end" }, `${100 * v}%`), el("text", { class: "tick", x: toX(v), y: HEIGHT - 7, "text-anchor": "middle" }, v.toFixed(2)));
    svg.append(el("line", { class: "ideal", x1: toX(0), y1: toY(0), x2: toX(1), y2: toY(1) }));
    for (const s of sets) {
      const most = Math.max(...s.rows.map(([n]) => n)) || 1;
      for (const [n, c, r] of s.rows) if (n) {
        const dot = el("circle", { class: `bubble ${s.key}`, cx: toX(c), cy: toY(r), r: 3 + 9 * Math.sqrt(n / most) });
        dot.addEventListener("pointermove", (e) => tip.show([["run", s.label, s.key], ["mean confidence", c.toFixed(3)], ["right", `${(100 * r).toFixed(1)} %`], ["probes", figure(n)]], e.clientX, e.clientY));
        dot.addEventListener("pointerleave", () => tip.hide());
        svg.append(dot);
      }
    }
    holder.replaceChildren(svg);
  });
  return node;
}
