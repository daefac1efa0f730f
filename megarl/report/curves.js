// Which figures are drawn where. A key that no chart names ends up in a chart of its own, under Time and memory.

const KEYS = ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"];
const CURVES = [  // section, title, [[key, label]…], options; a figure is not drawn where it equals the one that `unlike` names
  ["learning", "Reward", [["reward"]]],
  ["learning", "Reward's standard deviation", [["reward_std"]], { note: "over all completions of the step" }],
  ["learning", "Groups of equal rewards", [["equal_groups"]], { percent: true, note: "nothing is learned from them" }],
  ["learning", "Accuracy", [["accuracy", "training"], ["eval/accuracy", "held-out"]], { percent: true }],
  ["learning", "Score", [["score", "training"], ["eval/score", "held-out"]], { unlike: { score: "accuracy", "eval/score": "eval/accuracy" }, note: "mean of the graders' numbers" }],
  ["learning", "Response tokens", [["response_tokens", "training"], ["eval/response_tokens", "held-out"]]],
  ["learning", "Steps a response", [["steps_per_response", "training"], ["eval/steps_per_response", "held-out"]]],
  ["learning", "Cut at the length limit", [["overlong", "training"], ["eval/overlong", "held-out"]], { percent: true }],
  ["learning", "Answers in the right form", [["eval/formatted", "held-out"]], { percent: true }],
  ["learning", "Loss", [["loss", "training"], ["eval/loss", "held-out"]]],
  ["learning", "Policy loss, penalties apart", [["policy_loss"]], { unlike: { policy_loss: "loss" } }],
  ["learning", "Entropy", [["entropy"]]],
  ["learning", "KL to the reference", [["kl"]]],
  ["learning", "Gradient norm", [["grad_norm"]]],
  ["learning", "Ratio of new to old policy", [["ratio_mean", "mean"]]],
  ["learning", "Clipped tokens", [["clip_fraction", "all"], ["clip_low_fraction", "below"], ["clip_high_fraction", "above"]], { percent: true }],
  ["learning", "Learning rate", [["lr"]]],
  ["step-grpo", "Early exits", [["early_exit_fraction"]], { percent: true, note: "share of completions that ended at a marker" }],
  ["step-grpo", "Confident exits that are right", [["exits_right"]], { percent: true }],
  ["step-grpo", "Calibration error", [["probe_calibration_error"]], { note: "expected, over ten bins" }],
  ["step-grpo", "Tokens: saved and spent", [["tokens_saved", "saved (estimate)"], ["probe_tokens", "probes"], ["discarded_tokens", "cut off"]]],
  ["step-grpo", "Probes a completion", [["probes_per_completion"]]],
  ["dppo", "Prompts", [["prompts_drawn", "drawn"], ["prompts_pruned", "pruned"], ["prompts_replaced", "replaced"]]],
  ["dppo", "Completions not trained", [["completions_dropped", "dropped"], ["completions_replaced", "replaced"]]],
  ["dppo", "Effective sample size", [["effective_sample_size"]]],
  ["dppo", "Added variance", [["added_variance"]]],
  ["dppo", "Packing density", [["packing_density"]], { percent: true }],
  ["dppo", "Tokens a step", [["tokens_generated", "generated"], ["tokens_trained", "trained"]]],
  ["machine", "Seconds a step", [["seconds_total"]]],
  ["machine", "Memory", [["memory_gib"]], { note: "GiB at the peak, of the controller's rank", exact: true }],
  ["machine", "Mismatch: train against rollout log-probs", [["mismatch_mean", "mean"], ["mismatch_max", "largest"]], { log: true }],
  ["machine", "Mismatch: KL", [["mismatch_kl"]]],
  ["machine", "Canary after the weight sync", [["canary_difference", "largest difference"], ["canary_rounding", "explained by rounding"]]],
  ["machine", "Staleness of trained tokens", [["staleness_mean", "mean"], ["staleness_max", "largest"]], { note: "updates between sampling and training", exact: true }],
  ["machine", "Weight version of the rollouts", [["weight_version"]], { exact: true }],
];
const PHASE = /^seconds_(?!total$)(.+)/, EXIT = /^exits\/(.+)/, BIN = /^probe_confidence\/([\d.]+)$/;
const STACKED = /^(nll$|verdict_|seconds_|exits\/|probe_confidence\/|eval\/completions$|eval\/score_std$|mismatch_tokens$|step$)/;

/** The x values of a run under each choice of axis. */
function abscissae(metrics) {
  const running = (ys, unit) => { let sum = 0; return ys.map((v) => (sum += (v || 0) / unit)); };
  const all = { step: metrics.step, hours: running(metrics.seconds_total || metrics.step, 3600), tokens: running(metrics.tokens_generated || metrics.step, 1) };
  return (name) => all[name];
}

const drawable = (ys) => ys && ys.some((v) => typeof v === "number");

