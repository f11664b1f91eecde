// The depth, the slider, and the sites of the split that it chooses. All texts are set as text,
// never as HTML: names of modules and tokens can be anything.
const facts = JSON.parse(document.getElementById("facts").textContent);
const at = (id) => document.getElementById(id);

// A new element with attributes ("text" is its text) and children.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// A number with a decimal prefix: 1234 -> 1.23k.
function count(n) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (n >= size) return (n / size).toFixed(2) + unit;
  return String(n);
}

const percent = (share) => `${Math.round(100 * share)}%`;
const total = (what) => facts.parts.reduce((sum, part) => sum + part[what], 0) || 1;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

function table(columns, rows, caption) {
  const head = columns.map((c) => element("th", { scope: "col", text: c.title, class: c.class === "code" ? "" : c.class || "" }));
  const body = rows.map((row) => element("tr", {}, ...row.map(
    (text, i) => element("td", { text, class: columns[i].class || "" }))));
  const made = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  if (caption) made.prepend(element("caption", { text: caption }));
  return made;
}

// -- the blocks along the depth ------------------------------------------------------------------

const hasStem = facts.parts.length > 0 && facts.parts[0].index === null;
const place = (split) => (split + (hasStem ? 1 : 0)) / facts.parts.length;

function drawBars() {
  const parts = facts.parts, bars = at("bars");
  for (const [what, title] of [["params", "Parameters"], ["flops", "FLOPs"]]) {
    const most = Math.max(...parts.map((p) => p[what])) || 1;
    const row = element("div", { class: "row" });
    for (const part of parts) {
      const bar = element("i", { style: `height: ${(100 * part[what]) / most}%` });
      const hint = `${part.name}: ${count(part[what])} ${what === "params" ? "parameters" : "FLOPs"}`;
      row.append(element("div", { class: "bar", title: hint }, bar));
    }
    row.setAttribute("role", "img");
    row.setAttribute("aria-label", `${title} of each block; the table below has the numbers`);
    bars.append(element("div", { class: "row-title", text: title }), row);
  }
  const every = Math.ceil(parts.length / 16);
  const ticks = parts.map((p) => element("span", {
    text: p.index === null ? (parts.length > 12 ? "" : p.name) : p.index % every ? "" : p.index }));
  bars.append(element("div", { class: "ticks", "aria-hidden": "true" }, ...ticks));
}

function placeSlider() {
  const slider = at("split"), splits = facts.splits, thumb = 20;
  const low = place(0), high = place(splits.length - 1);
  slider.min = 0;
  slider.max = splits.length - 1;
  slider.value = facts.start;
  slider.style.left = `calc(${100 * low}% - ${thumb / 2}px)`;
  slider.style.width = `calc(${100 * (high - low)}% + ${thumb}px)`;
  slider.addEventListener("input", () => show(Number(slider.value)));
}

// -- the split that the slider chooses -----------------------------------------------------------

function show(index) {
  const split = facts.splits[index], slider = at("split");
  slider.setAttribute("aria-valuetext", `block ${index}, ${split.label}`);
  at("cut-line").style.left = `calc(11px + (100% - 22px) * ${place(index)} - 1px)`;
  for (const row of document.querySelectorAll("#bars .row"))
    [...row.children].forEach((bar, i) => {
      const deep = i >= index + (hasStem ? 1 : 0);
      bar.className = `bar ${deep ? "deep" : "shallow"}`;
    });
  const own = facts.converted && facts.converted.split === index;
  at("split-title").replaceChildren(
    `Split before block ${index}: `, element("span", { class: "code", text: split.label }),
    ...(own ? [element("span", { class: "badge", text: "this model's split" })] : []));
  const inside = own && facts.converted.inside
    ? "This model is cut inside this block; what is shown is the split at its beginning." : "";
  at("split-note").textContent = split.problem || inside;
  at("split-note").hidden = !(split.problem || inside);
  at("sides").hidden = at("sites").hidden = Boolean(split.problem);
  if (split.problem) return;
  showSides(split);
  showSites(split);
}

