// The library at work, beside the page: messages in, messages out, one model and one text at a time.
"use strict";

importScripts("bellbox.js");

const FOLDER = "/model/";
const SLICE = 16; // milliseconds, after which what was written is told and messages are read
const ready = createBellbox();
let writing = false, halted = false;

const beat = new MessageChannel();
const pause = () => new Promise((go) => {
  beat.port1.onmessage = go;
  beat.port2.postMessage(null);
});

// Bytes or text of the library's own memory.
function textAt(library, address, length) {
  return new TextDecoder().decode(library.HEAPU8.slice(address, address + length));
}

function textOf(library, address) {
  return textAt(library, address, library.HEAPU8.indexOf(0, address) - address);
}

// Calls with a string, which the library sees for as long as the call lasts.
function withText(library, text, call) {
  const bytes = new TextEncoder().encode(text);
  const address = library._malloc(bytes.length + 1);
  if (address === 0) throw new Refusal("there is not enough memory");
  library.HEAPU8.set(bytes, address);
  library.HEAPU8[address + bytes.length] = 0;
  try {
    return call(address);
  } finally {
    library._free(address);
  }
}

class Refusal extends Error {}
const refusal = (library) => new Refusal(textOf(library, library._web_error()).replaceAll(FOLDER, ""));

function open(library, files) {
  const begun = performance.now(), { FS } = library;
  if (!FS.analyzePath(FOLDER).exists) FS.mkdir(FOLDER);
  try {
    for (const { name, bytes } of files) FS.writeFile(FOLDER + name, new Uint8Array(bytes), { canOwn: true });
    const status = withText(library, FOLDER.slice(0, -1), (folder) => library._web_open(folder));
    if (status !== 0) throw refusal(library);
  } finally {
    // The model keeps what it needs.
    for (const { name } of files) if (FS.analyzePath(FOLDER + name).exists) FS.unlink(FOLDER + name);
  }
  const seconds = (performance.now() - begun) / 1000;
  postMessage({ says: "opened", seconds, kernels: textOf(library, library._web_kernels()), memory: library.HEAPU8.length });
}

async function write(library, { prompt, tokens, temperature, topK, topP, seed }) {
  const begun = performance.now(), low = BigInt.asUintN(32, seed), high = BigInt.asUintN(64, seed) >> 32n;
  const status = withText(library, prompt, (text) =>
    library._web_start(text, tokens, temperature, topK, topP, Number(high), Number(low)));
  if (status !== 0) throw refusal(library);
  halted = false;
  postMessage({ says: "begun" });
  let held = "", told = performance.now(), first = 0;
  for (let more = 1; more === 1 && !halted;) {
    more = library._web_next();
    if (more < 0) throw refusal(library);
    held += textAt(library, library._web_piece(), library._web_bytes());
    const now = performance.now();
    first ||= (now - begun) / 1000;
    if (more === 1 && now - told < SLICE) continue;
    postMessage({ says: "piece", text: held, made: library._web_timing(1), seconds: library._web_timing(3) });
    held = "";
    await pause();
    told = performance.now();
  }
  const [promptTokens, newTokens, prefill, decode] = [0, 1, 2, 3].map((which) => library._web_timing(which));
  postMessage({ says: "done", halted, first, promptTokens, newTokens, prefill, decode, memory: library.HEAPU8.length });
}

onmessage = async ({ data }) => {
  if (data.asks === "halt") {
    halted = true;
    return;
  }
  if (writing) return;
  writing = true;
  try {
    const library = await ready;
    if (data.asks === "open") open(library, data.files);
    else await write(library, data);
  } catch (error) {
    // A fault inside of the library leaves nothing to go on with; a refusal does.
    const broken = !(error instanceof Refusal);
    postMessage({ says: "refused", broken, text: broken ? `the library stopped (${error.message})` : error.message });
  } finally {
    writing = false;
  }
};

ready.catch((error) => postMessage({ says: "refused", broken: false, text: `the library cannot be loaded: ${error.message}` }));
