// The routing of a sample, and the share of experts over a run.
const SVG = "http://www.w3.org/2000/svg";

function drawing(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Outputs of a router: the frozen model is 0, experts count from 1; hues repeat, numbers do not.
const numberOf = (names, i) => i + (names[0] === "frozen model" ? 0 : 1);
const hue = (number) => `var(--e${number === 0 ? 0 : ((number - 1) % 8) + 1})`;
const tint = (number, share) => `color-mix(in oklab, ${hue(number)} ${Math.round(share)}%, var(--page))`;
const gate = (value) => (value === null ? "not finite" : value.toFixed(2));

function legend(names, shares) {
  return element("ul", { class: "legend" }, ...names.map((name, i) => {
    const number = numberOf(names, i), share = shares && shares[i] ? `, ${percent(shares[i])}` : "";
    const chip = element("span", { class: "chip", text: number });
    chip.style.background = tint(number, 45);
    return element("li", {}, chip, name + share);
  }));
}

function folded(title, inside) {
  const region = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, inside);
  return element("details", {}, element("summary", { text: title }), region);
}

// -- one sample ----------------------------------------------------------------------------------

function drawRouting(routing) {
  const into = at("routing");
  if (routing.kind === "patches") return into.append(...patches(routing));
  const names = routing.outputs, rows = routing.rows;
  const shown = rows.slice(routing.prefix || 0);
  const shares = names.map((_, i) => shown.filter((r) => r.chosen === i).length / shown.length);
  const words = {
    tokens: `Each of ${shown.length} tokens has the colour of the expert with the largest gate; its number stands where that changes.`,
    map: `Each of ${shown.length} patches has the colour and number of the expert with the largest gate.`,
    sample: "The whole sample has one gate an expert.",
  };
  into.append(element("p", { text: words[routing.kind] }),
    legend(names, routing.kind === "sample" ? rows[0].gates : shares));
  if (routing.kind === "tokens") into.append(text(rows, names));
  if (routing.kind === "map") into.append(element("div", { class: "figures" }, map(routing)));
  if (routing.kind === "sample" && routing.image)
    into.append(element("div", { class: "figures" }, figure(routing, [], "the sample")));
  const columns = [{ title: "Row" }, ...names.map((n) => ({ title: n, class: "number" }))];
  into.append(folded("All gates", table(columns, rows.map((r) => [r.text, ...r.gates.map(gate)]))));
}

function text(rows, names) {
  const shown = element("div", { class: "text" });
  let before = null;
  for (const row of rows) {
    const number = row.chosen < 0 ? 0 : numberOf(names, row.chosen);
    if (row.chosen !== before)
      shown.append(element("span", { class: "run-start", text: row.chosen < 0 ? "–" : number }));
    before = row.chosen;
    const gates = names.map((n, i) => `${n} ${gate(row.gates[i])}`).join(", ");
    const token = element("span", { class: "token", text: row.text, title: gates });
    token.style.background = tint(number, 12 + 30 * (row.gates[row.chosen] || 0));
    token.style.borderColor = hue(number);
    shown.append(token);
  }
  return shown;
}

// The image, or an empty square, with marks in units of the grid's cells.
function figure({ image, grid }, marks, caption) {
  const [height, width] = grid && grid[0] ? grid : [1, 1];
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption });
  if (image)
    svg.append(drawing("image", { href: image, width, height, preserveAspectRatio: "none" }));
  else svg.append(drawing("rect", { width, height, fill: "var(--card)" }));
  svg.append(...marks);
  return element("figure", {}, svg, element("figcaption", { text: caption }));
}

function mark(text, x, y, size) {
  const made = drawing("text", { x, y, "font-size": size, "text-anchor": "middle", "dominant-baseline": "central",
    fill: "#fff", stroke: "#000", "stroke-width": size / 6, "paint-order": "stroke", "font-family": "system-ui" });
  made.textContent = text;
  return made;
}

function map(routing) {
  const [, width] = routing.grid, names = routing.outputs;
  const marks = routing.rows.slice(routing.prefix).flatMap((row, i) => {
    const x = i % width, y = Math.floor(i / width);
    const number = row.chosen < 0 ? 0 : numberOf(names, row.chosen);
    const cell = drawing("rect", { x, y, width: 1, height: 1, style: `fill: ${hue(number)}`, opacity: 0.5 });
    return [cell, mark(row.chosen < 0 ? "–" : number, x + 0.5, y + 0.5, 0.4)];
  });
  return figure(routing, marks, "the expert of each patch");
}

function patches(routing) {
  const [height, width] = routing.grid;
  const figures = routing.taken.map(({ expert, patches: ids, gates }, e) => {
    const marks = [];
    for (let i = 0; i < height * width; i++) {
      const x = i % width, y = Math.floor(i / width), rank = ids.indexOf(i);
      if (rank < 0) {
        marks.push(drawing("rect", { x, y, width: 1, height: 1, style: "fill: var(--page)", opacity: 0.6 }));
        continue;
      }
      marks.push(drawing("rect", { x: x + 0.04, y: y + 0.04, width: 0.92, height: 0.92, fill: "none",
        style: `stroke: ${hue(e + 1)}`, "stroke-width": 0.08 }));
      marks.push(mark(gate(gates[rank]), x + 0.5, y + 0.5, 0.3));
    }
    return figure(routing, marks, `${expert}: ${ids.length} of ${height * width} patches`);
  });
  return [element("p", { text: "Each expert takes the patches that it scores highest; others are faded. The numbers are gates." }),
    element("div", { class: "figures" }, ...figures)];
}

// -- a run ---------------------------------------------------------------------------------------

function drawRun(run) {
  const times = element("div", { class: "times" });
  run.over_time.forEach((shares, i) => {
    const words = shares.map((s, e) => `${run.outputs[e]} ${percent(s)}`).join(", ");
    const stack = element("div", { class: "stack", role: "img", "aria-label": words });
    shares.forEach((share, e) => {
      if (!(share > 0.001)) return;
      const number = numberOf(run.outputs, e);
      const piece = element("i", { text: share > 0.06 ? number : "", title: `${run.outputs[e]}: ${percent(share)}` });
      piece.style.flex = `${share} 1 0`;
      piece.style.background = tint(number, 55);
      stack.append(piece);
    });
    times.append(element("div", { text: `after ${run.tasks[i]}` }), stack);
  });
  const columns = [{ title: "Test items of" }, ...run.outputs.map((n) => ({ title: n, class: "shade" }))];
  const rows = run.by_task.map(({ task, shares }) => [task, ...shares.map(gate)]);
  const answers = table(columns, rows, "Who answers what, at the end");
  [...answers.tBodies[0].rows].forEach((row, i) => run.by_task[i].shares.forEach((share, e) => {
    row.cells[e + 1].style.background = tint(numberOf(run.outputs, e), 55 * share);
  }));
  at("run").append(
    element("p", { text: `Method ${run.method}: mean gates over the test items of the tasks learnt so far, after each task.` }),
    legend(run.outputs), times,
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Mean gates by task" }, answers));
}

if (facts.routing) drawRouting(facts.routing);
if (facts.run) drawRun(facts.run);