function curves(runs) {
  const xs = runs.map((r) => abscissae(r.metrics)), several = runs.length > 1;
  const place = (section, node) => $(`#${section} .charts`).append(node);
  const used = new Set(["step"]);
  const lineFor = (r, i, key, label, colour) => {
    const ys = runs[i].metrics[key];
    const sparse = key.startsWith("eval/");
    return { label: several ? `${r.name}${label ? `, ${label}` : ""}` : label, key: colour, steps: r.metrics.step, xs: xs[i], ys, marks: sparse };
  };
  // In a comparison a run keeps its colour, also for its held-out points; further lines of a chart take the next ones.
  const colourOf = (key, i, j) => KEYS[!several ? j : key.startsWith("eval/") ? i % 8 : (i + j * runs.length) % 8];
  const chart = (section, title, keys, options) => {
    const lines = [];
    keys.forEach(([key, label], j) => {
      used.add(key);
      runs.forEach((r, i) => {
        const ys = r.metrics[key], twin = r.metrics[options.unlike?.[key]];
        if (drawable(ys) && !(twin && ys.every((v, at) => v === twin[at]))) lines.push(lineFor(r, i, key, label || (several ? "" : title.toLowerCase()), colourOf(key, i, j)));
      });
    });
    if (lines.length) place(section, lineChart(title, lines, options));
  };
  for (const [section, title, keys, options] of CURVES) chart(section, title, keys, options || {});

  runs.forEach((r, i) => {
    const m = r.metrics, named = (title) => (several ? `${title}, ${r.name}` : title);
    // Step 0 is an evaluation: it has none of these.
    const rows = m.step.map((_, at) => at).filter((at) => typeof m.reward?.[at] === "number");
    const steps = rows.map((at) => m.step[at]), column = (key) => rows.map((at) => m[key][at]);
    const parts = (keys, colours) => keys.map(([key, label], j) => ({ label, key: colours[j % colours.length], ys: column(key) })).filter((p) => p.ys.some(Boolean));
    const stacked = (section, title, keys, colours, options) => {
      const found = parts(keys.filter(([key]) => m[key]), colours);
      if (found.length) place(section, stackedChart(named(title), steps, found, options));
    };
    stacked("learning", "Verdicts", ["right", "wrong", "timeout", "error"].map((v) => [`verdict_${v}`, v]), ["right", "wrong", "timeout", "error"]);
    stacked("step-grpo", "How thoughts ended", Object.keys(m).filter((k) => EXIT.test(k)).map((k) => [k, EXIT.exec(k)[1].replace(/_/g, " ")]), KEYS);
    stacked("machine", "Phases of a step", Object.keys(m).filter((k) => PHASE.test(k)).map((k) => [k, PHASE.exec(k)[1]]), KEYS, { unit: " s", note: "seconds" });
  });

  const bins = (r, from, to) => Object.keys(r.metrics).filter((k) => BIN.test(k)).sort().map((k) => r.metrics[k].slice(from, to).reduce((a, v) => a + (v || 0), 0));
  const sets = runs.flatMap((r, i) => {
    const n = r.metrics.step.length, half = Math.floor(n / 2);
    if (several) return [{ label: r.name, key: KEYS[i % 6], counts: bins(r, 0, n) }];
    return [{ label: "first half of the run", key: "k5", counts: bins(r, 0, half) }, { label: "second half", key: "k0", counts: bins(r, half, n) }];
  }).filter((s) => s.counts.some(Boolean));
  if (sets.length) place("step-grpo", histogram("Probe confidence", sets, "share of probes, by tenths"));
  const calibrated = runs.map((r, i) => ({ label: r.name, key: KEYS[i % 6], rows: r.calibration })).filter((s) => s.rows.length);
  if (calibrated.length) place("step-grpo", calibrationChart(calibrated));

  // Anything else that is a number: memory first, then what later versions may add.
  const rest = [...new Set(runs.flatMap((r) => Object.keys(r.metrics)))].filter((k) => !used.has(k) && !STACKED.test(k) && runs.some((r) => drawable(r.metrics[k])));
  rest.sort((a, b) => Number(/memory|bytes|gib/i.test(b)) - Number(/memory|bytes|gib/i.test(a)));
  for (const key of rest) chart(key.startsWith("probe") ? "step-grpo" : key.startsWith("eval/") ? "learning" : "machine", key.replace(/[_/]/g, " "), [[key]], {});
  for (const grid of document.querySelectorAll(".charts")) if (!grid.children.length) grid.append(el("p", { class: "none" }, "Nothing recorded."));

  $("#x").addEventListener("change", (e) => { axis.x = e.target.value; for (const c of axis.charts) c.draw(); });
  $("#smooth").addEventListener("input", (e) => { axis.smooth = Number(e.target.value); for (const c of axis.charts) c.draw(); });
  $("#axis").addEventListener("submit", (e) => e.preventDefault());
}
