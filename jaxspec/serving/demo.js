// The demonstration's page: two streams of one request, their figures, and the tree of the last round.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const STEP = 96, ROW = 22, LEFT = 14, TOP = 24, LONGEST = 9;
const find = (id) => document.getElementById(id);

function svgElement(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Spaces and line ends are told by signs: a token may be nothing else.
function visible(text) {
  const shown = text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  const letters = Array.from(shown);
  return letters.length > LONGEST ? letters.slice(0, LONGEST - 1).join("") + "\u2026" : shown;
}

// A first child stands in its parent's row, every other one below all that came before it.
function layout(parents) {
  const children = parents.map(() => []);
  parents.forEach((parent, node) => { if (node) children[parent].push(node); });
  const places = parents.map(() => null), stack = [[0, 0]];
  let row = -1, deepest = 0, fresh = true;
  while (stack.length) {
    const [node, depth] = stack.pop();
    if (fresh) row += 1;
    places[node] = { x: LEFT + depth * STEP, y: TOP + row * ROW };
    deepest = Math.max(deepest, depth);
    for (const child of children[node].slice().reverse()) stack.push([child, depth + 1]);
    fresh = children[node].length === 0;
  }
  return { places, width: LEFT + (deepest + 1) * STEP, height: 2 * TOP + row * ROW };
}

function drawTree(drawing, tree, round) {
  const { places, width, height } = layout(tree.parents);
  const kept = new Set(tree.path), inner = new Set(tree.parents);
  const told = tree.path.slice(1).map((node) => tree.tokens[node]);
  const title = `Round ${round}: ${tree.tokens.length - 1} drafted tokens, ${told.length} accepted`;
  const parts = [svgElement("title", {}, title), svgElement("desc", {}, `accepted: ${told.join("") || "none"}`)];
  tree.parents.forEach((parent, node) => {
    if (!node) return;
    const from = places[parent], to = places[node], middle = from.x + STEP / 2;
    const way = `M${from.x} ${from.y}C${middle} ${from.y} ${from.x + 8} ${to.y} ${to.x - 5} ${to.y}`;
    const straight = `M${from.x} ${from.y}L${to.x - 5} ${to.y}`;
    parts.push(svgElement("path", { d: from.y === to.y ? straight : way, class: kept.has(node) ? "kept" : "vain" }));
  });
  places.forEach((at, node) => {
    const here = kept.has(node);
    parts.push(here
      ? svgElement("rect", { x: at.x - 5, y: at.y - 5, width: 10, height: 10 })
      : svgElement("circle", { cx: at.x, cy: at.y, r: 4 }));
    // Beside a leaf; above any other node, whose lines begin where the text would stand.
    const place = inner.has(node) ? { x: at.x - 5, y: at.y - 8 } : { x: at.x + 9, y: at.y + 4 };
    parts.push(svgElement("text", { ...place, class: here ? "halo bold" : "halo" }, visible(tree.tokens[node])));
  });
  drawing.setAttribute("width", width);
  drawing.setAttribute("height", height);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("aria-label", title);
  drawing.replaceChildren(...parts);
}

class Arm {
  constructor(name) {
    this.name = name;
    this.section = find(name);
    this.answer = this.section.querySelector(".answer");
    this.drawing = this.section.querySelector("svg.tree");
    this.reset();
  }

  reset() {
    this.text = "";
    this.tokens = this.rounds = this.seconds = 0;
    this.tree = null;
    this.finish = null;
    this.dirty = true;
  }

  take(chunk) {
    const [choice] = chunk.choices;
    if (!choice) return;
    this.text += choice.delta.content || "";
    this.finish = choice.finish_reason || this.finish;
    const told = chunk.jaxspec;
    if (told) {
      this.tokens += told.tokens;
      this.rounds = told.round;
      this.seconds += told.seconds;
      this.tree = told.tree || this.tree;
    }
    this.dirty = true;
  }

  // Tokens of the rounds: the first token comes from reading the prompt.
  get tau() { return this.rounds ? (this.tokens - 1) / this.rounds : 0; }
  get speed() { return this.seconds ? (this.tokens - 1) / this.seconds : 0; }

  show() {
    if (!this.dirty) return;
    this.dirty = false;
    this.answer.textContent = this.text;
    this.answer.scrollTop = this.answer.scrollHeight;
    const figures = { tokens: this.tokens, rounds: this.rounds, tau: this.tau.toFixed(2), speed: this.speed.toFixed(0) };
    for (const [key, value] of Object.entries(figures)) {
      this.section.querySelector(`[data-figure=${key}]`).textContent = this.rounds || key === "tokens" ? value : "-";
    }
    if (this.drawing && this.tree) drawTree(this.drawing, this.tree, this.rounds);
  }
}

// Yields the values of server-sent events.
async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function run(arm, asked, headers, signal) {
  const body = JSON.stringify({ ...asked, jaxspec: { plain: arm.name === "plain", tree: true } });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body, signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Error(chunk.error.message);
    arm.take(chunk);
  }
}

function told(arms) {
  const parts = arms.map((arm) => `${arm.name} ${arm.tokens} tokens, ${arm.tau.toFixed(2)} a round`);
  return parts.join("; ");
}

function verdict(arms) {
  const [plain, drafted] = arms;
  if (!drafted || !plain.speed) return `Done: ${told(arms)}.`;
  const same = plain.text === drafted.text ? "the texts are the same" : "the texts differ";
  return `Done: ${(drafted.speed / plain.speed).toFixed(2)} times the tokens a second, and ${same}.`;
}

function start() {
  const form = find("ask"), status = find("status"), stop = find("stop"), begin = find("start");
  const arms = ["plain", "speculative"].filter(find).map((name) => new Arm(name));
  let running = null;

  form.addEventListener("submit", async (submitted) => {
    submitted.preventDefault();
    if (running) return;
    running = new AbortController();
    begin.disabled = true;
    stop.disabled = false;
    status.textContent = "Answering.";
    arms.forEach((arm) => arm.reset());
    const headers = { "content-type": "application/json" };
    if (find("key")) headers.authorization = `Bearer ${find("key").value}`;
    const asked = {
      model: find("main").dataset.model,
      messages: [{ role: "user", content: find("prompt").value }],
      temperature: Number(find("temperature").value),
      max_tokens: Number(find("most").value),
      seed: Number(find("seed").value),
      stream: true,
    };
    let waits = 0;
    const draw = () => { arms.forEach((arm) => arm.show()); waits = requestAnimationFrame(draw); };
    draw();
    // A reader of the screen is told once a second, not with every token.
    const telling = setInterval(() => { status.textContent = `Answering: ${told(arms)}.`; }, 1000);
    try {
      await Promise.all(arms.map((arm) => run(arm, asked, headers, running.signal)));
      status.textContent = verdict(arms);
    } catch (error) {
      status.textContent = error.name === "AbortError" ? "Stopped." : `Failed: ${error.message}.`;
      running.abort();
    } finally {
      clearInterval(telling);
      cancelAnimationFrame(waits);
      arms.forEach((arm) => arm.show());
      running = null;
      begin.disabled = false;
      stop.disabled = true;
    }
  });
  stop.addEventListener("click", () => running && running.abort());
}

start();
