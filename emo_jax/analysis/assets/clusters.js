// ---- clusters: a list for each model, and sample documents of the one that is chosen

const SAMPLES = 5;

function showClusters(panel, state) {
  if (!panel.children.length) {
    panel.append(
      domainLegend(),
      element(
        "div.master",
        {},
        element(
          "div.lists",
          {},
          page.models.map(() => element("section.card")),
        ),
        element("div.detail"),
      ),
    );
  }
  page.models.forEach((model, place) => {
    const box = panel.querySelectorAll(".lists > section")[place];
    unlessDrawn(box, JSON.stringify([state.domain, state.text]), () => clusterList(model, state));
    box.querySelectorAll(".cluster").forEach((row) => {
      const chosen = place === state.model && Number(row.dataset.cluster) === state.cluster;
      row.setAttribute("aria-pressed", chosen);
    });
  });
  const detail = panel.querySelector(".detail"),
    { domain, text, model, cluster } = state;
  unlessDrawn(detail, JSON.stringify([domain, text, model, cluster]), () => clusterDetail(state).flat());
}

// How many of the tokens that hold the searched text each cluster has.
function matchedTokens(model, { domain, text }) {
  const result = model.size.map(() => 0);
  for (const n of filtered({ domain, text, cluster: -1 })) {
    const ranges = matches(model.texts[n], text);
    for (const token of ranges.length ? cut(model, n) : []) if (touches(token, ranges)) result[token.label] += 1;
  }
  return result;
}

function clusterList(model, state) {
  const amounts = state.text ? matchedTokens(model, state) : model.size.map((_, k) => tokensIn(model, k, state.domain));
  const sum = amounts.reduce((total, amount) => total + amount, 0);
  const order = amounts.map((_, k) => k).filter((k) => amounts[k]);
  if (state.text || state.domain) order.sort((a, b) => amounts[b] - amounts[a]);
  const what = state.text ? "tokens found" : state.domain ? `tokens of ${state.domain}` : "tokens";
  const rows = order.map((k) =>
    element(
      "button.cluster",
      {
        type: "button",
        "data-cluster": k,
        onclick: () => toggleCluster(model.place, k, { detail: true }),
      },
      element(
        "span.top",
        {},
        badge(k),
        element("b", {}, percent(amounts[k] / sum)),
        element("span.soft", {}, plural(amounts[k], "token")),
      ),
      wordList(model.words[k].slice(0, 6)),
      page.domains.length > 1
        ? domainBar(
            page.domains,
            page.domains.map((domain) => tokensIn(model, k, domain)),
          )
        : [],
    ),
  );
  return [
    element(
      "h3",
      {},
      `${model.name} `,
      element("small", {}, `${count(sum)} ${what} in ${plural(order.length, "cluster")}`),
    ),
    rows.length ? element("div.rows", {}, rows) : element("p.soft", {}, "No token here holds that text."),
  ];
}

// Before a cluster is chosen: which domains the clusters of each model hold.
function overview() {
  const hint =
    "Choose a cluster to see its documents. Clusters hold tokens that a model's routers treat alike; they are " +
    "numbered by falling size, and a number means something else in each model.";
  const heatmaps = page.domains.length > 1 ? page.models.map((model) => clusterHeatmap(model)) : [];
  return [
    card(
      "Clusters and domains",
      "",
      element("p.hint.soft", {}, hint),
      heatmaps.length ? scale("0", "100 %", "rising") : [],
    ),
    heatmaps,
  ];
}

function clusterHeatmap(model) {
  const rows = page.domains.map(domainName),
    columns = model.size.map((_, k) => String(k));
  const share = (domain, k) => tokensIn(model, k, domain) / model.size[k];
  return card(
    model.name,
    "share of each domain in each cluster",
    heatmap({
      label: `Share of each domain in each cluster of ${model.name}`,
      rows,
      columns,
      title: "cluster",
      values: page.domains.flatMap((domain) => model.size.map((_, k) => share(domain, k))),
      range: [0, 1],
      height: `${54 + 18 * rows.length}px`,
      lines: (row, k, value) => [`cluster ${k} of ${model.name}`, `${rows[row]} ${percent(value)}`],
      onclick: (row, k) => toggleCluster(model.place, k, { detail: true }),
    }),
  );
}

function clusterDetail(state) {
  const { model: place, cluster, domain, text } = state;
  if (cluster < 0) return overview();
  const model = page.models[place],
    listed = filtered(state);
  const share = new Map(listed.map((n) => [n, countLabel(model, n, cluster) / model.tokens[n]]));
  listed.sort((a, b) => share.get(b) - share.get(a) || a - b);
  const samples = element("div.samples");
  const more = element("button.chip", { type: "button", onclick: () => showMore() });
  const showMore = () => {
    const from = samples.children.length;
    samples.append(...listed.slice(from, from + SAMPLES).map((n) => sample(model, n, cluster, text)));
    const left = listed.length - samples.children.length;
    more.hidden = left <= 0;
    more.textContent = `More: ${plural(left, "document")} left`;
  };
  showMore();
  const size = tokensIn(model, cluster, domain);
  return [
    element(
      "section.card",
      {},
      element(
        "h3",
        {},
        badge(cluster),
        ` of ${model.name} `,
        element(
          "small",
          {},
          `${plural(model.size[cluster], "token")}, ${percent(model.size[cluster] / model.total)} of all` +
            (domain ? `; ${count(size)} of ${domainName(domain)}` : ""),
        ),
      ),
      element("p.hint", {}, element("span.soft", {}, "Most telling tokens "), wordList(model.words[cluster])),
      page.domains.length > 1
        ? element(
            "p.hint",
            {},
            domainBar(
              page.domains,
              page.domains.map((name) => tokensIn(model, cluster, name)),
            ),
          )
        : [],
      element(
        "p.hint.soft",
        {},
        listed.length
          ? `${plural(listed.length, "document")} with it, those with the largest share of it first.`
          : "No document that matches has it.",
      ),
      samples,
      more,
    ),
  ];
}

function sample(model, n, cluster, text) {
  const own = countLabel(model, n, cluster),
    domain = page.domains[page.domain[n]];
  return element(
    "article.sample",
    {},
    element(
      "p.hint",
      {},
      `Document ${page.number[n]} `,
      element("span.soft", {}, `${domain ? `· ${domain} ` : ""}· ${own} of ${plural(model.tokens[n], "token")} `),
      page.models.length > 1
        ? element(
            "button.link",
            { type: "button", onclick: () => go({ tab: "documents", document: n }) },
            "compare models",
          )
        : element(
            "button.link",
            { type: "button", onclick: () => go({ tab: "documents", document: n }) },
            "all clusters",
          ),
    ),
    tokenText(model, n, { chosen: cluster, text }),
  );
}
