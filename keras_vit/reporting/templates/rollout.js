"use strict";
// What the pages show: maps of the attention scores of one image, and Attention Rollout.
// Token 0 is what the head reads, and tokens 1, 2, ... are the patches, row by row. Without a class
// token, token 0 is the mean of the patches, and the matrices of scores have no row for it.

// A function from the state of a page to the weight of each token. The state names the `query` token,
// the `head` ("mean", "max", "min" or a number), the `view` ("rollout" up to `block`, or "attention"
// of that block alone, counted from 1), and the rollout's `residual` and fraction to `discard`;
// `image` tells images apart. `scoresOf(block, head, i)` is row `i` of a matrix, counted from 0.
function attentionMaps({ blocks, heads, tokens, class_token }, scoresOf) {
  const fuse = { mean: (a, b) => a + b / heads, max: Math.max, min: Math.min };
  const cache = { key: "", steps: [] };

  // A row of a block's matrix: that of the selected head, or of all heads fused.
  function fused({ head }, block, i) {
    if (!isNaN(head)) return scoresOf(block, Number(head), i);
    const row = new Float64Array(tokens).fill(head === "min" ? 1 : 0);
    for (let a = 0; a < heads; a++) {
      const scores = scoresOf(block, a, i);
      for (let j = 0; j < tokens; j++) row[j] = fuse[head](row[j], scores[j]);
    }
    return row;
  }

  // The factor of a block in the rollout: attention without its smallest weights, plus the residual connection.
  function step(state, block) {
    const matrix = new Float32Array(tokens * tokens), count = Math.floor(tokens * tokens * state.discard);
    for (let i = 0; i < tokens; i++) matrix.set(fused(state, block, i), i * tokens);
    if (count > 0) {
      const order = Array.from(matrix.keys()).sort((a, b) => matrix[a] - matrix[b]);
      for (const index of order.slice(0, count)) if (!class_token || index % tokens) matrix[index] = 0;
    }
    for (let row = 0; row < tokens; row++) {
      if (state.residual) matrix[row * tokens + row] += 1;
      let sum = 0;
      for (let column = 0; column < tokens; column++) sum += matrix[row * tokens + column];
      if (sum > 0) for (let column = 0; column < tokens; column++) matrix[row * tokens + column] /= sum;
    }
    return matrix;
  }

  function steps(state) {
    const key = [state.image, state.head, state.residual, state.discard].join();
    if (cache.key !== key) Object.assign(cache, { key, steps: Array.from({ length: blocks }, (_, block) => step(state, block)) });
    return cache.steps;
  }

  // The weight of each row of a matrix in the query: a single row, or all of them for the mean.
  function queryWeights({ query }) {
    const row = new Float64Array(tokens);
    if (!class_token && query === 0) return row.fill(1 / tokens);
    row[query - (class_token ? 0 : 1)] = 1;
    return row;
  }

  // A row times a matrix, given by its rows.
  function times(row, rowOf) {
    const product = new Float64Array(tokens);
    row.forEach((weight, i) => {
      if (!weight) return;
      const other = rowOf(i);
      for (let j = 0; j < tokens; j++) product[j] += weight * other[j];
    });
    return product;
  }

  // The query's row of the product of all steps up to a block, multiplied from the last to the first.
  function rollout(state) {
    return steps(state).slice(0, state.block).reduceRight(
      (row, matrix) => times(row, (i) => matrix.subarray(i * tokens, (i + 1) * tokens)), queryWeights(state));
  }

  return (state) => {
    const row = state.view === "rollout" ? rollout(state) : times(queryWeights(state), (i) => fused(state, state.block - 1, i));
    return class_token ? row : Float64Array.from([0, ...row]);  // No token attends to the mean of the patches.
  };
}

// The smallest and the largest weight of a patch. With the residual connection, most of a patch's weight stays with
// itself and would hide the others: the query is left out.
function rangeOf(weights, query) {
  let others = weights.slice(1).filter((_, index) => index + 1 !== query);
  if (others.length === 0) others = weights.slice(1);
  return [others.reduce((a, b) => Math.min(a, b)), others.reduce((a, b) => Math.max(a, b))];
}

const fractionOf = (value, low, high) => high > low ? Math.min(Math.max((value - low) / (high - low), 0), 1) : 0;
