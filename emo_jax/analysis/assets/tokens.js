// ---- tokens: a document's text, coloured by cluster, and what is known of a token under the pointer

// `chosen`: the only cluster to show in colour, −1: all. A number stands where a run of one cluster's tokens begins.
function tokenText(model, n, { chosen = -1, text = "" } = {}) {
  const ranges = matches(model.texts[n], text);
  let before = -1;
  const spans = cut(model, n).map((token, place) => {
    const shown = chosen < 0 || token.label === chosen;
    const span = element(
      `span.token${shown ? ".shown" : ""}${touches(token, ranges) ? ".match" : ""}`,
      {
        tabindex: -1,
        "--hue": hue(token.label),
        "data-place": place,
      },
      shown && token.label !== before ? numbered(token) : token.text,
    );
    before = token.label;
    span.known = { model, n, place, token };
    return span;
  });
  spans[0]?.setAttribute("tabindex", 0);
  return element(
    "div.text",
    { role: "group", "aria-label": `Document ${page.number[n]} by tokens, ${model.name}` },
    spans,
  );
}

// The number stands before the word, not before the space that a token begins with: lines break there.
function numbered({ text, label }) {
  const space = text.trim() ? text.match(/^ */)[0].length : 0;
  return [text.slice(0, space), element("sup", { "data-cluster": label }), text.slice(space)];
}

const tip = document.getElementById("tip");
let tipped;

function showTip(span) {
  if (tipped === span) return;
  hideTip();
  tipped = span;
  const { model, n, place, token } = span.known;
  const layers = chosenExperts(model, n, place);
  tip.replaceChildren(
    element("div", {}, element("code", {}, visible(token.text) || "(a part of a character)"), ` · token ${place + 1}`),
    element("div", {}, badge(token.label), " cluster with ", wordList(model.words[token.label].slice(0, 4))),
    layers
      ? element(
          "table",
          {},
          layers.map((experts, layer) =>
            element(
              "tr",
              {},
              element("th", { scope: "row" }, `layer ${layer}`),
              element("td", {}, `experts ${experts.join(", ")}`),
            ),
          ),
        )
      : element("div.soft", {}, "Which experts this document's tokens chose is not kept in this page."),
  );
  tip.hidden = false;
  span.classList.add("under");
  span.setAttribute("aria-describedby", "tip");
  placeTip();
  // The same place in the other models' version of this text.
  for (const other of document.querySelectorAll(".side-by-side .token"))
    if (other.known.model !== model && other.known.token.start < token.end && token.start < other.known.token.end)
      other.classList.add("under");
}

// Below the token, or above it where there is no room; gone where the token has left the window.
function placeTip() {
  const at = tipped?.getClientRects()[0],
    own = tip.getBoundingClientRect();
  if (!at || at.bottom < 0 || at.top > innerHeight) return hideTip();
  const top = at.bottom + 8 + own.height < innerHeight ? at.bottom + 8 : Math.max(8, at.top - own.height - 8);
  tip.style.setProperty("--left", `${Math.max(8, Math.min(at.left, document.body.clientWidth - own.width - 8))}px`);
  tip.style.setProperty("--top", `${top}px`);
}

function hideTip() {
  tip.hidden = true;
  tipped?.removeAttribute("aria-describedby");
  tipped = undefined;
  document.querySelectorAll(".token.under").forEach((span) => span.classList.remove("under"));
}

for (const kind of ["pointerover", "focusin", "click"])
  document.addEventListener(kind, (event) => {
    const span = event.target.closest?.(".token");
    if (span) showTip(span);
    else if (!event.target.closest?.("#tip")) hideTip();
  });
addEventListener("scroll", placeTip, { passive: true, capture: true });

// One stop of the Tab key for a text; arrow keys walk through its tokens.
function walkTokens(event) {
  const span = event.target.closest(".token"),
    steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };
  const next = steps[event.key] === -1 ? span?.previousElementSibling : steps[event.key] && span?.nextElementSibling;
  if (next) {
    span.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }
  if (steps[event.key] && span) event.preventDefault();
  return Boolean(span && steps[event.key]);
}
