"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const model = read("model-data"), { classes, texts, explorer, language } = read("page-data");
  document.getElementById("model-data").remove();  // Its megabytes are held once.
  const { width, height, rows, columns, blocks, heads, tokens, class_token } = model.sizes;
  const SHOWN = 5, STRIP = 2 ** 21, TAKES = 450;  // Classes; pixels read at once; milliseconds of a step of the animation.
  const $ = (selector) => document.querySelector(selector);
  const element = (name, parent, text = "") => {
    const made = parent.appendChild(document.createElement(name));
    made.textContent = text;
    return made;
  };
  const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const percent = (value, digits) => `${(100 * value).toFixed(digits).replace(".", explorer.decimal)}\u00a0%`;
  const main = $("main"), panel = $("#picture"), canvas = $("#picture canvas"), context = canvas.getContext("2d");
  const still = matchMedia("(prefers-reduced-motion: reduce)"), dark = matchMedia("(prefers-color-scheme: dark)");
  // What is shown: the picture, the pixels that the model sees, and its answer; the same of the next picture while it is read.
  const state = { image: 0, query: 0, target: null, pinned: 0, block: blocks, head: "mean", view: "rollout", residual: true, discard: 0 };
  const look = { pixels: 0, gap: 0, veil: 0 };  // Of the drawing, from 0 to 1.
  let source = null, seen = null, answer = null, maps = null, fractions = [], requested = 0;

  // The worker has the functions of its script and answers one picture after the other. Where a browser
  // has no workers for files, the page computes by itself.
  const waiting = new Map();
  const answered = (result) => { waiting.get(result.id)?.(result); waiting.delete(result.id); };
  const send = (() => {
    try {
      const script = $("#worker").textContent + "const answer = answering(postMessage); onmessage = (event) => answer(event.data);";
      const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
      worker.onmessage = (event) => answered(event.data);
      worker.onerror = () => {  // Such as a lack of memory.
        $("#problem").textContent = texts.failed;
        main.classList.add("waiting");  // What is shown answers another picture.
        main.setAttribute("aria-busy", "false");
      };
      return (message, moved = []) => worker.postMessage(message, moved);
    } catch {
      const here = answering((result) => setTimeout(() => answered(result)));
      return (message) => here(message);
    }
  })();
  send({ model });
  model.levels = model.steps = "";

  // Decodes a picture upright and without its colour profile, as `predict` does, where a browser knows these options.
  const decoded = (blob) => createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" })
    .catch(() => createImageBitmap(blob));

  // JPEG is decoded at an eighth, a quarter or half of its size where that leaves four times the model's.
  async function factorOf(blob, bitmap) {
    const start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
    if (start[0] !== 0xff || start[1] !== 0xd8) return 1;
    const wanted = 4 * Math.max(width, height), least = Math.floor(Math.min(bitmap.width, bitmap.height) / wanted);
    return [8, 4, 2].find((factor) => factor <= least) ?? 1;
  }

  // The worker's answer for a decoded picture, whose rows are sent in strips: a phone's canvas cannot hold all of them.
  function computed(bitmap, factor, id) {
    const done = new Promise((resolve) => waiting.set(id, resolve));
    send({ picture: { id, width: bitmap.width, height: bitmap.height, factor } });
    const count = Math.max(8, Math.floor(STRIP / bitmap.width / 8) * 8);
    const strip = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: Math.min(count, bitmap.height) });
    const pixels = strip.getContext("2d", { willReadFrequently: true });
    for (let top = 0; top < bitmap.height; top += count) {
      const size = Math.min(count, bitmap.height - top);
      pixels.fillStyle = "#fff";  // Under transparent pixels.
      pixels.fillRect(0, 0, strip.width, size);
      pixels.drawImage(bitmap, 0, -top);
      const { data } = pixels.getImageData(0, 0, strip.width, size);
      send({ rows: data }, [data.buffer]);
    }
    return done;
  }

  // Shows a picture, cuts it into its patches while the worker computes, and shows the answer.
  async function open(blob, name, button = null) {
    const id = ++requested, isCurrent = () => id === state.image;
    $("#problem").textContent = "";
    let bitmap;
    try {
      bitmap = await decoded(blob);
    } catch {
      if (id === requested) $("#problem").textContent = filled(texts.unreadable, { name });
      return;
    }
    const factor = await factorOf(blob, bitmap);
    if (id < state.image) return;  // A later one was read faster.
    state.image = id;
    main.setAttribute("aria-busy", "true");
    const result = computed(bitmap, factor, id);
    for (const other of document.querySelectorAll(".thumbnails button")) other.setAttribute("aria-pressed", other === button);
    [source, seen, fractions, answer] = [displayed(bitmap), null, [], null];
    Object.assign(state, { query: 0, target: null, pinned: 0 });
    Object.assign(look, { pixels: 0, gap: 0, veil: 0 });
    panel.className = "shown";
    panel.tabIndex = 0;
    panel.setAttribute("role", "application");
    panel.setAttribute("aria-label", explorer.panel);
    panel.style.aspectRatio = `${source.width} / ${source.height}`;
    panel.style.maxWidth = `calc(64vh * ${source.width / source.height})`;
    bitmap.close();
    mark();
    fit();
    await play({ gap: 1 }, isCurrent);
    const found = await result;
    if (!isCurrent()) return;
    seen = pixelated(found.pixels);
    await play({ pixels: 1 }, isCurrent);
    if (!isCurrent()) return;
    show(found, button?.title);
    main.classList.remove("waiting");
    main.setAttribute("aria-busy", "false");
    main.dataset.name = name;
    await play({ gap: 0, veil: 1, pixels: $("#pixels").checked ? 1 : 0 }, isCurrent);
  }

  // A copy of what the model sees of a picture, large enough for a screen.
  function displayed(bitmap) {
    const part = partOf(model.sizes, bitmap), scale = Math.min(1, 1600 / Math.max(part.width, part.height));
    const copy = document.createElement("canvas");
    copy.width = Math.max(1, Math.round(part.width * scale));
    copy.height = Math.max(1, Math.round(part.height * scale));
    const pixels = copy.getContext("2d");
    const place = [-part.left * scale, -part.top * scale, bitmap.width * scale, bitmap.height * scale];
    pixels.fillRect(0, 0, copy.width, copy.height);  // Black.
    pixels.fillStyle = "#fff";
    pixels.fillRect(...place);
    pixels.imageSmoothingQuality = "high";
    pixels.imageSmoothingEnabled = scale < 1;
    pixels.drawImage(bitmap, ...place);
    return copy;
  }

  function pixelated(pixels) {
    const copy = Object.assign(document.createElement("canvas"), { width, height });
    const image = new ImageData(width, height), channels = pixels.length / width / height;
    for (let i = 0; i < width * height; i++)
      for (let c = 0; c < 4; c++) image.data[4 * i + c] = c === 3 ? 255 : pixels[i * channels + (channels === 3 ? c : 0)];
    copy.getContext("2d").putImageData(image, 0, 0);
    return copy;
  }

  function play(to, isCurrent) {
    const from = { ...look }, start = performance.now();
    return new Promise((resolve) => {
      const step = (now) => {
        const passed = still.matches ? 1 : Math.min(Math.max((now - start) / TAKES, 0), 1), eased = passed * passed * (3 - 2 * passed);
        if (!isCurrent()) return resolve();
        for (const name in to) look[name] = from[name] + eased * (to[name] - from[name]);
        draw();
        if (passed < 1) requestAnimationFrame(step);
        else resolve();
      };
      step(start);
    });
  }

  function fit() {
    const box = panel.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    canvas.width = Math.max(columns, Math.round(box.width * ratio));
    canvas.height = Math.max(rows, Math.round(box.height * ratio));
    draw();
  }

  // Draws each patch in its place: apart while the picture is cut, and the paler the less it weighs.
  function draw() {
    if (!source) return;
    const strength = $("#strength").value / 100, ground = getComputedStyle(document.body).backgroundColor;
    const cell = [canvas.width / columns, canvas.height / rows], ratio = devicePixelRatio || 1;
    const gap = Math.max(1, Math.round(ratio)) + Math.round(look.gap * 0.14 * Math.min(...cell));
    context.clearRect(0, 0, canvas.width, canvas.height);
    const layer = (image, alpha, left, top, right, bottom, row, column) => {
      const part = [image.width / columns, image.height / rows];
      context.globalAlpha = alpha;
      // Pixels that are enlarged a lot stay squares, as in what the model sees.
      context.imageSmoothingEnabled = image !== seen && image.width > width;
      context.drawImage(image, column * part[0], row * part[1], ...part, left, top, right - left, bottom - top);
    };
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const left = Math.round(column * cell[0]) + (gap >> 1), right = Math.round((column + 1) * cell[0]) - (gap + 1 >> 1);
        const top = Math.round(row * cell[1]) + (gap >> 1), bottom = Math.round((row + 1) * cell[1]) - (gap + 1 >> 1);
        if (look.pixels < 1) layer(source, 1, left, top, right, bottom, row, column);
        if (look.pixels > 0 && seen) layer(seen, look.pixels, left, top, right, bottom, row, column);
        const fraction = fractions[row * columns + column];
        if (fraction === undefined) continue;
        context.globalAlpha = look.veil * strength * (1 - fraction);
        context.fillStyle = ground;
        context.fillRect(left, top, right - left, bottom - top);
      }
    }
    context.globalAlpha = 1;
  }

  function show(found, label = "") {
    answer = found;
    const highest = Math.max(...found.logits), powers = Array.from(found.logits, (logit) => Math.exp(logit - highest));
    const sum = powers.reduce((a, b) => a + b), probabilities = powers.map((power) => power / sum);
    const likeliest = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, SHOWN);
    const list = $("#classes");
    likeliest.forEach((index, place) => {
      // Rows stay, so that their bars move from one answer to the next.
      const row = list.children[place] ?? element("li", list);
      if (!row.children.length) ["span", "span", "i"].forEach((name) => element(name, row));
      row.children[0].textContent = classes[index];
      row.children[1].textContent = percent(probabilities[index], 1);
      requestAnimationFrame(() => row.style.setProperty("--part", `${100 * probabilities[index]}%`));
    });
    $("#label").textContent = label && filled(texts.labelled, { name: label });
    $("#label").hidden = !label;
    $("#said").textContent = likeliest.slice(0, 3).map((index) => `${classes[index]} ${percent(probabilities[index], 0)}`).join(", ");
    $("#facts").textContent = filled(texts.facts, {
      parameters: model.sizes.parameters.toLocaleString(language),
      milliseconds: found.milliseconds.toFixed(0),
    });
    maps = attentionMaps(model.sizes, (block, head, i) => {
      const start = ((block * heads + head) * tokens + i) * tokens;
      return found.scores.subarray(start, start + tokens);
    });
    explain();
    measure();
  }

  // Draws how far each head looks in the picture: the distance between two patches, weighted by attention.
  function measure() {
    if (!answer || !$(".learned").open) return;
    const count = rows * columns, first = tokens - count, apart = new Float32Array(count * count);
    for (let i = 0; i < count; i++) for (let j = 0; j < count; j++)
      apart[i * count + j] = model.sizes.patch * Math.hypot(Math.floor(i / columns) - Math.floor(j / columns), i % columns - j % columns);
    const distances = Array.from({ length: blocks * heads }, (_, matrix) => {
      let sum = 0, total = 0;
      for (let i = 0; i < count; i++) {
        const row = (matrix * tokens + first + i) * tokens + first;
        for (let j = 0; j < count; j++) {
          total += answer.scores[row + j];
          sum += answer.scores[row + j] * apart[i * count + j];
        }
      }
      return total > 0 ? sum / total : NaN;  // Where patches attend to the class token alone.
    });
    const plot = $(".plot"), uniform = apart.reduce((a, b) => a + b) / apart.length;
    const top = 1.1 * Math.max(uniform, ...distances.filter((x) => x >= 0), 1e-9), told = [];
    const shown = (value) => value.toFixed(1).replace(".", explorer.decimal);
    const place = (name, kind, block, value, text = "") => {
      const mark = Object.assign(element(name, plot, text), { className: kind });
      if (block) mark.style.left = `${100 * (block - 0.5) / blocks}%`;
      if (value !== null) mark.style.bottom = `${100 * value / top}%`;
      return mark;
    };
    plot.replaceChildren();
    place("hr", "", 0, uniform);
    place("span", "level", 0, uniform, shown(uniform));
    place("span", "level", 0, 0, "0");
    for (let block = 1; block <= blocks; block++) {
      const values = distances.slice((block - 1) * heads, block * heads), known = values.filter((x) => x >= 0);
      place("span", "block", block, null, block);
      values.forEach((value, head) => {
        if (!(value >= 0)) return;
        const mark = place("i", class_token && block === blocks ? "dot unread" : "dot", block, value);
        mark.title = `${nameOfMap({ block, head })}: ${shown(value)}`;
      });
      if (!known.length) continue;
      const mean = known.reduce((a, b) => a + b) / known.length;
      place("i", "dot mean", block, mean);
      told.push(`${explorer.block} ${block}: ${shown(mean)}`);
    }
    plot.setAttribute("aria-label", `${texts.distance}. ${filled(texts.all_heads, { heads })}: ${told.join("; ")}`);
    $("#distance").hidden = false;
  }

  // Draws the maps for what is selected.
  function explain() {
    if (!answer) return;
    const weights = maps(state), [low, high] = rangeOf(weights, state.query);
    fractions = Array.from(weights.slice(1), (weight) => fractionOf(weight, low, high));
    if (state.query) fractions[state.query - 1] = 1;
    draw();
    mark();
    const style = getComputedStyle(document.documentElement);
    const [pale, full] = ["--raised", "--accent"].map((name) => style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((x) => parseInt(x, 16)));
    for (const { view, block, head, button } of cells) {
      const values = maps({ ...state, view, block, head }), [low, high] = rangeOf(values, state.query);
      const map = button.firstChild, image = new ImageData(columns, rows);
      values.slice(1).forEach((value, i) => {
        const fraction = i + 1 === state.query ? 1 : fractionOf(value, low, high);
        image.data.set([...pale.map((from, c) => from + fraction * (full[c] - from)), 255], 4 * i);
      });
      map.getContext("2d").putImageData(image, 0, 0);
    }
    const caption = $("#caption");
    caption.replaceChildren();
    element("b", caption, nameOfMap(state));
    const token = state.query ? nameOf(state.query) : class_token ? explorer.class_token : explorer.mean_of_patches;
    const told = [`${explorer.from} ${token}`];
    if (state.pinned && !state.target) told.push(explorer.pinned);
    if (state.target) told.push(`${explorer.to} ${nameOf(state.target)}: ${percent(weights[state.target], weights[state.target] < 0.1 ? 1 : 0)}`);
    element("span", caption, [" ", ...told].join(" · "));
  }

  const nameOf = (token) => filled(explorer.patch, { row: Math.ceil(token / columns), column: (token - 1) % columns + 1 });
  const nameOfMap = ({ view, block, head }) => view === "rollout"
    ? block === 1 ? `${explorer.block} 1 (${texts.rollout})` : filled(texts.rollout_to, { block })
    : `${explorer.block} ${block}, ${head === "mean" ? filled(texts.all_heads, { heads }) : `${explorer.head} ${head + 1}`}`;

  function mark() {
    for (const [name, token] of [["query", state.query], ["target", state.target]]) {
      const box = $(".mark." + name);
      box.hidden = !token;
      if (!token) continue;
      box.style.left = `${100 * ((token - 1) % columns) / columns}%`;
      box.style.top = `${100 * Math.floor((token - 1) / columns) / rows}%`;
      box.style.width = `${100 / columns}%`;
      box.style.height = `${100 / rows}%`;
    }
  }

  // The table of maps: a row for each block, with the rollout up to it, the mean of its heads, and each head.
  const cells = [];
  function build() {
    const table = $(".maps"), kinds = [["rollout", "mean"], ["attention", "mean"], ...Array.from({ length: heads }, (_, head) => ["attention", head])];
    const heading = (row, scope, text) => Object.assign(element("th", row, text), { scope });
    const above = element("tr", table), top = element("tr", table);
    for (const text of [explorer.block, texts.rollout, texts.mean]) heading(above, "col", text).rowSpan = 2;
    heading(above, "colgroup", explorer.heads).colSpan = heads;
    for (let head = 1; head <= heads; head++) heading(top, "col", head);
    for (let block = 1; block <= blocks; block++) {
      const row = element("tr", table);
      heading(row, "row", block);
      for (const [view, head] of kinds) {
        const button = Object.assign(element("button", element("td", row)), { type: "button" });
        Object.assign(element("canvas", button), { width: columns, height: rows });
        button.setAttribute("role", "radio");
        button.setAttribute("aria-label", nameOfMap({ view, block, head }));
        button.title = nameOfMap({ view, block, head });
        const index = cells.push({ view, block, head, button }) - 1;
        button.onclick = () => select(index);
        button.onkeydown = (event) => {
          const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -kinds.length, ArrowDown: kinds.length }[event.key];
          if (!by) return;
          event.preventDefault();
          if (cells[index + by]) select(index + by, true);
        };
      }
    }
    table.style.setProperty("--count", kinds.length);
    select((blocks - 1) * kinds.length);
  }

  function select(index, focus = false) {
    cells.forEach(({ button }, i) => {
      button.setAttribute("aria-checked", i === index);
      button.tabIndex = i === index ? 0 : -1;
    });
    if (focus) cells[index].button.focus();
    const { view, block, head } = cells[index];
    set({ view, block, head });
  }

  let drawn = 0;
  function set(change) {
    Object.assign(state, change);
    cancelAnimationFrame(drawn);
    drawn = requestAnimationFrame(explain);
  }

  // Pointing asks what a patch attends to. A click or tap pins it; pointing then shows the weight of each patch.
  function under(event) {
    const box = panel.getBoundingClientRect();
    const column = Math.floor(columns * (event.clientX - box.left) / box.width), row = Math.floor(rows * (event.clientY - box.top) / box.height);
    return column >= 0 && column < columns && row >= 0 && row < rows ? 1 + row * columns + column : 0;
  }
  panel.onpointermove = (event) => {
    if (!answer || event.pointerType === "touch") return;
    const token = under(event);
    if (token !== (state.pinned ? state.target : state.query)) set(state.pinned ? { target: token } : { query: token });
  };
  panel.onpointerleave = (event) => { if (event.pointerType !== "touch") set({ query: state.pinned, target: null }); };
  panel.onclick = (event) => {
    if (panel.className === "empty") $("#file").click();
    if (!answer) return;
    const token = under(event), pinned = token === state.pinned ? 0 : token;
    set({ pinned, query: pinned, target: null });
  };
  panel.onkeydown = (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!answer) return;
    if (event.key === "Home") set({ query: 0, pinned: 0, target: null });
    else if (event.key === "Enter" || event.key === " ") set({ pinned: state.pinned ? 0 : state.query, target: null });
    else if (event.key in moves) {
      const from = state.pinned ? state.target || state.query : state.query;
      const [down, right] = from ? moves[event.key] : [0, 0], at = Math.max(from, 1) - 1;
      const row = Math.min(Math.max(Math.floor(at / columns) + down, 0), rows - 1);
      const column = Math.min(Math.max(at % columns + right, 0), columns - 1), token = 1 + row * columns + column;
      set(state.pinned ? { target: token } : { query: token });
    } else return;
    event.preventDefault();
    requestAnimationFrame(() => { $("#said").textContent = $("#caption").textContent; });
  };

  document.onkeydown = (event) => { if (event.key === "Escape") set({ query: 0, pinned: 0, target: null }); };

  // A picture comes from the computer, the camera, the clipboard, or from beside the page.
  function take(files) {
    const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
    if (file) open(file, file.name);
    else $("#problem").textContent = texts.nothing;
  }
  for (const input of [$("#file"), $("#camera")]) input.onchange = () => { take(input.files); input.value = ""; };
  document.onpaste = (event) => take(event.clipboardData.files);
  document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("dropping"); };
  document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); };
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files);
  };
  for (const button of document.querySelectorAll(".thumbnails button")) {
    const bytes = bytesOf(button.firstElementChild.src.split(",")[1]);
    button.onclick = () => open(new Blob([bytes], { type: "image/png" }), button.title, button);
  }
  document.body.dataset.drop = texts.drop;
  $("#strength").oninput = draw;
  $("#pixels").onchange = (event) => { const id = state.image; play({ pixels: event.target.checked && seen ? 1 : 0 }, () => id === state.image); };
  dark.onchange = explain;
  $(".learned").ontoggle = measure;
  new ResizeObserver(fit).observe(panel);
  build();
  $(".thumbnails button")?.click();
})();
