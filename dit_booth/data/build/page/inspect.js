"use strict";
const { rows, dials } = JSON.parse(document.getElementById("data").textContent);
const BINS = 32;
const byId = (id) => document.getElementById(id);
const thresholds = dials.map((d) => d.value);
// Reasons that no dial decides (duplicates, cuts, watermarks) stay as the build found them.
const FIELD_REASONS = new Set(["small", "large", "border", "no motion", "still", "blurred"]);
for (const row of rows) row.others = row.reasons.filter((reason) => !FIELD_REASONS.has(reason));

const passes = (row, i) =>
  dials[i].keep === "above" ? row[dials[i].field] >= thresholds[i] : row[dials[i].field] <= thresholds[i];
const failed = (row) => dials.filter((_, i) => !passes(row, i)).map((d) => d.setting);
const isKept = (row) => !row.others.length && dials.every((_, i) => passes(row, i));
const number = (value) => (Math.abs(value) >= 10 ? value.toFixed(0) : value.toPrecision(2));

function ranges(field) {
  // A few extreme values must not squeeze all others into one bar.
  const values = rows.map((row) => row[field]).sort((a, b) => a - b);
  const high = values.length ? values[Math.min(values.length - 1, Math.floor(0.98 * values.length))] : 1;
  return [0, Math.max(high, ...dials.filter((d) => d.field === field).map((d) => 1.25 * d.value), 1e-6)];
}

function makeDial(dial, i) {
  const [low, high] = ranges(dial.field);
  const label = document.createElement("label");
  label.className = "dial";
  label.innerHTML = `<svg viewBox="0 0 ${BINS} 20" preserveAspectRatio="none" aria-hidden="true"></svg>
    <input type="range" min="${low}" max="${high}" step="${dial.field === "sides" ? 1 : (high - low) / 200}">
    <span><output></output>${dial.label}</span>`;
  const input = label.querySelector("input");
  input.value = dial.value;
  input.addEventListener("input", () => { thresholds[i] = Number(input.value); update(); });
  label.querySelector("output").textContent = number(dial.value);
  byId("dials").append(label);
  return () => {
    label.querySelector("output").textContent = number(thresholds[i]);
    const counts = Array.from({ length: BINS }, () => [0, 0]);
    for (const row of rows) {
      const bin = Math.min(BINS - 1, Math.max(0, Math.floor((BINS * (row[dial.field] - low)) / (high - low))));
      counts[bin][passes(row, i) ? 0 : 1] += 1;
    }
    const top = Math.max(1, ...counts.map(([a, b]) => a + b));
    label.querySelector("svg").innerHTML = counts.map(([kept, dropped], x) => {
      const a = (19 * kept) / top, b = (19 * dropped) / top;
      return `<rect x="${x + 0.08}" width=".84" y="${20 - a}" height="${a}" fill="var(--keep)"/>` +
        `<rect x="${x + 0.08}" width=".84" y="${20 - a - b}" height="${b}" fill="var(--drop)"/>`;
    }).join("");
  };
}

function makeCard(row) {
  const card = document.createElement("article"), about = document.createElement("div");
  about.className = "about";
  const text = (tag, value, name = "") => {
    const node = document.createElement(tag);
    node.textContent = value;
    node.className = name;
    about.append(node);
    return node;
  };
  const picture = (source, alt) => {
    if (!source) return;
    const image = new Image();
    image.loading = "lazy";
    image.decoding = "async";
    image.alt = `${alt}: ${row.caption}`;
    image.src = source;
    card.append(image);
  };
  picture(row.clip, "the clip");
  card.append(about);
  picture(row.still, "mask on the first frame, and image prompt");
  text("b", row.subject);
  text("small", row.caption);
  text("small", `${row.videoid} · area ${number(row.area)} · sides ${row.sides} · motion ${number(row.motion)} · ` +
    `change ${number(row.change)} · sharpness ${number(row.sharpness)}`);
  row.why = text("small", "", "why");
  if (row.details || row.error) text("small", row.details || row.error);
  return card;
}

const refresh = dials.map(makeDial);
for (const row of rows) row.card = makeCard(row);
dials.forEach((dial, i) => {
  const option = document.createElement("option");
  option.value = i;
  option.textContent = `nearest to ${dial.setting}`;
  byId("order").append(option);
});

let waiting = false;
function update() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function draw() {
  refresh.forEach((f) => f());
  const kept = rows.filter(isKept);
  byId("kept").textContent = `${kept.length} of ${rows.length} measured clips are kept.`;
  const changed = dials.filter((d, i) => d.value !== thresholds[i]);
  byId("flags").textContent = changed.map((d) => `--filters.${d.setting.replaceAll("_", "-")} ${number(thresholds[dials.indexOf(d)])}`).join(" ");
  const show = byId("show").value, order = byId("order").value;
  let list = rows.filter((row) => show === "all" || isKept(row) === (show === "kept"));
  if (order !== "") {
    const { field } = dials[order], at = thresholds[order];
    list = [...list].sort((a, b) => Math.abs(a[field] - at) - Math.abs(b[field] - at));
  }
  for (const row of rows) {
    const keep = isKept(row);
    row.card.className = keep ? "card" : "card dropped";
    row.why.textContent = keep ? "" : [...row.others, ...failed(row)].join(", ");
  }
  byId("count").textContent = `${list.length} clips`;
  const shown = byId("cards");
  if (list.length !== shown.children.length || list.some((row, i) => shown.children[i] !== row.card))
    shown.replaceChildren(...list.map((row) => row.card));
}
byId("show").addEventListener("change", update);
byId("order").addEventListener("change", update);
draw();
