"use strict";
// A Vision Transformer over typed arrays, and Pillow's resampling. It needs no page: it runs in a worker.

function bytesOf(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

// The model that `page.pack` packed, as a function from pixels, H x W x C from 0 to 255, to its logits
// and the attention scores of all tokens, blocks x heads x tokens x tokens.
function visionTransformer({ sizes, mean, scale, levels, steps }) {
  const { width, channels, patch, columns, dim, hidden, heads, blocks, tokens, class_token, classes, epsilon } = sizes;
  const rowSteps = new Float32Array(bytesOf(steps).buffer);
  let values = new Int16Array(bytesOf(levels).buffer), value = 0, row = 0;
  // The next tensor: 16-bit levels, times the step of their row.
  const tensor = (rows, size) => {
    const weights = new Float32Array(rows * size);
    for (let i = 0; i < weights.length; i++) weights[i] = values[value++] * rowSteps[row + Math.floor(i / size)];
    row += rows;
    return weights;
  };
  const dense = (inputs, outputs) => ({ inputs, outputs, kernel: tensor(inputs, outputs), bias: tensor(1, outputs) });
  const norm = () => ({ gamma: tensor(1, dim), beta: tensor(1, dim) });
  const embedding = dense(patch * patch * channels, dim);
  const classToken = class_token ? tensor(1, dim) : null;
  const positions = tensor(tokens, dim);
  const layers = Array.from({ length: blocks }, () => ({
    attentionNorm: norm(), query: dense(dim, dim), key: dense(dim, dim), value: dense(dim, dim), output: dense(dim, dim),
    mlpNorm: norm(), hidden: dense(dim, hidden), narrow: dense(hidden, dim),
  }));
  const lastNorm = norm(), head = dense(dim, classes);
  values = null;  // All of them are read.

  // Rows of inputs times the kernel, plus the bias. Tiles of 4 x 4 outputs read each number once for four of them.
  function apply({ inputs, outputs, kernel, bias }, x) {
    const rows = x.length / inputs, y = new Float32Array(rows * outputs);
    const tiledRows = rows - rows % 4, tiledColumns = outputs - outputs % 4;
    for (let r = 0; r < tiledRows; r += 4) {
      const x0 = r * inputs, x1 = x0 + inputs, x2 = x1 + inputs, x3 = x2 + inputs;
      for (let c = 0; c < tiledColumns; c += 4) {
        const b0 = bias[c], b1 = bias[c + 1], b2 = bias[c + 2], b3 = bias[c + 3];
        let s00 = b0, s01 = b1, s02 = b2, s03 = b3, s10 = b0, s11 = b1, s12 = b2, s13 = b3;
        let s20 = b0, s21 = b1, s22 = b2, s23 = b3, s30 = b0, s31 = b1, s32 = b2, s33 = b3;
        for (let i = 0, k = c; i < inputs; i++, k += outputs) {
          const k0 = kernel[k], k1 = kernel[k + 1], k2 = kernel[k + 2], k3 = kernel[k + 3];
          const v0 = x[x0 + i], v1 = x[x1 + i], v2 = x[x2 + i], v3 = x[x3 + i];
          s00 += v0 * k0; s01 += v0 * k1; s02 += v0 * k2; s03 += v0 * k3;
          s10 += v1 * k0; s11 += v1 * k1; s12 += v1 * k2; s13 += v1 * k3;
          s20 += v2 * k0; s21 += v2 * k1; s22 += v2 * k2; s23 += v2 * k3;
          s30 += v3 * k0; s31 += v3 * k1; s32 += v3 * k2; s33 += v3 * k3;
        }
        const y0 = r * outputs + c, y1 = y0 + outputs, y2 = y1 + outputs, y3 = y2 + outputs;
        y[y0] = s00; y[y0 + 1] = s01; y[y0 + 2] = s02; y[y0 + 3] = s03;
        y[y1] = s10; y[y1 + 1] = s11; y[y1 + 2] = s12; y[y1 + 3] = s13;
        y[y2] = s20; y[y2 + 1] = s21; y[y2 + 2] = s22; y[y2 + 3] = s23;
        y[y3] = s30; y[y3 + 1] = s31; y[y3 + 2] = s32; y[y3 + 3] = s33;
      }
    }
    for (let r = 0; r < rows; r++) {
      for (let c = r < tiledRows ? tiledColumns : 0; c < outputs; c++) {
        let sum = bias[c];
        for (let i = 0; i < inputs; i++) sum += x[r * inputs + i] * kernel[i * outputs + c];
        y[r * outputs + c] = sum;
      }
    }
    return y;
  }

  function normalized({ gamma, beta }, x) {
    const y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += dim) {
      let sum = 0, squares = 0;
      for (let i = 0; i < dim; i++) sum += x[start + i];
      for (let i = 0; i < dim; i++) squares += (x[start + i] - sum / dim) ** 2;
      const factor = 1 / Math.sqrt(squares / dim + epsilon);
      for (let i = 0; i < dim; i++) y[start + i] = (x[start + i] - sum / dim) * factor * gamma[i] + beta[i];
    }
    return y;
  }

  const add = (x, y) => x.map((value, i) => value + y[i]);

  // The error function to 1.5e-7, formula 7.1.26 of Abramowitz & Stegun.
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return Math.sign(x) * (1 - series * Math.exp(-x * x));
  }
  const gelu = (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));

  function embedded(pixels) {
    const size = patch * patch * channels, patches = new Float32Array((tokens - (class_token ? 1 : 0)) * size);
    for (let start = 0, n = 0; start < patches.length; start += size, n++) {
      for (let i = 0; i < size; i++) {
        const channel = i % channels, x = Math.floor(i / channels) % patch, y = Math.floor(i / channels / patch);
        const top = Math.floor(n / columns) * patch, left = n % columns * patch;
        patches[start + i] = (pixels[((top + y) * width + left + x) * channels + channel] - mean[channel]) / scale[channel];
      }
    }
    const projected = apply(embedding, patches), sequence = new Float32Array(tokens * dim);
    if (class_token) sequence.set(classToken);
    sequence.set(projected, sequence.length - projected.length);
    return add(sequence, positions);
  }

  // Writes the scores of all tokens of a block, tokens x tokens for each head, and returns the heads' sums of the
  // values for the first `rows` tokens.
  function attended(query, key, value, scores, rows) {
    const size = dim / heads, y = new Float32Array(rows * dim);
    for (let head = 0, start = 0; head < heads; head++) {
      for (let t = 0; t < tokens; t++, start += tokens) {
        const q = t * dim + head * size;
        let highest = -Infinity, sum = 0;
        for (let s = 0; s < tokens; s++) {
          const k = s * dim + head * size;
          let product = 0;
          for (let i = 0; i < size; i++) product += query[q + i] * key[k + i];
          scores[start + s] = product /= Math.sqrt(size);
          if (product > highest) highest = product;
        }
        for (let s = 0; s < tokens; s++) sum += scores[start + s] = Math.exp(scores[start + s] - highest);
        for (let s = 0; s < tokens; s++) {
          const weight = scores[start + s] /= sum, v = s * dim + head * size;
          if (t < rows) for (let i = 0; i < size; i++) y[q + i] += weight * value[v + i];
        }
      }
    }
    return y;
  }

  return (pixels) => {
    let x = embedded(pixels);
    const matrix = heads * tokens * tokens, scores = new Float32Array(blocks * matrix);
    layers.forEach((layer, block) => {
      // The head reads the class token only: the last block skips the others, except in its scores.
      const rows = class_token && block === blocks - 1 ? 1 : tokens;
      const normal = normalized(layer.attentionNorm, x);
      const [query, key, value] = [layer.query, layer.key, layer.value].map((projection) => apply(projection, normal));
      const sums = attended(query, key, value, scores.subarray(block * matrix, (block + 1) * matrix), rows);
      x = add(x.subarray(0, rows * dim), apply(layer.output, sums));
      const wide = apply(layer.hidden, normalized(layer.mlpNorm, x)).map(gelu);
      x = add(x, apply(layer.narrow, wide));
    });
    x = normalized(lastNorm, x);
    const read = new Float32Array(dim), count = x.length / dim;
    for (let i = 0; i < x.length; i++) read[i % dim] += x[i] / count;
    return { logits: apply(head, read), scores };
  };
}

