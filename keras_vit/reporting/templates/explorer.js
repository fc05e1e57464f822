"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const data = read("attention-data"), texts = read("explorer-texts");
  const colours = read("explorer-colours").map((c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
  const { blocks, heads, tokens, rows, columns } = data;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const levels = bytes(data.levels), scales = new Float32Array(bytes(data.scales).buffer);
  const $ = (selector) => document.querySelector(".explorer " + selector);
  const element = (name, parent, text = "") => {
    const made = parent.appendChild(document.createElement(name));
    made.textContent = text;
    return made;
  };
  const pooled = data.class_token ? texts.class_token : texts.mean_of_patches;
  const state = { image: 0, query: 0, target: null, block: blocks, head: "mean", view: "rollout", residual: true, discard: 0, strength: 0.6, pinned: false };
  // With 8 bits per score, only two digits are significant.
  const digits = (weight) => (100 * weight).toFixed(weight < 0.1 ? 1 : 0).replace(".", texts.decimal);
  const percent = (weight) => digits(weight) + " %";
  const nameOf = (token) => token === 0 ? pooled
    : texts.patch.replace("{row}", Math.ceil(token / columns)).replace("{column}", (token - 1) % columns + 1);

  // A row of the attention matrix of one head. Stored are square roots of scores relative to the maximum of the row.
  function scoresOf(block, head, i) {
    const start = ((state.image * blocks + block) * heads + head) * tokens + i, row = new Float64Array(tokens);
    let sum = 0;
    for (let j = 0; j < tokens; j++) sum += row[j] = (levels[start * tokens + j] / 255) ** 2 * scales[start];
    return row.map((score) => score / sum);
  }

  const maps = attentionMaps(data, scoresOf);
  const weights = (block) => maps({ ...state, block });

  function paint(canvas, values, colour) {
    const [low, high] = rangeOf(values, state.query);
    canvas.width = columns;
    canvas.height = rows;
    const pixels = canvas.getContext("2d").createImageData(columns, rows);
    values.slice(1).forEach((value, index) => pixels.data.set(colour(fractionOf(value, low, high)), 4 * index));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return [low, high];
  }

  const viridis = (fraction) => {
    const position = fraction * (colours.length - 1), below = Math.min(Math.floor(position), colours.length - 2);
    return [0, 1, 2].map((i) => colours[below][i] + (position - below) * (colours[below + 1][i] - colours[below][i])).concat(255);
  };
  // Towards grey: towards black or white, dark or bright images get lost.
  const shade = (fraction) => [128, 128, 128, 255 * state.strength * (1 - fraction)];

  function mark(selector, token) {
    document.querySelectorAll(".explorer " + selector).forEach((box) => {
      box.hidden = !token;
      if (!token) return;
      const top = 100 * Math.floor((token - 1) / columns) / rows, left = 100 * ((token - 1) % columns) / columns;
      box.style.inset = `${top}% auto auto ${left}%`;
      box.style.width = 100 / columns + "%";
      box.style.height = 100 / rows + "%";
    });
  }

  function draw() {
    const values = weights(state.block);
    document.querySelectorAll(".thumbnails button").forEach((button, i) => button.setAttribute("aria-pressed", i === state.image));
    $("#overlay img").src = data.images[state.image].source;
    paint($("#overlay canvas"), values, shade);
    const [low, high] = paint($("#map canvas"), values, viridis);
    $("#low").textContent = percent(low);
    $("#high").textContent = percent(high);
    $("#scale").hidden = state.query === 0;
    $("#block").value = state.block;
    $("#block-value").textContent = `${state.block} / ${blocks}`;
    $("#discard-value").textContent = (100 * state.discard).toFixed(0) + " %";
    $("#rollout-controls").style.visibility = state.view === "rollout" ? "" : "hidden";
    $("#class-token").setAttribute("aria-pressed", state.query === 0);
    mark(".mark.query", state.query);
    mark(".mark.target", state.target);

    const readout = $("#readout");
    readout.replaceChildren();
    element("strong", readout, data.images[state.image].title);
    element("div", readout, `${texts.from} ${nameOf(state.query)}${state.pinned ? " · " + texts.pinned : ""}`).id = "query";
    const said = element("div", readout);
    said.id = "target";
    if (state.target !== null) said.textContent = `${texts.to} ${nameOf(state.target)}: ${percent(values[state.target])}`;
    // Screen readers announce one line per move, not the whole list.
    $("#said").textContent = said.textContent || $("#query").textContent;
    if (data.class_token) element("div", readout, `${texts.to} ${texts.class_token}: ${percent(values[0])}`).id = "to-class";
    const list = element("ol", readout);
    Array.from(values.keys()).slice(1).sort((a, b) => values[b] - values[a]).slice(0, 5)
      .forEach((token) => element("li", list, `${nameOf(token)}: ${percent(values[token])}`));

    document.querySelectorAll(".growth button").forEach((button, index) => {
      button.setAttribute("aria-pressed", index + 1 === state.block);
      paint(button.querySelector("canvas"), weights(index + 1), viridis);
    });
    const table = $(".numbers");
    table.replaceChildren();
    const heading = (parent, scope, text) => element("th", parent, text).scope = scope;
    const top = element("tr", table);
    element("td", top);
    for (let column = 1; column <= columns; column++) heading(top, "col", `${texts.column} ${column}`);
    for (let row = 0; row < rows; row++) {
      const line = element("tr", table);
      heading(line, "row", `${texts.row} ${row + 1}`);
      for (let column = 0; column < columns; column++) element("td", line, digits(values[1 + row * columns + column]));
    }
  }

  const set = (change) => { Object.assign(state, change); draw(); };

  data.images.forEach((image, index) => {
    const button = element("button", $(".thumbnails"));
    button.type = "button";
    element("img", button).src = image.source;
    button.firstChild.alt = "";
    element("span", button, image.title);
    button.onclick = () => set({ image: index });
  });
  for (let block = 1; block <= blocks; block++) {
    const button = element("button", $(".growth"));
    button.type = "button";
    element("canvas", button);
    element("span", button, `${texts.block} ${block}`);
    button.onclick = () => set({ block });
  }
  for (const [value, text] of [["mean", texts.mean], ["max", texts.max], ["min", texts.min]]) element("option", $("#head"), text).value = value;
  $("#head").parentElement.hidden = heads === 1;
  for (let head = 0; head < heads; head++) element("option", $("#head"), `${texts.head} ${head + 1}`).value = head;
  $("#block").max = blocks;
  $("#view").onchange = (event) => set({ view: event.target.value });
  $("#head").onchange = (event) => set({ head: event.target.value });
  $("#block").oninput = (event) => set({ block: Number(event.target.value) });
  $("#strength").oninput = (event) => set({ strength: Number(event.target.value) });
  $("#residual").onchange = (event) => set({ residual: event.target.checked });
  $("#discard").oninput = (event) => set({ discard: Number(event.target.value) });
  if (!data.class_token) $("#class-token").textContent = texts.from_mean;
  $("#class-token").onclick = () => set({ query: 0, pinned: false, target: null });

  // Pointing selects the query patch. A click or tap pins it; pointing then shows the weight of each patch.
  for (const panel of document.querySelectorAll(".explorer .panel")) {
    const under = (event) => {
      const box = panel.getBoundingClientRect();
      const column = Math.floor(columns * (event.clientX - box.left) / box.width);
      const row = Math.floor(rows * (event.clientY - box.top) / box.height);
      const inside = column >= 0 && column < columns && row >= 0 && row < rows;
      return inside ? 1 + row * columns + column : null;
    };
    panel.onpointermove = (event) => {
      const token = under(event);
      if (token === null || token === (state.pinned ? state.target : state.query)) return;
      set(state.pinned ? { target: token } : { query: token, target: null });
    };
    panel.onclick = (event) => {
      const token = under(event);
      if (token === null) return;
      set(state.pinned && token === state.query ? { pinned: false, target: null } : { query: token, pinned: true, target: null });
    };
    panel.onpointerleave = () => { if (state.pinned) set({ target: null }); };
  }
  $("#overlay").onkeydown = (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key === "Home" || event.key === "Escape") set({ query: 0, pinned: false, target: null });
    else if (event.key === "Enter" || event.key === " ") set({ pinned: !state.pinned && state.query > 0, target: null });
    else if (event.key in moves) {
      const from = state.pinned ? state.target ?? state.query : state.query;
      const [down, right] = from === 0 ? [0, 0] : moves[event.key];
      const row = Math.min(Math.max(Math.floor((Math.max(from, 1) - 1) / columns) + down, 0), rows - 1);
      const column = Math.min(Math.max((Math.max(from, 1) - 1) % columns + right, 0), columns - 1);
      const token = 1 + row * columns + column;
      set(state.pinned ? { target: token } : { query: token, target: null });
    } else return;
    event.preventDefault();
  };
  draw();
})();
