// ---- experts: which are chosen together, and what one of them is for

const PARTNERS = 8;

function showExperts(panel, state) {
  if (!panel.children.length) panel.append(element("div"), element("div.detail"));
  const [figures, detail] = panel.children,
    { layer, shape, model: place, expert } = state;
  unlessDrawn(figures, JSON.stringify([layer, shape, shape === "graph" ? [place, expert] : 0]), () => {
    const shown = page.models.filter((model) => model.layers[layer]);
    const limit = Math.max(1, ...shown.map((model) => liftLimit(model.layers[layer])));
    return [
      element(
        "div.bar",
        {},
        layerSelect(state),
        select(
          "Show",
          [
            ["matrix", "matrix"],
            ["graph", "graph"],
          ],
          shape,
          (value) => go({ shape: value }),
        ),
      ),
      element("h2", {}, "Experts that are chosen together"),
      element(
        "p.soft",
        {},
        "How many times as often a token chooses two experts as it would if it chose at random. Experts stand by " +
          "block, a group that is chosen together. Choose one to see what it is for.",
      ),
      shape === "matrix" ? scale(`÷ ${(2 ** limit).toFixed(1)}`, `× ${(2 ** limit).toFixed(1)}`, "diverging") : [],
      element(
        "div.grid",
        {},
        shown.map((model) =>
          card(
            model.name,
            `layer ${layer}, ${plural(model.layers[layer].order.length, "expert")}`,
            model.layers[layer].chance === 0
              ? element("p.soft", {}, "Here a token chooses one expert: none are chosen together.")
              : shape === "matrix"
                ? liftHeatmap(model, layer, limit)
                : liftGraph(model, layer, place === model.place ? expert : -1),
            expertButtons(model, layer),
          ),
        ),
      ),
    ];
  });
  figures
    .querySelectorAll(".expert")
    .forEach((button) =>
      button.setAttribute(
        "aria-pressed",
        Number(button.dataset.model) === place && Number(button.dataset.expert) === expert,
      ),
    );
  unlessDrawn(detail, JSON.stringify([layer, place, expert]), () => expertDetail(page.models[place], layer, expert));
}

function chooseExpert(model, expert) {
  go({ model: model.place, cluster: -1, expert });
}

// Over that of experts drawn at random, which is below 1 since a token chooses none twice.
const lift = (layer, a, b) => layer.lift[a * layer.order.length + b] / layer.chance;

// Of log₂ lift: the colours end where 99 % of the pairs that are often together do. Rare pairs say little.
function liftLimit(layer) {
  const sizes = pairsOf(layer)
    .map(({ value }) => Math.log2(value))
    .filter((size) => size > 0)
    .sort((a, b) => a - b);
  return Math.min(sizes[Math.floor(0.99 * (sizes.length - 1))] ?? 1, 4);
}

function pairsOf(layer) {
  const result = [];
  for (const a of layer.order)
    for (const b of layer.order) {
      const value = lift(layer, a, b);
      if (a < b && !Number.isNaN(value)) result.push({ a, b, value });
    }
  return result;
}

function liftHeatmap(model, layer, limit) {
  const { order } = model.layers[layer],
    names = order.map(String);
  const values = order.flatMap((a) => order.map((b) => (a === b ? NaN : Math.log2(lift(model.layers[layer], a, b)))));
  return heatmap({
    label: `Co-activation of experts in layer ${layer} of ${model.name}, ordered by block`,
    rows: names,
    columns: names,
    values,
    range: [-limit, limit],
    ramp: "diverging",
    height: "min(92vw, 440px)",
    lines: (row, column) => [
      `experts ${order[row]} and ${order[column]}`,
      `together ${lift(model.layers[layer], order[row], order[column]).toFixed(2)} × as often as by chance`,
    ],
    onclick: (row) => chooseExpert(model, order[row]),
  });
}

