// ---- domains: which experts each domain uses, and how alike domains are, layer by layer

function layerSelect(state) {
  const layers = Math.max(...page.models.map((model) => model.layers.length));
  return select(
    "Layer",
    Array.from({ length: layers }, (_, n) => [n, String(n)]),
    state.layer,
    (layer) => go({ layer: Number(layer), expert: -1 }),
  );
}

const extremes = (arrays) => {
  let low = Infinity,
    high = -Infinity;
  for (const array of arrays)
    for (const value of array) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  return [low, high];
};

const measures = { probability: "mean probability", use: "share of tokens that choose it" };

function showDomains(panel, state) {
  const { layer, measure } = state;
  unlessDrawn(panel, JSON.stringify([layer, measure]), () => {
    const shown = page.models.filter((model) => model.layers[layer]);
    const [, high] = extremes(shown.map((model) => model.layers[layer][measure]));
    const [alike] = extremes(page.models.flatMap((model) => model.layers.map((each) => each.similarity)));
    return [
      element(
        "div.bar",
        {},
        layerSelect(state),
        select("Show", Object.entries(measures), measure, (value) => go({ measure: value })),
      ),
      element("h2", {}, "Experts of each domain"),
      element(
        "p.soft",
        {},
        "A row is a domain, a column an expert; experts that are chosen together stand together. " +
          "All models share the colours.",
      ),
      scale("0", percent(high), "rising"),
      element(
        "div.grid",
        {},
        shown.map((model) => useHeatmap(model, layer, measure, high)),
      ),
      element("h2", {}, "How alike domains are"),
      element(
        "p.soft",
        {},
        "The cosine between the mean probabilities of two domains: where all are near 1, the layer " +
          "routes all domains alike. All models and layers share the colours.",
      ),
      scale(alike.toFixed(2), "1", "rising"),
      element(
        "div.grid",
        {},
        shown.map((model) => similarityHeatmap(model, layer, alike)),
      ),
      element("h2", {}, "How many experts a domain takes"),
      element(
        "p.soft",
        {},
        "Experts whose mean probability is above uniform, and the entropy of a domain's mean " +
          "probabilities, of at most log₂ of the number of experts.",
      ),
      element("div.card.scroll", {}, coverageTable(shown, layer)),
    ];
  });
}

function useHeatmap(model, layer, measure, high) {
  const { order, [measure]: values, block } = model.layers[layer],
    rows = model.domains.map(domainName);
  const ordered = rows.flatMap((_, row) => order.map((expert) => values[row * order.length + expert]));
  return card(
    model.name,
    `layer ${layer}, ${plural(order.length, "expert")}`,
    heatmap({
      label: `${measures[measure]} of each expert in layer ${layer} of ${model.name}, by domain`,
      rows,
      columns: order.map(String),
      title: "expert",
      values: ordered,
      range: [0, high],
      height: `${60 + 24 * rows.length}px`,
      lines: (row, column, value) => [
        rows[row],
        `expert ${order[column]}, block ${block[order[column]]}`,
        `${measures[measure]} ${percent(value)}`,
      ],
      onclick: (row, column) => go({ tab: "experts", model: model.place, cluster: -1, expert: order[column] }),
    }),
  );
}

function similarityHeatmap(model, layer, low) {
  const names = model.domains.map(domainName);
  return card(
    model.name,
    `layer ${layer}`,
    heatmap({
      label: `Cosine similarity of domains in layer ${layer} of ${model.name}`,
      rows: names,
      columns: names,
      rotate: 45,
      values: model.layers[layer].similarity,
      range: [low, 1],
      height: `${100 + 26 * names.length}px`,
      lines: (row, column, value) => [`${names[row]} and ${names[column]}`, `cosine ${value.toFixed(3)}`],
    }),
  );
}

function coverageTable(models, layer) {
  const cell = (text) => element("td.number", {}, text);
  return element(
    "table",
    {},
    element(
      "thead",
      {},
      element(
        "tr",
        {},
        element("td"),
        models.map((model) => element("th.group", { colspan: 2, scope: "colgroup" }, model.name)),
      ),
      element(
        "tr",
        {},
        element("th", { scope: "col" }, "domain"),
        models.map(() => ["experts", "bits"].map((name) => element("th.number", { scope: "col" }, name))),
      ),
    ),
    element(
      "tbody",
      {},
      models[0].domains.map((domain, row) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, domainName(domain)),
          models.map(
            ({
              layers: {
                [layer]: { coverage, order, entropy },
              },
            }) => [cell(`${coverage[row]} of ${order.length}`), cell(entropy[row].toFixed(2))],
          ),
        ),
      ),
    ),
  );
}
