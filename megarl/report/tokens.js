// One response as spans: what was sampled, what was inserted, where steps begin, where probes asked, where it was cut.

const SHOWN = 1500;  // tokens drawn at once at either end of a long response
const EARLY = new Set(["confident", "near_budget", "repetition", "budget"]);
const ENDS = { confident: "sure of the answer", near_budget: "near the budget", repetition: "repeating itself", budget: "out of budget" };

/** The text of every token; parts of characters come out with the token that completes them. */
function texts(numbers, table) {
  const decoder = new TextDecoder("utf-8"), encoder = new TextEncoder();
  let pending = false;
  return numbers.map((n) => {
    const piece = table[n][1];
    if (typeof piece === "string" && !pending) return piece;
    const out = decoder.decode(typeof piece === "string" ? encoder.encode(piece) : new Uint8Array(piece), { stream: true });
    pending = typeof piece !== "string";
    return out;
  });
}

/** The whole text of a completion. */
const textOf = (c, table) => (c.t ? texts(c.t, table).join("") : c.text);

/** Stand-alone markers, as the trainer counts steps (algorithms/steps.py). */
function markerPattern(markers) {
  if (!markers.length) return null;
  const escaped = [...markers].sort((a, b) => b.length - a.length).map((m) => m.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return new RegExp(`(?<![A-Za-z])(?:${escaped.join("|")})(?![A-Za-z])`, "g");
}

/** A token's text; a marker's leading space stays outside of its colour, which would else hang on the line before. */
function painted(piece, flags) {
  if (!flags.includes("marker")) return [piece];
  const word = piece.trimStart();
  return [piece.slice(0, piece.length - word.length), el("b", { class: "marker" }, word)];
}

/** The origin (0 sampled, 1 inserted) of every token. */
const origins = (c) => c.o.flatMap(([origin, count]) => Array(count).fill(origin));

/** Colours of tokens: the class of each under a way of colouring. */
const COLOURS = {
  structure: () => "",
  logprob: (c, i) => (c.l[i] === null ? "" : `heat h${Math.min(6, Math.floor(Math.sqrt(c.l[i] / 1000) * 3.5))}`),
  advantage: (c) => `heat ${c.advantage >= 0 ? "up" : "down"}${Math.min(5, Math.ceil(Math.abs(c.advantage * c.weight) * 2))}`,
};

/** The body of a response card: a listbox-like run of tokens that the arrow keys walk. */
function responseBody(c, table, { markers, colour, query, label }) {
  const body = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `${label}: tokens. Arrow keys walk them.` });
  if (!c.t) { body.append(el("p", { class: "plain" }, c.text)); return body; }
  const pieces = texts(c.t, table), origin = origins(c), whole = pieces.join("");
  const starts = []; let at = 0;
  for (const piece of pieces) { starts.push(at); at += piece.length; }
  const flags = Array(pieces.length).fill("");
  const flag = (from, to, name) => {
    let i = starts.findLastIndex((s) => s <= from);
    while (i >= 0 && i < pieces.length && starts[i] < to) { if (starts[i] + pieces[i].length > from) flags[i] += ` ${name}`; i++; }
  };
  const pattern = markerPattern(markers);
  if (pattern) for (const m of whole.matchAll(pattern)) flag(m.index, m.index + m[0].length, "marker");
  if (query) for (let i = whole.toLowerCase().indexOf(query); i >= 0; i = whole.toLowerCase().indexOf(query, i + query.length)) flag(i, i + query.length, "found");
  const probes = new Map();
  for (const probe of c.probes) probes.set(probe[0], [...(probes.get(probe[0]) || []), probe]);
  const cut = EARLY.has(c.exit_reason) ? origin.indexOf(1) : -1;
  const versions = new Set(c.spans.slice(1).map(([, start]) => start));

  const pill = (kind, text, title) => el("span", { class: `pill ${kind}`, "data-tip": title }, text);
  const draw = (from, to) => {
    const out = [];
    for (let i = from; i < to; i++) {
      for (const [, confidence, accepted, trial] of probes.get(i) || []) {
        const answer = trial ? texts(trial, table).join("") : "";
        out.push(pill(accepted ? "accepted" : "declined", `${accepted ? "◆" : "◇"} ${confidence.toFixed(2)}`, `probe ${accepted ? "accepted" : "declined"}\nconfidence ${confidence.toFixed(4)}\ntrial answer ${answer}`));
      }
      if (i === cut) out.push(pill("cut", "✂ cut", `thought ended here\n${ENDS[c.exit_reason]}`));
      if (versions.has(i)) out.push(pill("version", "⇡ weights", `from here on under weights ${c.spans.find(([, s]) => s === i)[0]}`));
      out.push(el("span", { class: `t${origin[i] ? " inserted" : ""}${flags[i]} ${COLOURS[colour](c, i)}`, "data-i": i }, ...painted(pieces[i], flags[i])));
    }
    return out;
  };
  const n = pieces.length;
  if (n <= 2 * SHOWN) body.append(...draw(0, n));
  else {
    const more = el("button", { type: "button", class: "more", onclick: () => more.replaceWith(...draw(SHOWN, n - SHOWN)) }, `… show the ${figure(n - 2 * SHOWN)} tokens between`);
    body.append(...draw(0, SHOWN), more, ...draw(n - SHOWN, n));
  }
  for (const [position, confidence, accepted, trial] of c.probes) if (position >= n) {
    body.append(pill(accepted ? "accepted" : "declined", `${accepted ? "◆" : "◇"} ${confidence.toFixed(2)}`, `probe ${accepted ? "accepted" : "declined"}\nconfidence ${confidence.toFixed(4)}\ntrial answer ${trial ? texts(trial, table).join("") : ""}`));
  }

  const facts = (i) => {
    const lp = c.l[i];
    return [
      ["token", JSON.stringify(pieces[i])], ["id", table[c.t[i]][0]], ["position", i],
      ["origin", origin[i] ? "inserted" : "sampled"],
      ["log-prob", lp === null ? "none" : (-lp / 1000).toFixed(3)], ...(lp === null ? [] : [["probability", Math.exp(-lp / 1000).toFixed(3)]]),
      ["advantage", figure(c.advantage)], ["weight", c.weight === 0 ? "0 (dropped)" : figure(c.weight)],
      ...(c.spans.length > 1 ? [["weights", c.spans.findLast(([, s]) => s <= i)?.[0]]] : []),
    ];
  };
  const rowsOf = (node) => (node.dataset.tip ? node.dataset.tip.split("\n").map((line, i) => (i ? [line.slice(0, line.lastIndexOf(" ") + 1), line.slice(line.lastIndexOf(" ") + 1)] : [line, ""])) : facts(Number(node.dataset.i)));
  let current = null;
  const choose = (node, x, y) => {
    current?.classList.remove("current");
    current = node;
    node.classList.add("current");
    const rows = rowsOf(node);
    tip.show(rows, x, y);
    return rows;
  };
  body.addEventListener("pointermove", (e) => { const node = e.target.closest(".t, .pill"); if (node) choose(node, e.clientX, e.clientY); else tip.hide(); });
  const leave = () => { current?.classList.remove("current"); tip.hide(); };
  body.addEventListener("pointerleave", leave);
  body.addEventListener("blur", leave);
  body.addEventListener("keydown", (e) => {
    if (e.key === "Escape") return leave();
    const all = [...body.querySelectorAll(".t, .pill")], here = current ? all.indexOf(current) : -1;
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + 10, ArrowUp: here - 10, Home: 0, End: all.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    const node = all[Math.max(0, Math.min(all.length - 1, to))];
    node.scrollIntoView({ block: "nearest" });
    const box = node.getBoundingClientRect();
    say(choose(node, box.left, box.bottom).map((row) => row.join(" ")).join(", "));
  });
  return body;
}
