// Begins: theme first, then curves, tables and the viewer's newest step. `data-ready` on <html> tells that all stand.

const themes = ["auto", "light", "dark"];
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("#theme").textContent = `Theme: ${name}`;
  try { localStorage.setItem("megarl-theme", name); } catch { /* a page from disk may have no storage */ }
}
let theme = "auto";
try { theme = localStorage.getItem("megarl-theme") || "auto"; } catch { /* as above */ }
setTheme(themes.includes(theme) ? theme : "auto");
$("#theme").addEventListener("click", () => setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]));

(async () => {
  const runs = await chunk("main");
  curves(runs);
  ledgers(runs);
  figures(runs);
  settingsFilter();
  await viewer(runs);
  document.documentElement.dataset.ready = "true";
})();
