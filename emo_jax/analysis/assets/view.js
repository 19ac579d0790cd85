// ---- view: elements, numbers and colours that all views share. Text enters the page as text only.

function element(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const result = document.createElement(tag);
  if (classes.length) result.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) result.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) result.style.setProperty(name, value);
    else if (value !== undefined) result.setAttribute(name, value);
  }
  result.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== ""));
  return result;
}

const count = (number) => number.toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const domainName = (domain) => domain || "no label";

// Hues a golden angle apart: neighbours in number, which share a legend, are far apart in colour.
const hue = (cluster) => (250 + 137.508 * cluster) % 360;
function domainColour(domain) {
  const place = page.domains.indexOf(domain);
  return page.colours[place] ?? `hsl(${hue(place)} 45% 52%)`;
}

// A token's text with its white space made visible.
const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const wordList = (words) =>
  element(
    "span.words",
    {},
    words.map((word) => element("code", {}, shorten(visible(word), 16))),
  );
const badge = (cluster) => element("b.badge", { "--hue": hue(cluster) }, String(cluster));

// Shares of domains as a bar, and its largest in words. `amounts` follow `domains`.
function domainBar(domains, amounts) {
  const sum = amounts.reduce((total, amount) => total + amount, 0) || 1;
  const order = domains
    .map((_, n) => n)
    .filter((n) => amounts[n] > 0)
    .sort((a, b) => amounts[b] - amounts[a]);
  const words = order.map((n) => `${domainName(domains[n])} ${percent(amounts[n] / sum)}`);
  const bar = element(
    "span.stack",
    { title: words.join(", ") },
    order.map((n) => element("i", { "--share": `${(100 * amounts[n]) / sum}%`, "--colour": domainColour(domains[n]) })),
  );
  return [bar, element("span.soft.largest", {}, words.slice(0, 2).join(", "))];
}

function domainLegend() {
  const dot = (domain) =>
    element("span.dot", {}, element("i", { "--colour": domainColour(domain) }), domainName(domain));
  return element("div.legend", {}, page.domains.length > 1 ? page.domains.map(dot) : []);
}

function select(label, options, chosen, onchange) {
  const list = element(
    "select",
    { onchange: () => onchange(list.value) },
    options.map(([value, text]) => element("option", { value }, text)),
  );
  list.value = chosen;
  return element("label", {}, `${label} `, list);
}

function card(title, detail, ...children) {
  return element("section.card", {}, element("h3", {}, `${title} `, element("small", {}, detail)), children);
}

// Only where it changes does a view redraw: focus, scroll position and open charts stay otherwise.
const drawn = new WeakMap();
function unlessDrawn(box, key, draw) {
  if (drawn.get(box) === key) return;
  drawn.set(box, key);
  box.querySelectorAll(".chart").forEach((chart) => chart.dispose());
  box.replaceChildren(...draw());
}
