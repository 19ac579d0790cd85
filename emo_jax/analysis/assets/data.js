// ---- data: what the page holds, decoded when it is first asked for

const page = JSON.parse(document.getElementById("data").textContent);

function unpack({ kind, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  if (kind === "u1") return bytes;
  const view = new DataView(bytes.buffer);
  if (kind === "u2") return Uint16Array.from({ length: bytes.length / 2 }, (_, n) => view.getUint16(2 * n, true));
  if (kind === "u4") return Uint32Array.from({ length: bytes.length / 4 }, (_, n) => view.getUint32(4 * n, true));
  return Float32Array.from({ length: bytes.length / 2 }, (_, n) => half(view.getUint16(2 * n, true)));
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = bits & 1023;
  if (exponent === 31) return NaN;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}

// The object's packed arrays under these names become plain properties.
function lazily(object, names) {
  for (const name of names) {
    const packed = object[name];
    let array;
    Object.defineProperty(object, name, { get: () => (array ??= unpack(packed)) });
  }
}

// Where each of some consecutive lengths begins, and where the last one ends.
function starts(lengths) {
  const result = new Uint32Array(lengths.length + 1);
  lengths.forEach((length, n) => {
    result[n + 1] = result[n] + length;
  });
  return result;
}

lazily(page, ["number", "domain", "traced"]);
page.models.forEach((model, place) => {
  model.place = place;
  lazily(model, ["tokens", "lengths", "labels", "in_domain"]);
  lazily(model.chosen, ["experts"]);
  for (const layer of model.layers) lazily(layer, ["probability", "use", "similarity", "lift", "load"]);
  model.total = model.size.reduce((sum, size) => sum + size, 0);
  let first, traced;
  Object.defineProperty(model, "first", { get: () => (first ??= starts(model.tokens)) });
  Object.defineProperty(model, "firstTraced", {
    get: () => (traced ??= starts(Array.from(page.traced, (n) => model.tokens[n]))),
  });
});

// Tokens of `model` that the cluster holds: all of them, or a domain's.
function tokensIn(model, cluster, domain) {
  const place = page.domains.indexOf(domain);
  return place < 0 ? model.size[cluster] : model.in_domain[cluster * page.domains.length + place];
}

// Document n as `model` cut it: tokens { text, start, end, label }, start and end within the document's text.
function cut(model, n) {
  const result = [];
  for (let token = model.first[n], start = 0; token < model.first[n + 1]; token++) {
    const end = start + model.lengths[token];
    result.push({ text: model.texts[n].slice(start, end), start, end, label: model.labels[token] });
    start = end;
  }
  return result;
}

// The experts that a document's token chose: a list for each layer, or nothing where the page does not hold them.
function chosenExperts(model, n, token) {
  const place = page.traced.indexOf(n);
  if (place < 0) return undefined;
  const width = model.chosen.choices.reduce((sum, choices) => sum + choices, 0);
  let at = (model.firstTraced[place] + token) * width;
  return model.chosen.choices.map((choices) => Array.from(model.chosen.experts.subarray(at, (at += choices))));
}

function countLabel(model, n, cluster) {
  let count = 0;
  for (let token = model.first[n]; token < model.first[n + 1]; token++) count += model.labels[token] === cluster;
  return count;
}

// Ranges [start, end) where the text holds what is searched for, in any case.
function matches(text, searched) {
  if (!searched) return [];
  const pattern = new RegExp(searched.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "gi");
  return Array.from(text.matchAll(pattern), (match) => [match.index, match.index + match[0].length]);
}

const touches = (token, ranges) => ranges.some(([start, end]) => token.start < end && start < token.end);

// Numbers of the documents that the filters let through, in order.
function filtered({ domain, text, model, cluster }) {
  const place = page.domains.indexOf(domain),
    wanted = page.models[model];
  return Array.from(page.domain.keys()).filter(
    (n) =>
      (place < 0 || page.domain[n] === place) &&
      (!text || page.models.some((any) => matches(any.texts[n], text).length)) &&
      (cluster < 0 || countLabel(wanted, n, cluster)),
  );
}
