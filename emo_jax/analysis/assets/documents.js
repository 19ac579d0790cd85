// ---- documents: one text under all models

function showDocuments(panel, state) {
  const listed = filtered(state);
  // A document that the filter left out gives way to the next one that is in.
  const place = Math.max(
    0,
    listed.findIndex((n) => n >= state.document),
  );
  const n = listed[place],
    last = listed.length - 1;
  const { domain, text, model, cluster } = state;
  if (!panel.children.length) panel.append(element("div.bar"), element("div"));
  const [bar, content] = panel.children;
  if (!listed.length) {
    unlessDrawn(bar, "", () => []);
    unlessDrawn(content, "", () => [
      element("p.note", {}, "No document matches. Change the search, the domain or the cluster."),
    ]);
    return;
  }
  unlessDrawn(bar, "bar", () => [
    element("button.chip", { type: "button", "data-step": -1, "aria-keyshortcuts": "ArrowLeft" }, "← Previous"),
    element("button.chip", { type: "button", "data-step": 1, "aria-keyshortcuts": "ArrowRight" }, "Next →"),
    element(
      "label",
      {},
      "Document ",
      element("input", {
        type: "number",
        min: 1,
        onchange: (event) => go({ document: nearest(Number(event.target.value)) }),
      }),
    ),
    element("span.soft.position", { "aria-live": "polite" }),
  ]);
  bar.querySelectorAll("button").forEach((button) => {
    const to = place + Number(button.dataset.step);
    button.setAttribute("aria-disabled", to < 0 || to > last);
    button.onclick = () => to >= 0 && to <= last && go({ document: listed[to] });
  });
  bar.querySelector("input").value = page.number[n];
  const label = page.domains[page.domain[n]],
    filters = domain || text || cluster >= 0;
  bar.querySelector(".position").textContent =
    `${label ? `${label} · ` : ""}${count(place + 1)} of ${count(listed.length)}${filters ? " that match" : ""}`;
  unlessDrawn(content, JSON.stringify([n, text, model, cluster]), () => [
    element(
      "div.side-by-side",
      {},
      page.models.map((each) => documentCard(each, n, { text, chosen: each.place === model ? cluster : -1 })),
    ),
  ]);
}

function stepDocument(step) {
  document.querySelector(`#documents [data-step="${step}"]`)?.click();
}

// The document with that number, or the next one that the page holds.
function nearest(number) {
  const n = page.number.findIndex((own) => own >= number);
  return n < 0 ? page.number.length - 1 : n;
}

function documentCard(model, n, { text, chosen }) {
  const amounts = new Map();
  for (const { label } of cut(model, n)) amounts.set(label, (amounts.get(label) ?? 0) + 1);
  const order = [...amounts.keys()].sort((a, b) => amounts.get(b) - amounts.get(a) || a - b);
  return card(
    model.name,
    `${plural(model.tokens[n], "token")} in ${plural(order.length, "cluster")}`,
    element(
      `div.legend${chosen < 0 ? "" : ".chosen"}`,
      {},
      order.map((cluster) =>
        element(
          "button.chip",
          {
            type: "button",
            "aria-pressed": cluster === chosen,
            title: model.words[cluster].slice(0, 6).map(visible).join("  "),
            onclick: () => toggleCluster(model.place, cluster),
          },
          badge(cluster),
          ` ${amounts.get(cluster)}`,
        ),
      ),
    ),
    tokenText(model, n, { chosen, text }),
  );
}
