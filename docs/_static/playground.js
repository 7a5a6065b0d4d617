// A bell, its thresholds and its codes, as the sliders say. No library, no network.
"use strict";

const ROWS = 32, COLUMNS = 256;
const at = (id) => document.getElementById(id);

/** The normal distribution function (Abramowitz and Stegun 7.1.26, wrong by 1.5e-7 at most). */
function phi(v) {
  const x = Math.abs(v) / Math.SQRT2, t = 1 / (1 + 0.3275911 * x);
  const tail = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const erf = 1 - tail * Math.exp(-x * x);
  return v < 0 ? (1 - erf) / 2 : (1 + erf) / 2;
}

/** Where phi is p, by halving. */
function quantile(p) {
  let low = -8, high = 8;
  for (let i = 0; i < 60; i++) {
    const middle = (low + high) / 2;
    if (phi(middle) < p) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

const density = (v) => Math.exp(-v * v / 2) / Math.sqrt(2 * Math.PI);

/** Standard normal numbers, the same ones each time: equal shares of the bell in a shuffled order. */
function draws(count) {
  const values = Array.from({ length: count }, (_, i) => quantile((i + 0.5) / count));
  let state = 12345;
  for (let i = count - 1; i > 0; i--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = state % (i + 1);
    [values[i], values[j]] = [values[j], values[i]];
  }
  return values;
}

/** Squared error of n even levels, a step apart, on the bell. */
function errorOf(n, step) {
  let sum = 0, weight = 0;
  for (let v = -5; v <= 5; v += 0.02) {
    const code = Math.min(n - 1, Math.max(0, Math.floor(v / step + n / 2)));
    sum += density(v) * (v - (code + 0.5 - n / 2) * step) ** 2;
    weight += density(v);
  }
  return sum / weight;
}

/** The n - 1 thresholds of a method. */
function thresholds(method, n) {
  if (method === "bbq") return Array.from({ length: n - 1 }, (_, i) => quantile((i + 1) / n));
  let best = 0.05;
  for (let step = 0.05; step < 3; step += 0.01) if (errorOf(n, step) < errorOf(n, best)) best = step;
  return Array.from({ length: n - 1 }, (_, i) => (i + 1 - n / 2) * best);
}

const GIVEN = draws(ROWS * COLUMNS);

/** Values over their root mean square: of each row, or of all. */
function normalised(spread, scale) {
  const rows = Array.from({ length: ROWS }, (_, r) =>
    GIVEN.slice(r * COLUMNS, (r + 1) * COLUMNS).map((v) => v * Math.exp(spread / 10 * Math.sin(r * 2.4))));
  const rms = (all) => Math.sqrt(all.reduce((sum, v) => sum + v * v, 0) / all.length);
  const together = rms(rows.flat());
  return rows.flatMap((row) => row.map((v) => v / (scale === "token" ? rms(row) : together)));
}

function shape(svg, name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  svg.append(made);
  return made;
}

const across = (v) => 160 + v * 40;

function draw() {
  const n = Number(at("play-n").value), spread = Number(at("play-spread").value);
  const cuts = thresholds(at("play-method").value, n);
  const values = normalised(spread, at("play-scale").value);
  const codes = new Array(n).fill(0);
  for (const v of values) codes[cuts.filter((t) => v >= t).length]++;
  const shares = codes.map((count) => count / values.length);
  const entropy = -shares.reduce((sum, p) => sum + (p > 0 ? p * Math.log2(p) : 0), 0);

  const bell = at("play-bell"), cdf = at("play-cdf"), bars = at("play-codes");
  for (const svg of [bell, cdf, bars]) svg.replaceChildren();
  const bins = new Array(80).fill(0);
  for (const v of values) if (v > -4 && v < 4) bins[Math.floor((v + 4) * 10)]++;
  bins.forEach((count, i) => {
    const height = Math.min(190, count / values.length * 10 * 400);
    shape(bell, "rect", { x: i * 4, y: 190 - height, width: 4, height, fill: "#0072b2" });
  });
  for (const t of cuts) shape(bell, "line", { x1: across(t), x2: across(t), y1: 0, y2: 190, stroke: "#b35900", "stroke-width": 2 });

  const points = [];
  for (let v = -4; v <= 4; v += 0.05) points.push(`${across(v)},${190 - 180 * phi(v)}`);
  shape(cdf, "polyline", { points: points.join(" "), fill: "none", stroke: "#0072b2", "stroke-width": 2 });
  for (const t of cuts) {
    const y = 190 - 180 * phi(t);
    shape(cdf, "polyline", { points: `${across(t)},190 ${across(t)},${y} 0,${y}`, fill: "none", stroke: "#b35900" });
  }

  const width = 320 / n;
  shares.forEach((share, i) => {
    const height = 150 * Math.min(1, share * n / 2);
    shape(bars, "rect", { x: i * width + 1, y: 190 - height, width: width - 2, height, fill: "#0072b2" });
  });
  shape(bars, "line", { x1: 0, x2: 320, y1: 115, y2: 115, stroke: "#555555" });

  at("play-n-is").textContent = `${n} (${Math.log2(n).toFixed(2)} bits)`;
  at("play-spread-is").textContent = String(spread);
  at("play-says").textContent =
    `A code carries ${entropy.toFixed(3)} of ${Math.log2(n).toFixed(3)} bits. ` +
    `The rarest code has ${(100 * Math.min(...shares)).toFixed(1)} %, the most frequent ${(100 * Math.max(...shares)).toFixed(1)} %.`;
}

for (const id of ["play-n", "play-spread", "play-scale", "play-method"]) at(id).addEventListener("input", draw);
draw();
