"use strict";
/* Language, CSV, the order of replies, the tokens. Text of models is only ever set as textContent. */
const byId = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const parsed = (id) => (byId(id) ? JSON.parse(byId(id).textContent) : null);

function speak(language) {
  document.documentElement.lang = language;
  byId("language").textContent = language === "zh" ? "English" : "中文";
}
speak((navigator.language || "").startsWith("zh") ? "zh" : "en");
byId("language").addEventListener("click", () => speak(document.documentElement.lang === "zh" ? "en" : "zh"));

const charts = parsed("numbers-of-charts") || {};
const quoted = (value) => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : String(value));
function csv(chart) {
  const ends = chart.series.some((one) => one[3].length);
  const rows = [["series", chart.x, chart.y, ...(ends ? ["low", "high"] : [])]];
  for (const [label, x, y, low, high] of chart.series) {
    x.forEach((at, i) => rows.push([label, at, y[i], ...(ends ? [low[i] ?? "", high[i] ?? ""] : [])]));
  }
  return rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
}
all("[data-csv]").forEach((button) => {
  const chart = charts[button.dataset.csv];
  button.setAttribute("aria-label", `CSV: ${chart.name}`);
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(chart)], { type: "text/csv" }));
    link.download = `${chart.name.replace(/[^\w.-]/g, "-")}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
});

const replies = all(".reply");
if (replies.length) {
  const show = () => {
    const words = byId("search").value.toLowerCase();
    replies.forEach((one) => { one.hidden = !one.textContent.toLowerCase().includes(words); });
    byId("count").textContent = `${replies.filter((one) => !one.hidden).length} / ${replies.length}`;
  };
  byId("search").addEventListener("input", show);
  show();
  const rank = { rises: (one) => -one.dataset.gain, falls: (one) => +one.dataset.gain, given: (one) => +one.dataset.number };
  const buttons = all("[data-order]");
  buttons.forEach((button) => button.addEventListener("click", () => {
    const by = rank[button.dataset.order];
    for (const home of new Set(replies.map((one) => one.parentElement))) {
      const own = replies.filter((one) => one.parentElement === home);
      own.sort((a, b) => by(a) - by(b)).forEach((one) => home.append(one));
    }
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
  }));
  buttons[0].setAttribute("aria-pressed", "true");
}

const samples = parsed("samples");
if (samples) {
  const columns = all("[data-column]").map((one) => one.dataset.column);
  let column = columns[0];
  const shown = (value) => (typeof value === "number" ? String(value) : "-");
  const numbers = (tokens, i) => {
    const parts = columns.filter((name) => tokens[name]).map((name) => `${name} ${shown(tokens[name][i])}`);
    byId("numbers").textContent = `${JSON.stringify(tokens.pieces[i])} (${i + 1} / ${tokens.pieces.length}): ${parts.join(" · ")}`;
  };
  const draw = () => {
    const sample = samples[byId("sample").value];
    const values = sample.tokens[column] || [];
    const largest = Math.max(...values.map(Math.abs), 1e-9);
    byId("tokens").replaceChildren(...sample.tokens.pieces.map((piece, i) => {
      const token = document.createElement("button");
      token.type = "button";
      token.textContent = piece.replaceAll("\n", "⏎");
      token.tabIndex = i ? -1 : 0;
      const strength = Math.abs(values[i] ?? 0) / largest * 0.4;
      token.style.backgroundColor = `rgb(var(--${(values[i] ?? 0) < 0 ? "down" : "up"}) / ${strength.toFixed(3)})`;
      token.addEventListener("mouseenter", () => numbers(sample.tokens, i));
      token.addEventListener("focus", () => numbers(sample.tokens, i));
      return token;
    }));
    byId("numbers").textContent = `${sample.prompt} → score ${shown(sample.score)}, KL ${shown(sample.kl)}`;
    all("[data-column]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.column === column)));
  };
  byId("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const tokens = [...byId("tokens").children], next = tokens[tokens.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    event.preventDefault();
    tokens.forEach((one) => { one.tabIndex = one === next ? 0 : -1; });
    next.focus();
  });
  samples.forEach((one, i) => byId("sample").append(new Option(`${one.run ? one.run + ", " : ""}step ${one.step}: ${one.text.slice(0, 40)}`, i)));
  byId("sample").value = String(samples.length - 1);
  byId("sample").addEventListener("change", draw);
  all("[data-column]").forEach((one) => one.addEventListener("click", () => { column = one.dataset.column; draw(); }));
  draw();
}
