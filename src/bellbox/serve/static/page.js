// The page: a folder in, text out. The model runs in worker.js.

const FILES = ["config.json", "model.safetensors", "tokenizer.json"];
const IMAGES = ["resnet", "vit"]; // architectures that the library runs and this page does not
const MOST = 2 ** 30; // bytes of a folder: a browser's library has 2 GB in all
const at = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const megabytes = (bytes) => `${number.format(bytes / 1e6)} MB`;

let worker = null, opened = null, busy = false;

// --- what is said ---

function say(text) {
  at("status").textContent = text;
}

function refuse(text) {
  at("error").textContent = text;
  say(opened ? "The model that was open is still there." : "No model is open.");
}

function list(place, facts) {
  place.replaceChildren(...facts.flatMap(([name, value]) => {
    const term = document.createElement("dt"), meaning = document.createElement("dd");
    term.textContent = name;
    meaning.textContent = value;
    return [term, meaning];
  }));
}

function work(doing) {
  busy = doing !== null;
  at("go").disabled = busy || !opened;
  at("halt").disabled = doing !== "writing";
  for (const id of ["pick-folder", "pick-files"]) at(id).disabled = busy;
  at("text").setAttribute("aria-busy", String(doing === "writing"));
  at("progress").hidden = doing !== "reading";
}

// --- the worker ---

function employ() {
  worker?.terminate();
  worker = new Worker("worker.js");
  worker.onmessage = ({ data }) => answer[data.says](data);
  worker.onerror = (event) => {
    event.preventDefault();
    refuse(`The library cannot be loaded: ${event.message || "its files are missing"}.`);
    work(null);
  };
}

const answer = {
  opened({ seconds, kernels, memory }) {
    opened = pending;
    at("card").hidden = false;
    list(at("facts"), [...facts(opened), ["kernels", kernels], ["checked and loaded in", `${number.format(1000 * seconds)} ms`],
      ["memory", megabytes(memory)]]);
    at("error").textContent = "";
    say(`${opened.name} is open.`);
    work(null);
  },
  begun() {
    at("error").textContent = "";
  },
  piece({ text, made, seconds }) {
    at("text").lastChild.appendData(text);
    if (seconds > 0) list(at("figures"), [["tokens", whole.format(made)], ["a second", number.format((made - 1) / seconds)]]);
  },
  done({ halted, first, promptTokens, newTokens, prefill, decode, memory }) {
    const rate = (count, time) => (time > 0 && count > 0 ? `${number.format(count / time)} tokens a second` : "too short to tell");
    list(at("figures"), [
      ["new tokens", `${whole.format(newTokens)}, ${rate(newTokens - 1, decode)}`],
      ["prompt", `${whole.format(promptTokens)} tokens, ${rate(promptTokens, prefill)}`],
      ["first token after", `${number.format(1000 * first)} ms`],
      ["memory", megabytes(memory)],
      ["seed", at("text").dataset.seed],
    ]);
    at("figures").dataset.rate = decode > 0 ? String((newTokens - 1) / decode) : "";
    say(halted ? `Stopped after ${newTokens} tokens.` : `${newTokens} tokens are written.`);
    work(null);
  },
  refused({ text, broken }) {
    if (broken) opened = null;
    refuse(`Refused: ${text}.`.replace(/\.\.$/, "."));
    if (broken) employ();
    work(null);
  },
};

// --- a folder ---

let pending = null; // what the worker is asked to open

// What config.json says, for the card; the library checks all of it.
function facts({ name, config, bytes }) {
  const about = config.quantization_config ?? {}, model = about.model ?? {}, layers = Object.values(about.layers ?? {});
  const weights = layers.reduce((sum, layer) => sum + layer.in_features * layer.out_features, 0);
  const kinds = (values) => [...new Set(values)].join(", ");
  const width = (levels) => (levels === 3 ? "ternary" : `${Math.ceil(Math.log2(levels))} bits`);
  const table = (entry) => (typeof entry === "string" ? entry : `${entry.bits} bits in groups of ${entry.group}`);
  const tables = Object.values(about.embeddings ?? {});
  return [
    ["model", name],
    ["architecture", `${model.architecture}, ${model.num_hidden_layers} blocks of ${model.hidden_size}`],
    ["packed weights", whole.format(weights)],
    ["weights", kinds(layers.map((layer) => width(layer.weight?.levels)))],
    ["activations", kinds(layers.map((layer) => width(layer.activation?.levels)))],
    ["method", kinds(layers.map((layer) => layer.method))],
    ["embeddings", tables.length ? kinds(tables.map(table)) : "fp32"],
    ["vocabulary", whole.format(model.vocab_size)],
    ["context", `${whole.format(model.max_position_embeddings)} tokens`],
    ["folder", megabytes(bytes)],
  ];
}

// Files [{name, bytes}] to the worker, which answers.
function hand(name, files) {
  const sum = files.reduce((all, file) => all + file.bytes.byteLength, 0);
  const described = files.find((file) => file.name === "config.json");
  if (!described) throw new Error("there is no config.json; give the folder of a packed model (bellbox convert)");
  for (const each of FILES)
    if (!files.some((file) => file.name === each)) throw new Error(`there is no ${each}; give the whole folder, its tokenizer included`);
  let config = {};
  try {
    config = JSON.parse(new TextDecoder().decode(described.bytes));
  } catch {
    // The library says what is wrong with it.
  }
  const kind = config.quantization_config?.model?.architecture;
  if (IMAGES.includes(kind)) throw new Error(`a ${kind} names what is on a picture, and this page writes text; use bellbox-run --image`);
  pending = { name, config, bytes: sum };
  say("Checking the folder.");
  work("checking");
  worker.postMessage({ asks: "open", files }, files.map((file) => file.bytes));
}

