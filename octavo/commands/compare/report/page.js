"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const runs = figures.runs.map((run) => ({ ...run, smoothed: new Map(run.smoothed), gaps: new Map(run.gaps) }));
  const charts = ["losses", "gaps", "gaps_close"].map((name) => document.getElementById(name));
  const reading = document.getElementById("reading");
  const hidden = new Set();

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.run;
      const off = !hidden.delete(name);
      if (off) hidden.add(name);
      button.classList.toggle("off", off);
      for (const line of document.querySelectorAll("g.line")) {
        if (line.dataset.run === name) line.style.display = off ? "none" : "";
      }
    });
  }

  const cursors = charts.map((chart) => {
    const [, , , , top, bottom] = chart.dataset.frame.split(" ").map(Number);
    const line = document.createElementNS(chart.namespaceURI, "line");
    for (const [key, value] of Object.entries({ y1: top, y2: bottom, stroke: "currentColor", opacity: 0.5 })) {
      line.setAttribute(key, value);
    }
    line.style.display = "none";
    chart.appendChild(line);
    return line;
  });

  const steps = [...new Set(runs.flatMap((run) => [...run.smoothed.keys()]))].sort((a, b) => a - b);
  const shown = (value, digits) => (value == null ? "–" : value.toFixed(digits));

  for (const [name, map] of Object.entries(figures.heatmaps)) {
    const chart = document.getElementById(name);
    const [left, top, cell, row] = chart.dataset.grid.split(" ").map(Number);
    const text = chart.querySelector(".reading");
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const scale = chart.viewBox.baseVal.width / box.width;
      const column = Math.floor(((event.clientX - box.left) * scale - left) / cell);
      const line = Math.floor(((event.clientY - box.top) * scale - top) / row);
      const value = map.values[line]?.[column];
      text.textContent = value == null ? "" : `${map.layers[line]}, step ${map.steps[column]}: ${value} ${map.unit}`;
    });
    chart.addEventListener("pointerleave", () => { text.textContent = ""; });
  }

  charts.forEach((chart) => {
    const [low, high, left, right] = chart.dataset.frame.split(" ").map(Number);
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const wanted = low + ((x - left) / (right - left)) * (high - low);
      const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a), steps[0]);
      charts.forEach((other, i) => {
        const [l, h, from, to] = other.dataset.frame.split(" ").map(Number);
        const at = from + ((step - l) / (h - l || 1)) * (to - from);
        cursors[i].setAttribute("x1", at);
        cursors[i].setAttribute("x2", at);
        cursors[i].style.display = "";
      });
      const parts = runs.filter((run) => !hidden.has(run.name)).map((run) => {
        const gap = run.gaps.get(step);
        return `${run.name} ${shown(run.smoothed.get(step), 4)}${gap == null ? "" : ` (${gap > 0 ? "+" : ""}${gap.toFixed(4)})`}`;
      });
      reading.textContent = `step ${step}: ${parts.join(", ")}`;
    });
    chart.addEventListener("pointerleave", () => {
      cursors.forEach((line) => { line.style.display = "none"; });
    });
  });
})();
