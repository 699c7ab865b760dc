/* minilora: the pages of runs. Curves (drawn by uPlot), the map of the weights, and tokens; by mouse, touch or keys. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const make = (name, text = "", options = {}) => Object.assign(document.createElement(name), { textContent: text }, options);

  // --- Curves ---

  class Plot {
    constructor(figure) {
      this.figure = figure;
      this.chart = data.charts[figure.dataset.chart];
      this.log = this.chart.log;
      const tools = make("div", "", { className: "tools" });
      for (const [text, name, action] of [
        ["+", "zoom in", () => this.zoom(0.5)],
        ["−", "zoom out", () => this.zoom(2)],
        ["◀", "to the left", () => this.move(-0.4)],
        ["▶", "to the right", () => this.move(0.4)],
        ["all", "show all", () => this.show(...this.ends())],
      ]) {
        const button = make("button", text, { type: "button", title: name, onclick: action });
        button.setAttribute("aria-label", name);
        tools.append(button);
      }
      if (this.chart.series.every((one) => one.y.every((y) => y === null || y > 0))) {
        const label = make("label", " logarithmic"), box = make("input", "", { type: "checkbox", checked: this.log });
        box.onchange = () => { this.log = box.checked; this.draw(); };
        label.prepend(box);
        tools.append(label);
      }
      this.shown = make("output", "", { className: "note" });
      tools.append(this.shown);
      this.place = make("div");
      figure.append(tools, this.place);
      figure.addEventListener("keydown", (event) => this.key(event));
      this.draw();
      new ResizeObserver(() => this.plot.setSize(this.size())).observe(figure);
    }

    size() {
      return { width: Math.max(200, this.place.clientWidth), height: this.figure.dataset.chart === "rate" ? 150 : 260 };
    }

    draw() {
      const { x, series, x_label: xLabel } = this.chart;
      const axis = { stroke: color("--soft"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
      const whole = x.every(Number.isInteger);
      const number = (value) => (value == null ? "–" : Math.abs(value) < 0.01 && value ? value.toExponential(2) : value.toFixed(3));
      const options = {
        ...this.size(),
        hooks: { setScale: [(plot, key) => key === "x" && this.tell(plot.scales.x)] },
        cursor: { drag: { x: true, y: false } },
        scales: { x: { time: false, range: (plot, low, high) => [low, high], ...(this.chart.log_x ? { distr: 3, log: 2 } : {}) }, y: { distr: this.log ? 3 : 1 } },
        axes: [
          { ...axis, label: xLabel, labelSize: 22, size: 36, ...(whole && !this.chart.log_x ? { incrs: [1, 2, 5].flatMap((n) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6].map((p) => n * p)).sort((a, b) => a - b) } : {}) },
          { ...axis, size: 62, values: (plot, ticks) => ticks.map((tick) => (tick === null ? "" : String(+tick.toPrecision(3)))) },
        ],
        series: [
          { label: xLabel },
          ...series.map((one) => {
            const stroke = color(`--c${one.color % 8}`);
            return {
              label: one.label, stroke: one.faint ? stroke + "66" : stroke, width: one.line ? (one.faint ? 1 : 2) : 0, spanGaps: true,
              points: { show: one.dots, size: one.line ? 6 : 10, fill: stroke, stroke }, value: (plot, value) => number(value),
              paths: one.line ? undefined : () => null,
            };
          }),
        ],
      };
      this.plot?.destroy();
      this.plot = new uPlot(options, [x, ...series.map((one) => one.y)], this.place);
      for (const title of all(".u-legend .u-series:not(:first-child) th", this.place)) {
        title.tabIndex = 0;
        title.setAttribute("role", "button");
        title.onkeydown = (event) => { if (event.key === "Enter") title.click(); };
      }
      this.show(...this.ends());
    }

    ends() {
      const { x } = this.chart;
      if (this.chart.log_x) return [x[0] / 1.1, x.at(-1) * 1.1];
      const margin = x.length > 1 ? (x.at(-1) - x[0]) * 0.015 : 0.5;
      return [x[0] - margin, x.at(-1) + margin];
    }

    show(low, high) {
      const [first, last] = this.ends();
      const width = Math.min(high - low, last - first), start = Math.min(Math.max(low, first), last - width);
      this.plot.setScale("x", { min: start, max: start + width });
    }

    tell({ min, max }) {
      const ends = [Math.max(min, this.chart.x[0]), Math.min(max, this.chart.x.at(-1))];
      this.shown.textContent = `${this.chart.x_label} ${ends.map((x) => +x.toPrecision(3)).join(" to ")}`;
    }

    zoom(factor) {
      const { min, max } = this.plot.scales.x, index = this.plot.cursor.idx;
      const middle = index == null ? (min + max) / 2 : this.chart.x[index];
      const width = (max - min) * factor;
      this.show(middle - width / 2, middle + width / 2);
    }

    move(share) {
      const { min, max } = this.plot.scales.x;
      this.show(min + share * (max - min), max + share * (max - min));
    }

    read(step) {
      const { x } = this.chart, { plot } = this, { min, max } = plot.scales.x;
      const shown = x.map((value, i) => i).filter((i) => x[i] >= min && x[i] <= max);
      const now = plot.cursor.idx == null ? (step > 0 ? shown[0] - 1 : shown.at(-1) + 1) : plot.cursor.idx;
      const index = Math.min(Math.max(now + step, shown[0]), shown.at(-1));
      plot.setCursor({ left: plot.valToPos(x[index], "x"), top: plot.height / 3 });
    }

    key(event) {
      if (event.target !== this.figure || event.ctrlKey || event.metaKey || event.altKey) return;
      const action = {
        ArrowRight: () => (event.shiftKey ? this.move(0.4) : this.read(1)),
        ArrowLeft: () => (event.shiftKey ? this.move(-0.4) : this.read(-1)),
        "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), "−": () => this.zoom(2),
        0: () => this.show(...this.ends()), Home: () => this.show(...this.ends()),
      }[event.key];
      if (action) { event.preventDefault(); action(); }
    }
  }

  const plots = all(".plot").filter((figure) => figure.dataset.chart in data.charts).map((figure) => new Plot(figure));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.draw()));

  // --- Choices: what a part of the page shows ---

  for (const choice of all(".choice")) {
    choice.addEventListener("change", (event) => { choice.parentElement.dataset.show = event.target.value; });
  }

  // --- The map: a cell is chosen by a click, or by arrow keys and Enter ---

  function showCell(cell) {
    const figures = data.cells[cell.dataset.cell], map = cell.closest(".map"), detail = map.querySelector(".detail");
    all(".cell", map).forEach((other) => other.setAttribute("aria-pressed", other === cell));
    const percent = figures.ratio === null ? "–" : `${(100 * figures.ratio).toFixed(2)} %`;
    const rank = figures.effective_rank === null ? "not found: the matrices are too large" : figures.effective_rank.toFixed(2);
    detail.replaceChildren(
      make("h4", figures.module),
      make("div", `‖ΔW‖ ${figures.norm.toPrecision(4)}, ‖W‖ ${figures.weight_norm.toPrecision(4)}, ratio ${percent}; effective rank ${rank}`),
    );
    const values = figures.singular_values;
    if (!values.length) return;
    const bars = make("div", "", { className: "sigma" });
    bars.setAttribute("role", "list");
    bars.setAttribute("aria-label", "singular values of ΔW");
    values.forEach((value, i) => {
      const bar = make("i"), number = make("b", value.toPrecision(4));
      bar.style.setProperty("--share", values[0] ? value / values[0] : 0);
      number.setAttribute("role", "listitem");
      bars.append(make("span", `σ${i + 1}`), bar, number);
    });
    detail.append(bars);
  }

  for (const map of all(".map")) {
    const rows = all("tr", map).map((row) => all(".cell", row)).filter((row) => row.length);
    const cells = rows.flat();
    cells.forEach((cell, i) => { cell.tabIndex = i ? -1 : 0; cell.onclick = () => showCell(cell); });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      const row = rows.findIndex((cellsOfRow) => cellsOfRow.includes(event.target));
      if (!step || row < 0) return;
      event.preventDefault();
      const next = rows[row + step[0]]?.[Math.min(rows[row].indexOf(event.target) + step[1], (rows[row + step[0]]?.length ?? 0) - 1)];
      if (!next) return;
      cells.forEach((cell) => { cell.tabIndex = cell === next ? 0 : -1; });
      next.focus();
    });
  }

  // --- Tokens: one is chosen by a click, or by arrow keys once its row has the focus ---

  for (const row of all(".tokens")) {
    const tokens = all(".token[title]", row), output = row.closest(".shaded").querySelector("output");
    let active = -1;
    const choose = (index) => {
      active = Math.min(Math.max(index, 0), tokens.length - 1);
      all(".token.active").forEach((token) => token.classList.remove("active"));
      if (!tokens[active]) return;
      tokens[active].classList.add("active");
      output.textContent = `${JSON.stringify(tokens[active].textContent)}: ${tokens[active].title}`;
    };
    row.addEventListener("click", (event) => { const i = tokens.indexOf(event.target); if (i >= 0) choose(i); });
    row.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (step) { event.preventDefault(); choose(active < 0 ? 0 : active + step); }
    });
  }
})();
