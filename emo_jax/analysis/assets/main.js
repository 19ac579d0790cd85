// ---- main: the state, which the address holds, tabs, filters and keys

const views = { clusters: showClusters, documents: showDocuments, domains: showDomains, experts: showExperts };
const tabs = Object.keys(views);
const initial = {
  tab: "clusters",
  domain: "",
  text: "",
  model: 0,
  cluster: -1,
  document: 0,
  layer: 0,
  expert: -1,
  measure: "probability",
  shape: "matrix",
};
let state = { ...initial };

// Addresses name documents and models as people do.
const spoken = {
  model: [(place) => page.models[place].name, (name) => page.models.findIndex((model) => model.name === name)],
  document: [(n) => page.number[n], (number) => nearest(Number(number))],
};

function toHash(state) {
  const changed = Object.entries(state).filter(([name, value]) => value !== initial[name]);
  return `#${new URLSearchParams(changed.map(([name, value]) => [name, spoken[name]?.[0](value) ?? value]))}`;
}

function fromHash(hash) {
  const result = { ...initial };
  for (const [name, text] of new URLSearchParams(hash.slice(1))) {
    if (!(name in initial)) continue;
    result[name] = spoken[name] ? spoken[name][1](text) : typeof initial[name] === "number" ? Number(text) : text;
  }
  const allowed = {
    tab: tabs.includes(result.tab),
    domain: page.domains.includes(result.domain),
    model: result.model >= 0,
    cluster: result.cluster in (page.models[result.model]?.size ?? {}),
    layer: page.models.some((model) => result.layer in model.layers),
    expert: Number.isInteger(result.expert),
    measure: result.measure in measures,
    shape: ["matrix", "graph"].includes(result.shape),
  };
  for (const [name, fine] of Object.entries(allowed)) if (!fine) result[name] = initial[name];
  return result;
}

function go(changes, { replace = false } = {}) {
  const next = { ...state, ...changes };
  if (toHash(next) !== toHash(state)) history[replace ? "replaceState" : "pushState"](null, "", toHash(next));
  state = next;
  show();
}

function toggleCluster(model, cluster, { detail = false } = {}) {
  const again = state.model === model && state.cluster === cluster;
  go(again ? { cluster: -1 } : { model, cluster });
  // On a narrow screen what was chosen appears below the lists.
  const box = document.querySelector("#clusters .detail");
  if (detail && !again && box.getBoundingClientRect().top > innerHeight * 0.7) box.scrollIntoView({ block: "start" });
}

function show() {
  hideTip();
  for (const tab of tabs) {
    const active = tab === state.tab,
      button = document.getElementById(`tab-${tab}`);
    button.setAttribute("aria-selected", active);
    button.tabIndex = active ? 0 : -1;
    document.getElementById(tab).hidden = !active;
  }
  filter.hidden = !["clusters", "documents"].includes(state.tab);
  filter.text.value = state.text;
  filter.domain.value = state.domain;
  filter.cluster.value = state.cluster < 0 ? "" : `${state.model} ${state.cluster}`;
  filter.querySelector("[type=reset]").hidden = !(state.text || state.domain || state.cluster >= 0);
  views[state.tab](document.getElementById(state.tab), state);
}

function sampled() {
  const [held, traced] = [page.number.length, page.traced.length].map(count);
  const of = `of ${plural(page.total, "document")}`;
  const texts =
    held === count(page.total) ? "" : `The page holds the texts of ${held} ${of}, chosen evenly; numbers are of all. `;
  return texts + (traced === held ? "" : `It knows which experts the tokens of ${traced} documents chose.`);
}

document.getElementById("sampled").textContent = sampled();
const filter = document.getElementById("filter");
filter.domain.append(
  element("option", { value: "" }, "all"),
  ...page.domains.map((domain) => element("option", { value: domain }, domainName(domain))),
);
filter.domain.closest("label").hidden = page.domains.length < 2;
filter.cluster.append(
  element("option", { value: "" }, "any"),
  ...page.models.map((model) =>
    element(
      "optgroup",
      { label: model.name },
      model.size.map((_, k) =>
        element(
          "option",
          { value: `${model.place} ${k}` },
          `${k}  ${model.words[k].slice(0, 4).map(visible).join(" ")}`,
        ),
      ),
    ),
  ),
);
filter.domain.addEventListener("change", () => go({ domain: filter.domain.value }));
filter.cluster.addEventListener("change", () => {
  const [model, cluster] = filter.cluster.value ? filter.cluster.value.split(" ").map(Number) : [state.model, -1];
  go({ model, cluster });
});
let typing;
filter.text.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => go({ text: filter.text.value }, { replace: true }), 150);
});
filter.addEventListener("submit", (event) => event.preventDefault());
filter.addEventListener("reset", (event) => {
  event.preventDefault();
  go({ text: "", domain: "", cluster: -1 });
  filter.text.focus();
});

for (const tab of tabs) {
  const button = document.getElementById(`tab-${tab}`);
  button.addEventListener("click", (event) => {
    if (event.detail) button.blur(); // by a pointer: arrow keys are the view's then, not the tabs'
    go({ tab });
  });
  button.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const to = step
      ? tabs.at((tabs.indexOf(tab) + step) % tabs.length)
      : { Home: tabs[0], End: tabs.at(-1) }[event.key];
    if (!to) return;
    event.preventDefault();
    go({ tab: to });
    document.getElementById(`tab-${to}`).focus();
  });
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || walkTokens(event)) return;
  if (event.target.matches("input, select, textarea")) return;
  if (event.key === "/" && !filter.hidden) {
    event.preventDefault();
    filter.text.focus();
  } else if (event.target.matches(".cluster") && ["ArrowUp", "ArrowDown"].includes(event.key)) {
    event.preventDefault();
    const { previousElementSibling: up, nextElementSibling: down } = event.target;
    (event.key === "ArrowUp" ? up : down)?.focus();
  } else if (state.tab === "documents" && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
    stepDocument(event.key === "ArrowLeft" ? -1 : 1);
  }
});

addEventListener("popstate", () => {
  state = fromHash(location.hash);
  show();
});
state = fromHash(location.hash);
show();
// A link to a view leads to the view, not to the headline above it.
if (location.hash.length > 1) document.querySelector(".tabs").scrollIntoView();
