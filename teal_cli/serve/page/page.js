// A chat with this server. What people and models write becomes text nodes, never markup.
"use strict";

const byId = (id) => document.getElementById(id);
const turns = byId("turns");
const slider = byId("sparsity");
const prompt = byId("prompt");

let served = null;   // what /v1/models says
let levels = [0];
let messages = [];   // the conversation, as the server reads it
let chat = 0;        // goes up with each new one
let running = null;  // the AbortController of the answer under way
let key = "";        // kept while the page is open, nowhere else

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function complain(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function tell(text) {  // to screen readers
  byId("said").textContent = text;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function connect() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    complain("The server does not answer. Trying again.");
    setTimeout(connect, 3000);
    return;
  }
  byId("key-form").hidden = response.status !== 401;
  if (response.status === 401) {
    complain(key ? "The key is wrong." : "This server asks for a key.");
    byId("key").focus();
    return;
  }
  if (response.status === 503) {
    byId("model").textContent = "The model is being loaded…";
    setTimeout(connect, 1000);
    return;
  }
  if (!response.ok) {
    complain(await failure(response));
    return;
  }
  complain("");
  served = (await response.json()).data[0];
  levels = served.teal.sparsity;
  byId("model").textContent = served.id;
  slider.max = String(levels.length - 1);
  slider.value = String(Math.max(0, levels.indexOf(served.teal.default_sparsity)));
  slider.disabled = levels.length < 2;
  showLevel();
  byId("send").disabled = false;
}

function level() {
  return levels[Number(slider.value)];
}

function levelName(sparsity) {
  if (sparsity === 0) return "dense";
  return served.teal.mode === "intrinsic" ? "sparse" : `sparsity ${sparsity}`;
}

function showLevel() {
  const name = level() === 0 ? "0 (dense)" : String(level());
  byId("level").textContent = name;
  slider.setAttribute("aria-valuetext", name);
}

