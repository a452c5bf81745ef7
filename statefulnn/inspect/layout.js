"use strict";

// Lays a graph out in layers from top to bottom (Sugiyama, Tagawa and Toda 1981): ranks by the longest path,
// order within a rank by barycenters, positions by averages of neighbours.
//
// nodes: [{id, w, h}], edges: [[from, to]]. Sets x and y (centres) of nodes and returns {w, h, routes}, where a
// route is the list of points that an edge goes through.
function layout(nodes, edges, gapX = 26, gapY = 34) {
  const byId = new Map(nodes.map(n => [n.id, n]));
  const links = edges.filter(([a, b]) => byId.has(a) && byId.has(b) && a !== b);
  const rank = longestPaths(nodes, links);
  const layers = [];
  const put = n => (layers[n.rank] ??= []).push(n);
  for (const n of nodes) { n.rank = rank.get(n.id); n.up = []; n.down = []; put(n); }
  const routes = links.map(([a, b]) => {
    // An edge over several ranks goes through a point on each, so that it finds its way past what lies there.
    const chain = [byId.get(a)];
    for (let r = rank.get(a) + 1; r < rank.get(b); r++) {
      const point = { w: 10, h: 0, rank: r, up: [], down: [], bend: true };
      put(point);
      chain.push(point);
    }
    chain.push(byId.get(b));
    for (let i = 1; i < chain.length; i++) { chain[i - 1].down.push(chain[i]); chain[i].up.push(chain[i - 1]); }
    return chain;
  });
  order(layers);
  place(layers, gapX);
  let y = 0;
  for (const layer of layers) {
    const height = Math.max(...layer.map(n => n.h));
    for (const n of layer) { n.y = y + height / 2; if (n.bend) n.h = height; }
    y += height + gapY;
  }
  const all = layers.flat();
  const left = Math.min(...all.map(n => n.x - n.w / 2));
  for (const n of all) n.x -= left;
  return {
    w: Math.max(...all.map(n => n.x + n.w / 2)),
    h: y - gapY,
    routes: routes.map(chain => chain.map(n => [n.x, n.y, n.h])),
  };
}

function longestPaths(nodes, links) {
  const rank = new Map(nodes.map(n => [n.id, 0]));
  const out = new Map(nodes.map(n => [n.id, []]));
  const waiting = new Map(nodes.map(n => [n.id, 0]));
  for (const [a, b] of links) { out.get(a).push(b); waiting.set(b, waiting.get(b) + 1); }
  const ready = nodes.map(n => n.id).filter(id => !waiting.get(id));
  for (let i = 0; i < ready.length; i++) {
    for (const b of out.get(ready[i])) {
      rank.set(b, Math.max(rank.get(b), rank.get(ready[i]) + 1));
      waiting.set(b, waiting.get(b) - 1);
      if (!waiting.get(b)) ready.push(b);
    }
  }
  // A node without inputs, such as a table of positions, stands just above the first that needs it.
  const goals = new Map();
  for (const [a, b] of links) goals.set(a, Math.min(goals.get(a) ?? Infinity, rank.get(b)));
  const entered = new Set(links.map(([, b]) => b));
  for (const n of nodes) if (!entered.has(n.id) && n.id !== "in" && goals.has(n.id)) rank.set(n.id, goals.get(n.id) - 1);
  return rank;
}

function order(layers) {
  layers.forEach(layer => layer.forEach((n, i) => { n.at = i; }));
  const sweep = (list, side) => {
    for (const layer of list) {
      for (const n of layer) {
        const near = n[side];
        n.key = near.length ? near.reduce((sum, m) => sum + m.at, 0) / near.length : n.at;
      }
      layer.sort((a, b) => a.key - b.key || a.at - b.at);
      layer.forEach((n, i) => { n.at = i; });
    }
  };
  for (let i = 0; i < 4; i++) { sweep(layers, "up"); sweep([...layers].reverse(), "down"); }
}

function place(layers, gap) {
  const distance = (a, b) => (a.w + b.w) / 2 + (a.bend && b.bend ? 12 : gap);
  for (const layer of layers) {
    let x = 0;
    layer.forEach((n, i) => { x += i ? distance(layer[i - 1], n) : 0; n.x = x; });
    const middle = (layer[0].x + layer[layer.length - 1].x) / 2;
    for (const n of layer) n.x -= middle;
  }
  for (let i = 0; i < 25; i++) {  // downwards at last, so that what follows one node stands below it
    const list = i % 2 ? [...layers].reverse() : layers;
    for (const layer of list) {
      for (const n of layer) {
        const near = n[i % 2 ? "down" : "up"];
        // Chains of layers stay straight, and so do long edges; these give way to each other.
        const weight = m => (m.bend && n.bend ? 8 : m.bend || n.bend ? 0.02 : 1);
        const total = near.reduce((sum, m) => sum + weight(m), 0);
        n.want = near.length ? near.reduce((sum, m) => sum + weight(m) * m.x, 0) / total : n.x;
      }
      // As near to where they want to be as the order allows: the mean of pushing right and pushing left.
      const right = [], left = [];
      layer.forEach((n, k) => { right[k] = k ? Math.max(n.want, right[k - 1] + distance(layer[k - 1], n)) : n.want; });
      for (let k = layer.length - 1; k >= 0; k--) {
        const n = layer[k];
        left[k] = k < layer.length - 1 ? Math.min(n.want, left[k + 1] - distance(n, layer[k + 1])) : n.want;
      }
      layer.forEach((n, k) => { n.x = (right[k] + left[k]) / 2; });
    }
  }
}