function showSides(split) {
  const index = split.index, last = facts.splits.length - 1;
  const head = facts.parts[facts.parts.length - 1].index === null;
  const blocks = (from, to) =>
    to < from ? [] : [from === to ? `block ${from}` : `blocks ${from} to ${to}`];
  const sides = {
    shallow: [...(hasStem ? ["stem"] : []), ...blocks(0, index - 1)],
    deep: [...blocks(index, last), ...(head ? ["head"] : [])],
  };
  for (const [side, names] of Object.entries(sides)) {
    const { params, flops } = split[side];
    const text = names.join(", ") || "nothing";
    at(side).replaceChildren(
      text[0].toUpperCase() + text.slice(1),
      element("small", { text: `${count(params)} parameters (${percent(params / total("params"))})` }),
      element("small", { text: `${count(flops)} FLOPs (${percent(flops / total("flops"))})` }));
  }
  at("crosses").replaceChildren(...together(split.crosses).map(({ c, times }) => {
    const what = c.routed ? "The features" : c.maker === "the call" ? "An argument" : "From";
    const name = c.maker === "the call" ? c.name : c.maker;
    const reads = c.routed ? "; the router reads them" : "";
    return element("li", {},
      `${what} ${c.routed ? "of " : ""}`, element("span", { class: "code", text: name }),
      element("small", { text: `${times > 1 ? `${times} tensors of ` : ""}${c.shape}, ${c.dtype}${reads}` }));
  }));
}

// Tensors of one maker, shape and dtype share a line.
function together(crosses) {
  const found = new Map();
  for (const c of crosses) {
    const key = JSON.stringify([c.routed, c.maker === "the call" ? c.name : c.maker, c.shape, c.dtype]);
    found.set(key, { c, times: (found.get(key) || { times: 0 }).times + 1 });
  }
  return [...found.values()];
}

// -- its sites -----------------------------------------------------------------------------------

let kind = 0;

function drawKinds() {
  const kinds = (facts.splits.find((s) => s.kinds.length) || { kinds: [] }).kinds;
  if (kinds.length < 2) return at("kinds").remove();
  kinds.forEach((of, i) => {
    const input = element("input", { type: "radio", name: "kind", value: i, id: `kind-${i}` });
    input.checked = i === kind;
    input.addEventListener("change", () => {
      kind = i;
      showSites(facts.splits[Number(at("split").value)]);
    });
    at("kinds").append(element("label", { for: `kind-${i}` }, input, of.experts));
  });
}

function showSites(split) {
  const of = split.kinds[kind];
  const takes = of.takes.length, others = of.rejected.length;
  at("sites-summary").textContent = takes
    ? [`${plural(takes, "site")} can hold ${of.experts}${others ? `; ${others} cannot` : ""}.`, of.router, ...of.notes].join(" ")
    : `No site can hold ${of.experts} here: ${of.problem}.`;
  const tables = [];
  if (takes) {
    const rows = alike(of.takes.map(([name, inside, out]) => [name, `${inside} → ${out}`]));
    tables.push(table([{ title: "Takes experts", class: "code" }, { title: "Size", class: "size" },
      { title: "Sites", class: "number" }], rows));
  }
  if (others)
    tables.push(table([{ title: "Takes none", class: "code" }, { title: "Because" },
      { title: "Sites", class: "number" }], alike(of.rejected)));
  at("sites-tables").replaceChildren(...tables);
}

// Rows [name, fact, how many]: names that differ in their first number only, with the same fact,
// share one, which tells the numbers.
function alike(pairs) {
  const groups = new Map();
  for (const [name, fact] of pairs) {
    const parts = name.split("."), number = parts.findIndex((p) => /^\d+$/.test(p));
    const before = number < 0 ? name : parts.slice(0, number).concat("").join(".");
    const after = number < 0 ? "" : ["", ...parts.slice(number + 1)].join(".");
    const key = JSON.stringify([before, after, fact]);
    if (!groups.has(key)) groups.set(key, { before, after, fact, numbers: [] });
    groups.get(key).numbers.push(number < 0 ? "" : parts[number]);
  }
  return [...groups.values()].map(({ before, after, fact, numbers }) =>
    [before + ranges(numbers) + after, fact, numbers.length]);
}

// "2", "2–4" or "2, 5–7".
function ranges(numbers) {
  const found = [];
  for (const n of numbers) {
    const last = found[found.length - 1];
    if (last && Number(n) === Number(last[1]) + 1) last[1] = n;
    else found.push([n, n]);
  }
  const shown = found.map(([low, high]) => (low === high ? low : `${low}–${high}`)).join(", ");
  return found.length > 1 ? `{${shown}}` : shown;
}

document.documentElement.classList.add("live");
if (facts.splits.length) {
  drawBars();
  placeSlider();
  drawKinds();
  show(facts.start);
} else {
  for (const node of document.querySelectorAll("#depth .scripted, #chosen, #sites")) node.remove();
}
