// The page at /: one prompt, whose text streams in.
"use strict";

const at = (id) => document.getElementById(id);
let halting = null;

function headers() {
  const key = at("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function request() {
  const body = { prompt: at("prompt").value, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_k", "top_p", "seed"])
    if (at(name).value !== "") body[name] = Number(at(name).value);
  if (at("stop").value !== "") body.stop = at("stop").value;
  return body;
}

// The message of an answer that is no text.
async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// The events of a stream, as objects.
async function* events(response) {
  const decoder = new TextDecoder();
  let held = "";
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server ended the text early");
    held += decoder.decode(value, { stream: true });
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function run() {
  const text = at("text"), begun = performance.now();
  const prompt = document.createElement("b");
  prompt.textContent = at("prompt").value;
  text.replaceChildren(prompt);
  at("error").textContent = at("status").textContent = "";
  at("go").disabled = true;
  at("halt").disabled = false;
  halting = new AbortController();
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: halting.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    let finish = "";
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        text.append(choice.text);
        finish = choice.finish_reason || finish;
      }
      if (event.usage) {
        const seconds = (performance.now() - begun) / 1000, made = event.usage.completion_tokens;
        at("status").textContent =
          `${made} tokens in ${seconds.toFixed(1)} s (${(made / seconds).toFixed(0)} a second); ended by ${finish}`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") at("status").textContent = "stopped";
    else at("error").textContent = error.message;
  } finally {
    at("go").disabled = false;
    at("halt").disabled = true;
  }
}

async function name() {
  const response = await fetch("v1/models", { headers: headers() });
  at("model").textContent = response.ok ? (await response.json()).data[0].id : "give the API key below";
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
at("halt").addEventListener("click", () => halting.abort());
at("key").addEventListener("change", () => name().catch(() => {}));
name().catch((error) => { at("error").textContent = error.message; });

// A link may bring a prompt along and start it: /#prompt=...
const given = new URLSearchParams(location.hash.slice(1));
for (const [field, value] of given) if (at(field) && "value" in at(field)) at(field).value = value;
if (given.has("prompt")) run();