function liftGraph(model, layer, chosen) {
  const each = model.layers[layer];
  const pairs = pairsOf(each)
    .filter(({ value }) => value > 1)
    .sort((x, y) => y.value - x.value)
    .slice(0, 3 * each.order.length);
  const strongest = Math.log2(pairs[0]?.value ?? 2);
  return circle({
    label: `The ${pairs.length} strongest pairs of experts in layer ${layer} of ${model.name}`,
    names: each.order.map(String),
    blocks: each.order.map((expert) => each.block[expert]),
    sizes: each.order.map((expert) => each.load[expert]),
    chosen: String(chosen),
    pairs: pairs.map(({ a, b, value }) => ({
      from: String(a),
      to: String(b),
      value,
      strength: Math.log2(value) / strongest,
      colour: each.block[a] === each.block[b] ? blockColour(each.block[a]) : "#8b929c",
    })),
    lines: ({ dataType, data }) =>
      dataType === "node"
        ? [`expert ${data.name}`, `chosen by ${percent(data.value)} of tokens`]
        : [`experts ${data.source} and ${data.target}`, `together ${data.value.toFixed(2)} × as often as by chance`],
    onclick: (name) => chooseExpert(model, Number(name)),
  });
}

function expertButtons(model, layer) {
  const { order, block } = model.layers[layer];
  return element(
    "div.experts",
    { role: "group", "aria-label": `Experts of ${model.name}` },
    order.map((expert) =>
      element(
        "button.expert",
        {
          type: "button",
          "data-model": model.place,
          "data-expert": expert,
          title: `block ${block[expert]}`,
          "--colour": blockColour(block[expert]),
          onclick: () => chooseExpert(model, expert),
        },
        String(expert),
      ),
    ),
  );
}

function expertDetail(model, number, expert) {
  const layer = model.layers[number];
  if (!layer || !(expert >= 0 && expert < layer.order.length)) return [];
  const uses = model.domains.map((_, row) => layer.use[row * layer.order.length + expert]);
  const most = Math.max(...uses),
    byUse = uses.map((_, row) => row).sort((a, b) => uses[b] - uses[a]);
  const partners = layer.order
    .filter((other) => other !== expert && lift(layer, expert, other) > 1)
    .sort((a, b) => lift(layer, expert, b) - lift(layer, expert, a))
    .slice(0, PARTNERS);
  return [
    card(
      `Expert ${expert} of ${model.name}`,
      `layer ${number}, block ${layer.block[expert]}; chosen by ${percent(layer.load[expert])} of tokens`,
      element(
        "div.grid",
        {},
        element(
          "div",
          {},
          element("h4", {}, "Share of each domain's tokens that choose it"),
          element(
            "table",
            {},
            element(
              "tbody",
              {},
              byUse.map((row) =>
                element(
                  "tr",
                  {},
                  element("td", {}, domainName(model.domains[row])),
                  element(
                    "td.bar",
                    {},
                    element("div", {
                      "--share": `${(100 * uses[row]) / (most || 1)}%`,
                      "--colour": domainColour(model.domains[row]),
                    }),
                  ),
                  element("td.number", {}, percent(uses[row])),
                ),
              ),
            ),
          ),
        ),
        element(
          "div",
          {},
          element("h4", {}, "Frequent tokens that choose it most often, and how often"),
          layer.top_tokens[expert].length
            ? layer.top_tokens[expert].map(([text, share]) =>
                element("span.dot.share", {}, wordList([text]), percent(share)),
              )
            : element("p.soft", {}, "No token chooses it more than others do."),
          element("h4", {}, "Most often chosen with it"),
          element(
            "ol.partners",
            {},
            partners.map((other) =>
              element(
                "li",
                {},
                element(
                  "button.expert",
                  {
                    type: "button",
                    "--colour": blockColour(layer.block[other]),
                    onclick: () => chooseExpert(model, other),
                  },
                  String(other),
                ),
                element(
                  "span.soft",
                  {},
                  ` ${lift(layer, expert, other).toFixed(2)} × chance, block ${layer.block[other]}`,
                ),
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}
