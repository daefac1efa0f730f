// The rollout viewer: pick a step and a prompt, see its group side by side; filter, sort, search.

const VERDICTS = { right: "✓", wrong: "✗", timeout: "…", error: "!" };

/** What tells prompts apart: without the lines that all begin or end with, such as a system prompt. */
function ownParts(prompts) {
  const split = prompts.map((p) => p.trim().split("\n")), [one] = split;
  const several = split.some((lines) => lines.join("\n") !== one.join("\n"));
  if (!several) return prompts.map((p) => p.trim().slice(-240));
  const least = Math.min(...split.map((lines) => lines.length));
  const shared = (at, most) => { let n = 0; while (n < most && split.every((lines) => at(lines, n) === at(one, n))) n++; return n; };
  const head = shared((lines, n) => lines[n], least - 1), tail = shared((lines, n) => lines.at(-1 - n), least - 1 - head);
  const own = split.map((lines) => lines.slice(head, lines.length - tail).join("\n").trim());
  const [text] = own;
  let same = 0;
  while (same < text.length && own.every((o) => o[same] === text[same])) same++;
  const cut = same > 80 ? text.lastIndexOf(" ", same) + 1 : 0;
  return own.map((o) => (cut ? `… ${o.slice(cut)}` : o));
}

function viewer(runs) {
  const root = $("#viewer");
  const indexed = runs.map((r) => r.rollouts);
  if (!indexed.some((i) => i.length)) { root.append(el("p", { class: "none" }, "No rollouts on disk.")); return; }
  const first = indexed.findIndex((i) => i.length);
  // A key names what is shown: a step's number, or "eval-" and the step for held-out responses.
  const newest = (index) => String((index.filter((s) => !s.held_out).at(-1) || index.at(-1))?.key);
  const named = (s) => (s.held_out ? `${s.step}, held-out` : String(s.step));
  const state = { run: first, step: newest(indexed[first]), prompt: 0, query: "", colour: "structure", sort: "order", exit: "", kept: "", verdicts: new Set(Object.keys(VERDICTS)) };
  const table = remembered((run) => chunk(`tokens-${run}`), 8);
  const step = remembered((key) => chunk(`step-${key}`), 4);
  const option = (value, label = value) => el("option", { value }, label);
  const choice = (id, label, options, change) => {
    const select = el("select", { id, onchange: (e) => change(e.target.value) }, options);
    return [el("label", {}, `${label} `, select), select];
  };

  const [runLabel, runSelect] = choice("v-run", "Run", runs.map((r, i) => option(i, r.name)), (v) => { state.run = Number(v); fillSteps(); state.prompt = 0; load(); });
  const [stepLabel, stepSelect] = choice("v-step", "Step", [], (v) => { state.step = v; state.prompt = 0; load(); });
  const [sortLabel] = choice("v-sort", "Sort", [option("order", "as drawn"), option("reward", "mean reward"), option("spread", "spread of rewards"), option("length", "length")], (v) => { state.sort = v; list(); });
  const [exitLabel, exitSelect] = choice("v-exit", "Ended", [option("", "any way")], (v) => { state.exit = v; list(); });
  const [keptLabel] = choice("v-kept", "Training", [option("", "all"), option("kept", "kept"), option("dropped", "dropped")], (v) => { state.kept = v; list(); });
  const [colourLabel] = choice("v-colour", "Colour by", [option("structure", "structure"), option("logprob", "log-prob"), option("advantage", "advantage × weight")], (v) => { state.colour = v; group(); });
  const jump = (by) => { const at = stepSelect.selectedIndex + by; if (at >= 0 && at < stepSelect.options.length) { stepSelect.selectedIndex = at; state.step = stepSelect.value; state.prompt = 0; load(); } };
  const search = el("input", { type: "search", id: "v-search", placeholder: "in prompts and responses", oninput: (e) => { state.query = e.target.value.toLowerCase(); list(); } });
  const everywhere = el("button", { type: "button", id: "v-everywhere", onclick: () => searchAll() }, "in all steps");
  const verdictBoxes = Object.entries(VERDICTS).map(([name, sign]) => el("label", { class: `chip ${name}` },
    el("input", { type: "checkbox", checked: true, value: name, onchange: (e) => { state.verdicts[e.target.checked ? "add" : "delete"](name); list(); } }), `${sign} ${name}`));
  const count = el("p", { class: "count", role: "status" });
  const prompts = el("ul", { class: "prompts", "aria-label": "Prompts" });
  const shown = el("div", { class: "group" });
  const hits = el("div", { class: "hits" });
  root.append(
    el("div", { class: "bar", role: "group", "aria-label": "Which rollouts" }, runs.length > 1 ? runLabel : null,
      el("span", { class: "steps" }, el("button", { type: "button", "aria-label": "Previous step", onclick: () => jump(-1) }, "‹"), stepLabel, el("button", { type: "button", "aria-label": "Next step", onclick: () => jump(1) }, "›")),
      el("label", {}, "Search ", search), everywhere, sortLabel, colourLabel),
    el("div", { class: "bar", role: "group", "aria-label": "Filter" }, verdictBoxes, exitLabel, keptLabel),
    el("p", { class: "legend" }, el("span", {}, el("b", { class: "marker" }, "Wait"), " begins a step"), el("span", {}, el("b", { class: "t inserted" }, "inserted"), " by early exit"),
      el("span", {}, el("b", { class: "pill cut" }, "✂ cut"), " thought ended early"), el("span", {}, el("b", { class: "pill accepted" }, "◆ .97"), " accepted probe"), el("span", {}, el("b", { class: "pill declined" }, "◇ .41"), " declined")),
    hits, el("div", { class: "split" }, el("div", { class: "side" }, count, prompts), shown));

  let data = [], tokens = [], asked = [];
  const passes = (c) => state.verdicts.has(c.verdict) && (!state.exit || c.exit_reason === state.exit) && (!state.kept || c.weight === null || (c.weight > 0) === (state.kept === "kept"));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / (values.length || 1);
  const spread = (values) => { const m = mean(values); return Math.sqrt(mean(values.map((v) => (v - m) ** 2))); };
  const ORDER = { reward: (g) => -mean(g.completions.map((c) => c.reward)), spread: (g) => -spread(g.completions.map((c) => c.reward)), length: (g) => -mean(g.completions.map((c) => c.n)) };

  function fillSteps() {
    stepSelect.replaceChildren(...indexed[state.run].map((s) => option(s.key, named(s))));
    if (!indexed[state.run].some((s) => String(s.key) === state.step)) state.step = newest(indexed[state.run]);
    stepSelect.value = state.step;
  }

  async function load() {
    const wanted = `${state.run}-${state.step}`;
    if (state.step === "undefined") { data = []; list(); return; }
    root.setAttribute("aria-busy", "true");
    const [found, dictionary] = await Promise.all([step(wanted), table(state.run)]);
    if (wanted !== `${state.run}-${state.step}`) return;  // another was picked meanwhile
    data = found; tokens = dictionary; asked = ownParts(data.map((g) => g.prompt));
    const reasons = [...new Set(data.flatMap((g) => g.completions.map((c) => c.exit_reason)))].sort();
    exitSelect.replaceChildren(option("", "any way"), ...reasons.map((r) => option(r, r.replace(/_/g, " "))));
    exitSelect.value = reasons.includes(state.exit) ? state.exit : (state.exit = "");
    list();
    root.setAttribute("aria-busy", "false");
  }

  const lower = new WeakMap();
  const textLower = (c, dictionary) => { if (!lower.has(c)) lower.set(c, textOf(c, dictionary).toLowerCase()); return lower.get(c); };
  const matches = (g, dictionary = tokens) => (c) => passes(c) && (!state.query || g.prompt.toLowerCase().includes(state.query) || textLower(c, dictionary).includes(state.query));

  function list() {
    const rows = data.map((g, i) => ({ g, i, n: g.completions.filter(matches(g)).length })).filter((r) => r.n);
    if (ORDER[state.sort]) rows.sort((a, b) => ORDER[state.sort](a.g) - ORDER[state.sort](b.g));
    const index = indexed[state.run].find((s) => String(s.key) === state.step);
    const cut = index && index.completions < index.all ? `, of ${figure(index.all)} in the step` : "";
    count.textContent = `${figure(rows.length)} prompts, ${figure(rows.reduce((a, r) => a + r.n, 0))} completions${cut}`;
    if (!rows.some((r) => r.i === state.prompt)) state.prompt = rows[0]?.i ?? -1;
    prompts.replaceChildren(...rows.map(({ g, i }) => el("li", {}, el("button", { type: "button", "data-prompt": i, "aria-current": i === state.prompt ? "true" : null, onclick: () => pick(i) },
      el("span", { class: "q" }, asked[i].slice(0, 240)),
      el("span", { class: "signs" }, g.completions.map((c) => el("i", { class: `sign ${c.verdict}${c.weight === 0 ? " dropped" : ""}`, title: c.verdict }, VERDICTS[c.verdict] || "?"))),
      el("span", { class: "mean" }, mean(g.completions.map((c) => c.reward)).toFixed(2))))));
    group();
  }

  function pick(i) {
    state.prompt = i;
    for (const button of prompts.querySelectorAll("button")) button.toggleAttribute("aria-current", false);
    prompts.querySelector(`[data-prompt="${i}"]`)?.setAttribute("aria-current", "true");
    group();
  }
  prompts.addEventListener("keydown", (e) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (!by) return;
    e.preventDefault();
    const all = [...prompts.querySelectorAll("button")], next = all[all.indexOf(document.activeElement) + by];
    if (next) { next.focus(); pick(Number(next.dataset.prompt)); }
  });

  function group() {
    tip.hide();
    const g = data[state.prompt];
    if (!g) { shown.replaceChildren(el("p", { class: "none" }, "Nothing passes the filter.")); return; }
    history.replaceState(null, "", `#rollouts/${state.run}/${state.step}/${state.prompt}`);
    const keep = matches(g);
    shown.replaceChildren(
      el("div", { class: "prompt" }, el("h3", {}, "Prompt"), el("pre", { tabindex: 0 }, g.prompt),
        el("p", {}, "answer ", el("b", {}, g.answer), " · ", el("span", {}, g.source), g.keep < 1 ? ` · survived pruning with probability ${figure(g.keep)}` : "",
          g.replaced ? " · replaced by dynamic sampling, because its scores are equal" : "")),
      el("div", { class: "cards" }, g.completions.map((c) => completion(c, keep(c)))));
  }

  function completion(c, kept) {
    const label = `Completion ${c.index + 1}, ${c.verdict}`;
    const graded = () => typeof c.score === "number" && c.score !== Number(c.verdict === "right");
    const fact = (name, value, cls) => el("div", { class: cls }, el("dt", {}, name), el("dd", {}, value));
    return el("article", { class: `completion ${c.verdict}${c.weight === 0 ? " dropped" : ""}${kept ? "" : " faded"}`, "aria-label": label },
      el("header", {}, el("b", { class: `verdict ${c.verdict}` }, `${VERDICTS[c.verdict] || "?"} ${c.verdict}${graded() ? `, score ${figure(c.score)}` : ""}`), el("span", { class: "how" }, c.exit_reason.replace(/_/g, " "), c.finish === "length" ? " · cut at the limit" : ""), el("span", { class: "no" }, `#${c.index + 1}`)),
      el("dl", {}, fact("reward", figure(c.reward), "f-reward"), fact("advantage", (c.advantage > 0 ? "+" : "") + figure(c.advantage), "f-advantage"), fact("weight", c.weight === 0 ? "dropped" : figure(c.weight), "f-weight"), fact("tokens", figure(c.n), "f-tokens"), fact("steps", c.steps, "f-steps")),
      c.message ? el("p", { class: "message" }, c.message) : null,
      responseBody(c, tokens, { markers: runs[state.run].markers, colour: state.colour, query: state.query, label }));
  }

  async function searchAll() {
    if (!state.query) { hits.replaceChildren(el("p", { class: "none" }, "Type what to search for.")); return; }
    const run = state.run, query = state.query, found = [], dictionary = await table(run);
    let total = 0;
    for (const each of indexed[run]) {
      hits.replaceChildren(el("p", { class: "none" }, `searching step ${named(each)} …`));
      const groups = await chunk(`step-${run}-${each.key}`), parts = ownParts(groups.map((g) => g.prompt));
      groups.forEach((g, i) => {
        const n = g.completions.filter(matches(g, dictionary)).length;
        total += n;
        if (n && found.length < 200) found.push([each, i, n, parts[i]]);
      });
      if (query !== state.query || run !== state.run) return;
    }
    hits.replaceChildren(el("p", { class: "none" }, `${figure(total)} completions match in all steps${found.length === 200 ? "; the first 200 groups:" : ""}`),
      el("ul", {}, found.map(([each, i, n, part]) => el("li", {}, el("button", { type: "button", onclick: async () => { state.step = String(each.key); stepSelect.value = each.key; state.prompt = i; await load(); } }, `step ${named(each)} · ${n} × · ${part.slice(0, 60)}`)))));
  }

  const [, run, key, prompt] = location.hash.match(/^#rollouts\/(\d+)\/((?:eval-)?\d+)\/(\d+)$/) || [];
  if (run !== undefined && indexed[run]?.some((s) => String(s.key) === key)) Object.assign(state, { run: Number(run), step: key, prompt: Number(prompt) });
  runSelect.value = state.run;
  fillSteps();
  return load();
}
