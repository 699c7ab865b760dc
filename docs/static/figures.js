// The figures that a reader can move. Their numbers stand in the page, made by minilora/book/numbers.py.

const NEGATIVE = [47, 123, 193], POSITIVE = [226, 104, 36];

// --- Numbers ---

function unpacked({ shape, largest, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const shares = new Int16Array(bytes.buffer);
  const size = shape.slice(-2)[0] * shape.slice(-1)[0];
  const matrices = [];
  for (let start = 0; start < shares.length; start += size) {
    const values = Float64Array.from(shares.subarray(start, start + size), (share) => (share / 32767) * largest);
    matrices.push({ rows: shape.at(-2), columns: shape.at(-1), values });
  }
  return matrices;
}

const entrywise = (P, Q, f) => ({ ...P, values: P.values.map((p, i) => f(p, Q.values[i])) });
const minus = (P, Q) => entrywise(P, Q, (p, q) => p - q);
const norm = (P) => Math.hypot(...P.values);
const largest = (matrices) => Math.max(1e-30, ...matrices.map((P) => P.values.reduce((m, v) => Math.max(m, Math.abs(v)), 0)));

function transposed(P) {
  const values = P.values.map((_, i) => P.values[(i % P.rows) * P.columns + Math.floor(i / P.rows)]);
  return { rows: P.columns, columns: P.rows, values };
}

// Σ_k factor_k P[:, k] Q[k, :] over the first `rank` k
function product(P, Q, factors, rank) {
  const values = new Float64Array(P.rows * Q.columns);
  for (let i = 0; i < P.rows; i++)
    for (let k = 0; k < rank; k++) {
      const p = factors[k] * P.values[i * P.columns + k];
      if (p) for (let j = 0; j < Q.columns; j++) values[i * Q.columns + j] += p * Q.values[k * Q.columns + j];
    }
  return { rows: P.rows, columns: Q.columns, values };
}

// --- Drawing ---

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "circle", "rect", "text", "line"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A picture of a matrix, a cell for each number: blue below zero, orange above, the page's own colour at zero.
function heatMap(title, scale, height) {
  const canvas = element("canvas", { role: "img", "aria-label": title, style: `height: ${height}rem` });
  const caption = element("span", { class: "caption" });
  const draw = (matrix, words) => {
    caption.textContent = words;
    canvas.width = matrix.columns;
    canvas.height = matrix.rows;
    const zero = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number);
    const pixels = new ImageData(matrix.columns, matrix.rows);
    matrix.values.forEach((value, i) => {
      const end = value < 0 ? NEGATIVE : POSITIVE, share = Math.min(1, Math.abs(value) / scale) ** 0.6;
      for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = zero[c] + share * (end[c] - zero[c]);
      pixels.data[4 * i + 3] = 255;
    });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  };
  return { draw, box: element("div", { class: "map" }, element("b", {}, title), " ", caption, canvas) };
}

// A curve on a logarithmic axis of losses, with a mark that moves.
function curve(label, losses, names) {
  const [width, height, left, bottom] = [520, 180, 44, 26];
  const logs = losses.map(Math.log), low = Math.min(...logs), high = Math.max(...logs);
  const x = (i) => left + 8 + (i / (losses.length - 1)) * (width - left - 24);
  const y = (log) => 26 + ((high - log) / (high - low)) * (height - bottom - 38);
  const mark = element("circle", { r: 6, class: "mark" }), value = element("text", { class: "value" });
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
    element("path", { class: "curve", d: "M" + logs.map((log, i) => `${x(i)},${y(log)}`).join("L") }),
    ...logs.map((log, i) => element("circle", { cx: x(i), cy: y(log), r: 2.5, class: "point" })),
    ...names.map((name, i) => element("text", { x: x(i), y: height - 6, "text-anchor": "middle" }, name)),
    ...[losses[logs.indexOf(high)], losses[logs.indexOf(low)]].map((loss) =>
      element("text", { x: left, y: y(Math.log(loss)) + 4, "text-anchor": "end" }, loss.toFixed(2))),
    mark, value);
  const move = (i) => {
    mark.setAttribute("cx", x(i));
    mark.setAttribute("cy", y(logs[i]));
    value.textContent = losses[i].toFixed(3);
    value.setAttribute("text-anchor", i > losses.length / 2 ? "end" : "start");
    value.setAttribute("x", x(i) + (i > losses.length / 2 ? -2 : 10));
    value.setAttribute("y", y(logs[i]) - 9);
  };
  return { move, box: element("div", { class: "map" }, element("b", {}, label), svg) };
}