// The part of a picture that becomes the model's image, which a "pad" extends beyond the picture.
function partOf({ width, height, resize }, picture) {
  const ratio = width / height, isWide = picture.width / picture.height >= ratio, part = { width: picture.width, height: picture.height };
  if (resize !== "squash") {
    if (isWide === (resize === "crop")) part.width = ratio * picture.height;
    else part.height = picture.width / ratio;
  }
  return { ...part, left: (picture.width - part.width) / 2, top: (picture.height - part.height) / 2 };
}

// Resizes a picture whose rows come in strips as Pillow does after `Image.draft`: pixels of a JPEG are averaged
// `factor` x `factor` first; then a triangle filter in fixed point, rows before columns, each rounded to 8 bits.
function resizer(sizes, picture) {
  const { factor } = picture, { width, height, channels } = sizes;
  const size = { width: Math.ceil(picture.width / factor), height: Math.ceil(picture.height / factor) };
  const part = partOf(sizes, size), inner = { width, height, left: 0, top: 0 };
  if (sizes.resize === "pad") {
    // Black is added around the picture.
    if (size.width / size.height > width / height) inner.height = Math.max(1, Math.min(height, even(size.height / size.width * width)));
    else inner.width = Math.max(1, Math.min(width, even(size.width / size.height * height)));
    inner.left = even((width - inner.width) / 2);
    inner.top = even((height - inner.height) / 2);
    Object.assign(part, { left: 0, top: 0 }, size);
  }
  const across = triangles(size.width, part.left, part.width, inner.width);
  const along = triangles(size.height, part.top, part.height, inner.height);
  const narrow = new Uint8Array(size.height * inner.width * channels);
  let filled = 0;

  // Rounds halves to even numbers, as Python does.
  function even(x) {
    const below = Math.floor(x);
    return x - below === 0.5 ? below + below % 2 : Math.round(x);
  }

  function triangles(from, start, length, to) {
    const step = length / to, support = Math.max(step, 1);
    return Array.from({ length: to }, (_, i) => {
      const center = start + (i + 0.5) * step;
      const first = Math.max(Math.trunc(center - support + 0.5), 0), end = Math.min(Math.trunc(center + support + 0.5), from);
      const weights = Array.from({ length: end - first }, (_, j) => Math.max(1 - Math.abs((first + j - center + 0.5) / support), 0));
      const sum = weights.reduce((a, b) => a + b);
      return { first, weights: Int32Array.from(weights, (weight) => 0.5 + weight / sum * 2 ** 22) };
    });
  }

  // One output row of a pass from `source`, whose neighbours along the filter are `stride` values apart.
  function filtered({ first, weights }, source, start, stride) {
    let sum = 2 ** 21;
    for (let j = 0, at = start + first * stride; j < weights.length; j++, at += stride) sum += source[at] * weights[j];
    return Math.min(sum >> 22, 255);
  }

  // A row of grey or RGB from `count` rows of RGBA.
  function averaged(rgba, top, count) {
    const row = new Uint8Array(size.width * channels);
    for (let x = 0; x < size.width; x++) {
      const left = x * factor, right = Math.min(left + factor, picture.width), pixels = count * (right - left);
      let r = pixels / 2, g = r, b = r;
      for (let y = top; y < top + count; y++) {
        for (let at = 4 * (y * picture.width + left), end = at + 4 * (right - left); at < end; at += 4) {
          r += rgba[at];
          g += rgba[at + 1];
          b += rgba[at + 2];
        }
      }
      r = Math.floor(r / pixels);
      g = Math.floor(g / pixels);
      b = Math.floor(b / pixels);
      if (channels === 1) row[x] = r * 19595 + g * 38470 + b * 7471 + 32768 >> 16;
      else {
        row[3 * x] = r;
        row[3 * x + 1] = g;
        row[3 * x + 2] = b;
      }
    }
    return row;
  }

  return {
    // Takes rows of RGBA, a multiple of `factor` of them unless they are the last.
    add(rgba) {
      const rows = rgba.length / 4 / picture.width;
      for (let top = 0; top < rows; top += factor, filled++) {
        const row = averaged(rgba, top, Math.min(factor, rows - top));
        for (let x = 0; x < inner.width; x++) for (let i = 0; i < channels; i++)
          narrow[(filled * inner.width + x) * channels + i] = filtered(across[x], row, i, channels);
      }
      return filled === size.height;
    },
    // The picture as the model takes it, H x W x C.
    pixels() {
      const pixels = new Uint8Array(height * width * channels), stride = inner.width * channels;
      for (let y = 0; y < inner.height; y++) {
        const start = ((inner.top + y) * width + inner.left) * channels;
        for (let i = 0; i < stride; i++) pixels[start + i] = filtered(along[y], narrow, i, stride);
      }
      return pixels;
    },
  };
}

// What the worker does with messages: a model, then pictures, each announced by its size and followed by its rows.
function answering(post) {
  let model, forward, picture, reading;
  return (message) => {
    if (message.model) {
      model = message.model.sizes;
      forward = visionTransformer(message.model);
    } else if (message.picture) {
      picture = message.picture;
      reading = resizer(model, picture);
    } else if (reading.add(message.rows)) {
      const pixels = reading.pixels(), start = performance.now();
      const answer = { id: picture.id, pixels, ...forward(pixels), milliseconds: performance.now() - start };
      post(answer, [answer.scores.buffer]);
    }
  };
}