// Events of a stream, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    const whole = waiting.split("\n\n");
    waiting = whole.pop();
    for (const event of whole) {
      const data = event.startsWith("data: ") ? event.slice(6) : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request(conversation, sparsity) {
  const asked = {
    model: served.id,
    sparsity,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    temperature: Number(byId("temperature").value),
    seed: 0,
  };
  if (byId("most").value) asked.max_tokens = Number(byId("most").value);
  // A model without a chat template knows nothing of turns: each message stands alone.
  return served.teal.chat
    ? ["v1/chat/completions", { ...asked, messages: conversation }]
    : ["v1/completions", { ...asked, prompt: conversation[conversation.length - 1].content }];
}

function figures(tokens, seconds, teal, ended) {
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
  const speed = teal?.tokens_per_second ?? (seconds > 0 ? (tokens - 1) / seconds : 0);
  if (speed > 0) parts.push(`${speed.toFixed(1)} tokens/s`);
  if (typeof teal?.realised_sparsity === "number") parts.push(`realised sparsity ${teal.realised_sparsity.toFixed(3)}`);
  if (ended) parts.push(ended);
  return parts.join(" · ");
}

const ENDS = { length: "cut at its most tokens", tool_calls: "calls a tool" };

// Ask, and write the answer into a section as it comes; the text, or null where there is none.
async function answer(conversation, sparsity, section, onText) {
  const text = section.querySelector(".text");
  const line = section.querySelector(".figures");
  const [path, asked] = request(conversation, sparsity);
  let whole = "", tokens = 0, first = 0, last = 0, usage = null, ended = "";
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  complain("");
  tell("The answer comes.");
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { ...headers(), "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const piece = choice.text ?? choice.delta?.content ?? "";
      if (choice.finish_reason) ended = ENDS[choice.finish_reason] ?? "";
      if (!piece) continue;
      tokens = event.usage?.completion_tokens ?? tokens + 1;
      last = performance.now();
      first = first || last;
      whole += piece;
      following(() => {
        onText(whole, text);
        line.textContent = figures(tokens, (last - first) / 1000, event.usage?.teal, "");
      });
    }
    const count = usage?.completion_tokens ?? tokens;
    following(() => { line.textContent = figures(count, (last - first) / 1000, usage?.teal, ended); });
  } catch (error) {
    const stopped = error.name === "AbortError";
    line.textContent = figures(tokens, (last - first) / 1000, usage?.teal, stopped ? "stopped" : "failed");
    if (!stopped) complain(error.message);
    if (!whole) whole = null;
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
  tell(`The answer is there: ${line.textContent}`);
  return whole;
}

// Change the conversation; who reads its end goes on reading its end.
function following(change) {
  const follows = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
  change();
  if (follows) turns.scrollTop = turns.scrollHeight;
}

function addAnswer(turn, sparsity) {
  const section = byId("answer").content.firstElementChild.cloneNode(true);
  const name = levelName(sparsity);
  section.querySelector(".who").textContent = `${served.id}, ${name}`;
  section.querySelector(".text").setAttribute("aria-label", `Answer, ${name}`);
  turn.querySelector(".answers").append(section);
  return section;
}

function plainly(whole, text) {
  text.textContent = whole;
}

// Where two texts part, at the beginning of a word.
function parting(one, other) {
  let at = 0;
  while (at < one.length && at < other.length && one[at] === other[at]) at += 1;
  if (at === one.length && at === other.length) return at;
  while (at > 0 && !/\s/.test(one[at - 1])) at -= 1;
  return at;
}

function marked(whole, at, text) {
  text.replaceChildren(whole.slice(0, at));
  if (at < whole.length) {
    const mark = document.createElement("mark");
    mark.textContent = whole.slice(at);
    text.append(mark);
  }
}

async function ask() {
  const question = prompt.value;
  if (!served || running || !question.trim() || !byId("ask").reportValidity()) return;
  byId("empty").hidden = true;
  prompt.value = "";
  const turn = byId("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector(".question").textContent = question;
  turns.append(turn);
  const conversation = [...messages, { role: "user", content: question }];
  const sparsity = level();
  const section = addAnswer(turn, sparsity);
  turns.scrollTop = turns.scrollHeight;
  const mine = chat;
  const whole = await answer(conversation, sparsity, section, plainly);
  if (mine !== chat) return;
  if (whole === null) {
    prompt.value = prompt.value || question;  // to be sent again
    return;
  }
  messages = [...conversation, { role: "assistant", content: whole }];
  if (sparsity > 0) offerAgain(turn, conversation, section, whole);
}

function offerAgain(turn, conversation, section, sparse) {
  const button = turn.querySelector(".again");
  following(() => { button.hidden = false; });
  button.addEventListener("click", async () => {
    if (running) return;
    button.hidden = true;
    const answers = turn.querySelector(".answers");
    answers.classList.add("two");
    const beside = addAnswer(turn, 0);
    beside.querySelector(".text").focus();
    const sparseText = section.querySelector(".text");
    const dense = await answer(conversation, 0, beside, (whole, text) => {
      // What has not come yet does not differ.
      const at = parting(sparse.slice(0, whole.length), whole);
      marked(whole, at, text);
    });
    if (dense === null) {
      beside.remove();
      answers.classList.remove("two");
      button.hidden = false;
      button.focus();
      return;
    }
    const at = parting(sparse, dense);
    marked(sparse, at, sparseText);
    marked(dense, at, beside.querySelector(".text"));
    const words = sparse.slice(0, at).split(/\s+/).filter(Boolean).length;
    const line = turn.querySelector(".parting");
    line.textContent = sparse === dense
      ? "The two texts are the same."
      : `The two texts part after ${words} word${words === 1 ? "" : "s"}; what differs is marked.`;
    following(() => { line.hidden = false; });
    tell(line.textContent);
  });
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  connect();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  chat += 1;
  messages = [];
  for (const turn of turns.querySelectorAll(".turn")) turn.remove();
  byId("empty").hidden = false;
  complain("");
  prompt.focus();
});
slider.addEventListener("input", showLevel);
connect();
