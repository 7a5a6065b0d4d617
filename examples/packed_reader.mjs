// Runs one packed linear layer of a folder that `bellbox.save` wrote, from docs/format.md alone. No package is needed.
//
//     echo '[[1.0, 2.0, ...]]' | node examples/packed_reader.mjs FOLDER LAYER
//
// Prints the rows of outputs as JSON: the same fp32 numbers as Bellbox's. Of the format it has `packed_linear` with 2, 3, 4,
// 8 or 16 levels (or with thresholds in the file) and the normalisations rms, absmax, norm and static; all else it refuses.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const f32 = Math.fround;

function refuse(why) {
  console.error(`packed_reader: ${why}`);
  process.exit(2);
}

// "Thresholds", docs/format.md: those of at least zero; the others mirror them.
const UPPER = {
  2: [0.0],
  3: [0.4307273030281067],
  4: [0.0, 0.6744897365570068],
  8: [0.0, 0.3186393678188324, 0.6744897365570068, 1.1503493785858154],
  16: [0.0, 0.15731067955493927, 0.3186393678188324, 0.48877641558647156, 0.6744897365570068, 0.887146532535553,
    1.1503493785858154, 1.5341205596923828],
};

function thresholdsOf(activation) {
  if (activation.thresholds !== "gaussian") return activation.thresholds.map(f32);
  const upper = UPPER[activation.levels] ?? refuse(`gaussian thresholds of ${activation.levels} levels are not in my table`);
  return [...upper.filter((t) => t > 0).map((t) => -t).reverse(), ...upper];
}

/** The tensors of a safetensors file: name -> { dtype, shape, bytes }. */
function tensorsOf(buffer) {
  const length = Number(buffer.readBigUInt64LE(0));
  const header = JSON.parse(buffer.toString("utf8", 8, 8 + length));
  const found = new Map();
  for (const [name, about] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [begin, end] = about.data_offsets;
    found.set(name, { dtype: about.dtype, shape: about.shape, bytes: buffer.subarray(8 + length + begin, 8 + length + end) });
  }
  return found;
}

function floats(tensor) {
  if (tensor.dtype !== "F32") refuse(`a scale of dtype ${tensor.dtype}`);
  return Array.from({ length: tensor.bytes.length / 4 }, (_, i) => tensor.bytes.readFloatLE(4 * i));
}

/** Codes of one row, "Bytes of a row". */
function codesOf(bytes, count, n) {
  const bits = Math.ceil(Math.log2(n));
  let digits = 1;
  while (n ** (digits + 1) <= 256) digits++;
  const codes = [];
  if (digits > Math.floor(8 / bits)) {
    for (let i = 0; i < count; i++) codes.push(Math.floor(bytes[Math.floor(i / digits)] / n ** (i % digits)) % n);
    return codes;
  }
  for (let i = 0; i < count; i++) {
    let code = 0;
    for (let b = 0; b < bits; b++) {
      const place = i * bits + b;
      code |= ((bytes[place >> 3] >> (place & 7)) & 1) << b;
    }
    codes.push(code);
  }
  return codes;
}

/** Levels as integers: 2q where they are half-integers, else q. */
function gridOf({ levels, zero_point: zeroPoint }) {
  const offset = levels / 2 + zeroPoint;
  const m = Number.isInteger(offset) ? 1 : 2;
  return { m, integer: (code) => m * (code - offset) };
}

/** "Rotate": the butterfly, every sum rounded to fp32. */
function rotate(row, block) {
  const x = row.slice();
  for (let h = 1; h < block; h *= 2) {
    for (let begin = 0; begin < x.length; begin += 2 * h) {
      for (let i = begin; i < begin + h; i++) [x[i], x[i + h]] = [f32(x[i] + x[i + h]), f32(x[i] - x[i + h])];
    }
  }
  return x;
}

/** One row through one layer, "The function packed_linear". */
function run(layer, row) {
  const { about, weights, weightScale, actScale, rstd, signs, bias } = layer;
  let x = row.map(f32);
  const rms = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length);
  const sigma = about.normalise === "absmax" ? Math.max(...x.map(Math.abs)) : rms;
  if (!x.every(Number.isFinite) || sigma > 1e30) return weights.map(() => NaN);
  if (signs) x = x.map((v, i) => v * signs[i]);
  const s = about.normalise === "static" ? rstd : 1 / Math.max(sigma, 1e-8);
  const r = f32(s / Math.sqrt(about.hadamard_block));
  const input = gridOf(about.activation), weight = gridOf(about.weight);
  const thresholds = thresholdsOf(about.activation);
  const levels = rotate(x, about.hadamard_block).map((v) => {
    const scaled = f32(v * r);
    return input.integer(thresholds.filter((t) => scaled >= t).length);
  });
  let rowScale = 1;
  if (about.normalise === "norm") {
    const norm = Math.sqrt(levels.reduce((sum, q) => sum + (q / input.m) ** 2, 0));
    rowScale = norm === 0 ? 0 : f32(Math.sqrt(x.reduce((sum, v) => sum + v * v, 0)) / norm);
  } else if (about.rescale) {
    rowScale = f32(Math.max(sigma, 1e-8));
  }
  return weights.map((codes, o) => {
    const sum = codes.reduce((total, code, i) => total + weight.integer(code) * levels[i], 0);
    let y = f32(f32(sum) * f32(f32(weightScale[o] / weight.m) * f32(actScale / input.m)));
    if (about.rescale) y = f32(y * rowScale);
    return bias ? f32(y + bias[o]) : y;
  });
}

/** The layer of a folder, after the files' checksums. */
function open(folder, name) {
  const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8")).quantization_config;
  if (config?.quant_method !== "bellbox" || ![4, 5, 6].includes(config.version)) refuse(`${folder}: no packed folder that I read`);
  for (const [file, { bytes, sha256 }] of Object.entries(config.files)) {
    const found = readFileSync(join(folder, file));
    if (found.length !== bytes || createHash("sha256").update(found).digest("hex") !== sha256) refuse(`${file} is damaged`);
  }
  const about = Object.hasOwn(config.layers, name) ? config.layers[name] : refuse(`no layer ${name}; there are: ${Object.keys(config.layers).join(", ")}`);
  if (about.function !== "packed_linear") refuse(`${name} is a ${about.function}`);
  const tensors = tensorsOf(readFileSync(join(folder, "model.safetensors")));
  const get = (part) => tensors.get(name ? `${name}.${part}` : part);
  const packed = get("weight_packed");
  const wide = packed.shape[1];
  return {
    about,
    weights: Array.from({ length: about.out_features }, (_, row) =>
      codesOf(packed.bytes.subarray(row * wide, (row + 1) * wide), about.in_features, about.weight.levels)),
    weightScale: floats(get("weight_scale")),
    actScale: floats(get("act_scale"))[0],
    rstd: about.normalise === "static" ? floats(get("act_rstd"))[0] : null,
    signs: about.signs ? Array.from(get("act_signs").bytes, (byte) => (byte << 24) >> 24) : null,
    bias: about.bias ? floats(get("bias")) : null,
  };
}

const [folder, name] = process.argv.slice(2);
if (folder === undefined || name === undefined) refuse("usage: node packed_reader.mjs FOLDER LAYER < rows.json");
const layer = open(folder, name);
const rows = JSON.parse(readFileSync(0, "utf8"));
for (const row of rows) if (row.length !== layer.about.in_features) refuse(`a row has ${row.length} numbers, ${layer.about.in_features} are needed`);
console.log(JSON.stringify(rows.map((row) => run(layer, row))));