function bars(label, heights) {
  const width = 520 / heights.length, top = Math.max(...heights);
  const all = heights.map((h, i) =>
    element("rect", { x: i * width + 0.5, width: width - 1, y: 90 - (85 * h) / top, height: (85 * h) / top }));
  const svg = element("svg", { viewBox: "0 0 520 92", role: "img", "aria-label": label }, ...all);
  const keep = (rank) => all.forEach((bar, i) => bar.setAttribute("class", i < rank ? "kept" : "left-out"));
  return { keep, box: element("div", { class: "map" }, element("b", {}, label), svg) };
}

// --- The two figures: each gives its parts, its slider's length and words, and how to show a place of the slider ---

function firstSteps(numbers) {
  const { A, B, dA, dB } = Object.fromEntries(Object.entries(numbers.arrays).map(([k, v]) => [k, unpacked(v)]));
  const moved = A.map((a) => minus(a, A[0])), across = [B, dB].map((list) => list.map(transposed));
  const ones = new Float64Array(A[0].rows).fill(numbers.scale);
  const changes = A.map((a, i) => product(B[i], a, ones, a.rows));
  const maps = [
    ["Bᵀ", across[0], 4], ["dBᵀ", across[1], 4], ["A − A₀", moved, 4], ["dA", dA, 4],
  ].map(([title, list, height]) => [list, heatMap(title, largest(list), height)]);
  const change = heatMap("ΔW = s B A", largest(changes), 8);
  const loss = curve("loss on the batch", numbers.losses, numbers.losses.map((_, i) => i));
  const said = [
    "B is zero, so dA is exactly zero and ΔW too: the model is the base. Only B has a gradient.",
    "B has left zero: AdamW moves each number by the learning rate, up or down. A has not moved yet, but now dA is not zero.",
    "A moves too. From here on both move at every step.",
  ];
  return {
    parts: [element("div", { class: "pairs" }, ...maps.map(([, map]) => map.box)), change.box, loss.box],
    places: numbers.losses.map((_, i) => `after ${i} step${i === 1 ? "" : "s"}`),
    show(i) {
      for (const [list, map] of maps) map.draw(list[i], `‖·‖ = ${norm(list[i]).toPrecision(3)}`);
      change.draw(changes[i], `‖·‖ = ${norm(changes[i]).toPrecision(3)}`);
      loss.move(i);
      return said[i] ?? `‖ΔW‖ is ${norm(changes[i]).toPrecision(3)}, the loss ${numbers.losses[i].toFixed(3)}.`;
    },
  };
}

function rankAgainstLoss(numbers) {
  const [[U], [Vt]] = [unpacked(numbers.arrays.U), unpacked(numbers.arrays.Vt)];
  const { sigma, ranks, losses } = numbers;
  const of_rank = (rank) => product(U, Vt, sigma, Math.min(rank, sigma.length));
  const whole = of_rank(sigma.length), scale = largest([whole]);
  const [kept, rest] = [heatMap("kept", scale, 8), heatMap("cut away", scale, 8)];
  const values = bars("its singular values", sigma);
  const loss = curve("held-out loss of the model, every ΔW cut to rank r", losses,
    ranks.map((rank, i) => (i === ranks.length - 1 ? "all" : rank)));
  const squares = sigma.map((value) => value ** 2), total = squares.reduce((a, b) => a + b);
  return {
    parts: [element("div", { class: "pairs" }, kept.box, rest.box), values.box, loss.box],
    places: ranks.map((rank, i) => (i === ranks.length - 1 ? "all of ΔW" : `rank ${rank}`)),
    start: ranks.indexOf(8),
    show(i) {
      const rank = Math.min(ranks[i], sigma.length), matrix = of_rank(rank);
      const share = squares.slice(0, rank).reduce((a, b) => a + b, 0) / total;
      kept.draw(matrix, "");
      rest.draw(minus(whole, matrix), "");
      values.keep(rank);
      loss.move(i);
      const gain = (losses[0] - losses[i]) / (losses[0] - losses.at(-1));
      return `${(100 * share).toFixed(0)} % of ‖ΔW‖² are kept at this weight, ${(100 * gain).toFixed(0)} % of the gain in loss.`;
    },
  };
}

function bringToLife(figure) {
  const make = { "first-steps": firstSteps, "rank-against-loss": rankAgainstLoss }[figure.dataset.figure];
  const { parts, places, show, start = 0 } = make(JSON.parse(figure.querySelector("script").textContent));
  const slider = element("input", { type: "range", min: 0, max: places.length - 1, value: start });
  const place = element("output"), words = element("p", { "aria-live": "polite" });
  slider.setAttribute("aria-label", figure.querySelector("img").alt);
  const redraw = () => {
    place.textContent = places[slider.value];
    slider.setAttribute("aria-valuetext", places[slider.value]);
    words.textContent = show(Number(slider.value));
  };
  slider.addEventListener("input", redraw);
  new MutationObserver(redraw).observe(document.body, { attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  figure.querySelector("img").remove();
  figure.prepend(element("label", {}, slider, place), words, ...parts);
  redraw();
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("figure.live").forEach(bringToLife));