const tooLarge = (bytes) =>
  new Error(`the folder has ${megabytes(bytes)}; a browser takes ${megabytes(MOST)}: use bellbox-run`);

// File objects, of a picker or dropped.
async function take(name, chosen) {
  if (busy) return say("One thing at a time: wait until this one has ended.");
  at("error").textContent = "";
  try {
    const wanted = chosen.filter((file) => FILES.includes(file.name));
    for (const each of FILES)
      if (wanted.filter((file) => file.name === each).length > 1) throw new Error(`there are several files ${each}; give one folder`);
    const sum = wanted.reduce((all, file) => all + file.size, 0);
    if (sum > MOST) throw tooLarge(sum);
    work("reading");
    at("progress").removeAttribute("value");
    say("Reading the folder.");
    hand(name, await Promise.all(wanted.map(async (file) => ({ name: file.name, bytes: await file.arrayBuffer() }))));
  } catch (error) {
    refuse(`Refused: ${error.message}.`);
    work(null);
  }
}

// Whatever lies one folder deep in what was dropped.
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const file = (entry) => new Promise((found, failed) => entry.file(found, failed));
  const inside = async (entry) => {
    const reader = entry.createReader(), all = [];
    for (;;) {
      const some = await new Promise((found, failed) => reader.readEntries(found, failed));
      if (some.length === 0) return all;
      all.push(...some);
    }
  };
  const folder = entries.find((entry) => entry.isDirectory);
  const found = folder ? await inside(folder) : entries;
  return [folder?.name ?? "dropped files", await Promise.all(found.filter((entry) => entry.isFile).map(file))];
}

// One file of the server's, with its progress: a part of `share`, after `before`.
async function fetched(name, before, share) {
  const response = await fetch(`model/${name}`, { cache: "no-cache" }).catch(() => {
    throw new Error("the server does not answer; give a folder of your own, or load the page again");
  });
  if (!response.ok) throw Object.assign(new Error(`the server answers ${response.status} for ${name}`), { status: response.status });
  const total = Number(response.headers.get("content-length")) || 0, parts = [];
  if (total > MOST) throw tooLarge(total);
  let size = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    if (size > MOST) throw tooLarge(size);
    if (total > 0) at("progress").value = before + (share * size) / total;
  }
  return { name, bytes: await new Blob(parts).arrayBuffer() };
}

// The model that lies beside the page, where there is one.
async function offered() {
  const files = [];
  work("reading");
  say("Asking the server for its model.");
  try {
    files.push(await fetched("config.json", 0, 0));
    say("Reading the server's model.");
    files.push(await fetched("tokenizer.json", 0, 0.1), await fetched("model.safetensors", 0.1, 0.9));
    hand("the server's model", files);
  } catch (error) {
    work(null);
    if (error.status === 404 && files.length === 0) say("The server has no packed model; give one of your own.");
    else if (error.status === 401) say("The server's model needs a key; give a folder of your own.");
    else refuse(`Refused: ${error.message}.`);
  }
}

// --- a text ---

function write() {
  if (busy || !opened || !at("form").reportValidity()) return;
  const given = (id) => Number(at(id).value || 0);
  const seed = at("seed").value === "" ? BigInt(crypto.getRandomValues(new Uint32Array(1))[0]) : BigInt(at("seed").value);
  const prompt = document.createElement("b");
  prompt.textContent = at("prompt").value;
  at("text").replaceChildren(prompt, document.createTextNode(""));
  at("text").dataset.seed = String(seed);
  list(at("figures"), []);
  at("error").textContent = "";
  say("Writing.");
  work("writing");
  worker.postMessage({ asks: "write", prompt: at("prompt").value, tokens: given("tokens"), temperature: given("temperature"),
    topK: given("top_k"), topP: given("top_p"), seed });
}

// --- the page ---

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write();
});
at("halt").addEventListener("click", () => worker.postMessage({ asks: "halt" }));
for (const id of ["folder", "files"]) {
  at(`pick-${id}`).addEventListener("click", () => at(id).click());
  at(id).addEventListener("change", () => {
    const chosen = [...at(id).files];
    const name = chosen[0]?.webkitRelativePath.split("/")[0] || "chosen files";
    // Folders inside of the chosen one are not its own files.
    take(name, chosen.filter((file) => file.webkitRelativePath.split("/").length <= 2));
    at(id).value = "";
  });
}
for (const kind of ["dragenter", "dragover"])
  addEventListener(kind, (event) => {
    event.preventDefault();
    at("source").classList.add("over");
  });
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) at("source").classList.remove("over");
});
addEventListener("drop", async (event) => {
  event.preventDefault();
  at("source").classList.remove("over");
  try {
    const [name, files] = await dropped(event.dataTransfer);
    take(name, files);
  } catch (error) {
    refuse(`Refused: ${error.message}.`);
  }
});

if (typeof WebAssembly !== "object") {
  refuse("This browser has no WebAssembly.");
} else {
  employ();
  offered();
}
