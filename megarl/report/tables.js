// The data ledger, every figure of a step, the settings' filter.

const FATES = { p: ["pruned", "k1"], r: ["replaced", "k4"], d: ["dropped", "k5"], t: ["trained", "k0"] };

function tableOf(head, rows, label) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, el("table", {}, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => (i ? el("td", {}, cell) : el("th", { scope: "row" }, cell))))))));
}

function ledgers(runs) {
  const body = $("#data .body");
  runs.forEach((r, i) => {
    if (runs.length > 1) body.append(el("h3", {}, r.name));
    const ledger = r.ledger;
    if (!ledger) { body.append(el("p", { class: "none" }, "No checkpoint yet, or none that holds a ledger.")); return; }
    const parts = Object.values(FATES).map(([name, key]) => ({ label: name, key, ys: ledger.fates[name] })).filter((p) => p.ys.some(Boolean));
    body.append(el("div", { class: "charts" }, stackedChart("Prompts by fate", ledger.step, parts),
      el("figure", { class: "card wide" }, el("figcaption", {}, el("h3", {}, "By epoch"), el("small", {}, `${figure(ledger.total)} prompts taken from the data`)),
        tableOf(["Epoch", "trained", "dropped", "pruned", "replaced", "repeated"], ledger.epochs.map((e) => [String(e.epoch), ...["trained", "dropped", "pruned", "replaced", "repeated"].map((k) => figure(e[k] || 0))]), `Ledger of ${r.name} by epoch`))));
    const out = el("div", {});
    const show = (text) => {
      const rows = ledger.rows.filter((row) => text === "" || row[1] === Number(text)).slice(-100).reverse();
      out.replaceChildren(rows.length ? tableOf(["Prompt", "step", "epoch", "fate", "completions", "trained"], rows.map(([step, index, epoch, fate, n, trained]) => [String(index), figure(step), String(epoch), FATES[fate][0], figure(n), figure(trained)]), `Ledger entries of ${r.name}`) : el("p", { class: "none" }, "That prompt was not taken yet."));
    };
    body.append(el("div", { class: "bar" }, el("label", {}, "Prompt number ", el("input", { type: "number", min: 0, class: "ledger-find", id: `ledger-${i}`, oninput: (e) => show(e.target.value) })), el("small", {}, "the newest 100 entries that match")), out);
    show("");
  });
}

function figures(runs) {
  const body = $("#figures .body"), all = [...new Set(runs.flatMap((r) => r.metrics.step))].sort((a, b) => a - b);
  const keys = [...new Set(runs.flatMap((r) => Object.keys(r.metrics)))].filter((k) => k !== "step");
  const out = el("div", {});
  const find = el("input", { type: "search", id: "f-find", oninput: () => show() });
  const select = el("select", { id: "f-step", onchange: () => show() }, all.map((s) => el("option", { value: s }, s)));
  const show = () => {
    const step = Number(select.value);
    const cells = keys.filter((k) => k.includes(find.value)).map((k) => [k, ...runs.map((r) => r.metrics[k]?.[r.metrics.step.indexOf(step)])]).filter((row) => row.slice(1).some((v) => v !== undefined && v !== null));
    out.replaceChildren(tableOf(["Key", ...runs.map((r) => r.name)], cells.map(([k, ...values]) => [el("code", {}, k), ...values.map((v) => (v === undefined || v === null ? "–" : Array.isArray(v) ? v.join(" ") : String(v)))]), "Figures of the step"));
  };
  select.value = all.at(-1);
  body.append(el("div", { class: "bar" }, el("label", {}, "Step ", select), el("label", {}, "Find ", find)), out);
  show();
}

function settingsFilter() {
  const changed = $("#changed"), find = $("#find-setting");
  const show = () => {
    for (const row of document.querySelectorAll("#settings tbody tr")) {
      row.hidden = (changed.checked && !find.value && !row.classList.contains("changed")) || !row.textContent.toLowerCase().includes(find.value.toLowerCase());
    }
  };
  changed.addEventListener("change", show);
  find.addEventListener("input", show);
  show();
}
