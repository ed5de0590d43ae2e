"use strict";
const all = (what, where = document) => [...where.querySelectorAll(what)];

// Tables: a click on a head sorts, the better end first; a second click turns the order round. Unknown values stay last.
for (const head of all(".sortable th[data-sort]")) {
  head.querySelector("button").addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const turned = { ascending: "descending", descending: "ascending" };
    const order = head.ariaSort ? turned[head.ariaSort] : head.dataset.sort;
    for (const other of all("th[data-sort]", table)) other.ariaSort = null;
    head.ariaSort = order;
    const value = (row) => row.cells[column].dataset.v ?? "";
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
    });
    body.append(...rows);
  });
}

// Figures with a choice: one of the plots is shown.
for (const figure of all(".chooser")) {
  const selects = all("select", figure), none = figure.querySelector(".none-chosen");
  const choose = () => {
    const key = selects.map((select) => select.value).join("/");
    let found = false;
    for (const plot of all("[data-plot]", figure)) found = !(plot.hidden = plot.dataset.plot !== key) || found;
    if (none) none.hidden = found;
  };
  for (const select of selects) select.addEventListener("change", choose);
  choose();
}

// Hovering over a row of the table, a name or a mark brings that row out in every plot.
const tip = document.querySelector(".tip");
for (const part of all("[data-g], [data-tip]")) {
  part.addEventListener("pointerenter", () => {
    if (!part.dataset.g) return;
    const groups = part.dataset.g.split(" ");
    document.body.classList.add("focus");
    for (const g of all(".plot [data-g]")) g.classList.toggle("on", g.dataset.g.split(" ").some((own) => groups.includes(own)));
  });
  part.addEventListener("pointerleave", () => {
    document.body.classList.remove("focus");
    tip.hidden = true;
  });
  if (part.dataset.tip) part.addEventListener("pointermove", (event) => {
    tip.textContent = part.dataset.tip;
    tip.hidden = false;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
  });
}

// Videos play in step while they are on the screen; who asked for less motion starts them.
const button = document.querySelector(".pause");
if (button) {
  const videos = all("video");
  const visible = new Set();
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const apply = () => {
    button.textContent = playing ? "Pause" : "Play";
    button.ariaPressed = String(!playing);
    for (const video of videos) {
      if (playing && visible.has(video)) video.play().catch(() => {});
      else video.pause();
    }
  };
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        target.currentTime = [...visible][0]?.currentTime ?? 0;
        visible.add(target);
      } else visible.delete(target);
    }
    apply();
  });
  for (const video of videos) watch.observe(video);
  button.addEventListener("click", () => { playing = !playing; apply(); });
}
