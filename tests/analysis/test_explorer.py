"""The explorer page: what it holds, and how a person (here a browser) finds their way through it."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from emo_jax.analysis import explorer
from emo_jax.analysis.exploration import measure, plain
from emo_jax.analysis.explorer import Explored, write_explorer
from emo_jax.analysis.reading import Reading, Text
from emo_jax.errors import UserError
from tests.analysis.test_report import browser

HOSTILE = '<script>window.x=1</script></script><img src=x onerror="window.x=2"><!-- <script> ]]> \ud800 \x00 & "\''
WORDS = {
    "poems": ["rose", "moon", "sea", "heart", "soft", "night", "sings", "of", "a", "the"],
    "laws": ["shall", "article", "court", "§", "the", "party", "hereby", "of", "a", "Straße"],
    "code": ["def", "return", "(", ")", "=", "x", "self", "import", "👩\u200d💻", "class"],
}
EXPERTS = 7


def texts(count: int, length: int = 24) -> list[Text]:
    """Documents of three domains; the first is hostile."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        domain = sorted(WORDS)[n * len(WORDS) // count]
        made.append(Text(" ".join(rng.choice(WORDS[domain], length)), domain))
    return [Text(HOSTILE, "code"), *made[1:]]


def read(documents: list[Text], name: str, experts: int, layers: int) -> Reading:
    """Of a model whose experts follow the domains, of which a token chooses two."""
    rng = np.random.default_rng(len(name))
    cut = [re.findall(r"\s?[^\s]{1,6}|\s", document.text) for document in documents]
    pieces = [piece for part in cut for piece in part]
    document_N = np.repeat(np.arange(len(cut)), [len(part) for part in cut]).astype(np.int32)
    token_N = np.unique(pieces, return_inverse=True)[1].astype(np.int32)
    domains = sorted({document.domain for document in documents})
    domain_N = np.array([domains.index(documents[n].domain) for n in document_N])
    taste_MR = rng.gamma(0.3, size=(len(documents), experts))  # documents differ within a domain too
    favoured_NR = np.where((np.arange(experts) + domain_N[:, None]) % 3 == 0, 3.0, 0.3) + taste_MR[document_N]
    probability_LNR = [
        (gamma_NR / gamma_NR.sum(1, keepdims=True)).astype(np.float16)
        for gamma_NR in (rng.gamma(favoured_NR) for _ in range(layers))
    ]
    chosen_LNC = [np.argsort(-p, axis=1)[:, :2].astype(np.int16) for p in probability_LNR]
    return Reading(name, pieces, token_N, document_N, probability_LNR, chosen_LNC)


def explored(documents: list[Text], name: str, *, experts: int = EXPERTS, layers: int = 2) -> Explored:
    reading = read(documents, name, experts, layers)
    clusters, numbers = measure(reading, documents, clusters=3, prose={"poems", "laws"}, seed=0)
    return Explored(reading, clusters, plain(numbers))


def payload(page: Path) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    )


def unpack(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), "<" + packed["kind"])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    documents = texts(30)
    models = [explored(documents, "emo"), explored(documents, "standard", experts=5, layers=3)]
    return write_explorer(tmp_path_factory.mktemp("page") / "explore.html", documents, models, ["poems", "laws"])


def test_tokens_clusters_and_experts_survive_the_way_into_the_page(page):
    documents = texts(30)
    data, model = payload(page), explored(documents, "emo")
    shown = data["models"][0]
    assert shown["texts"][0] == HOSTILE.replace("\ud800", "\ufffd")
    assert shown["texts"][1:] == [document.text for document in documents[1:]]
    assert [data["domains"][d] for d in unpack(data["domain"])] == [document.domain for document in documents]
    np.testing.assert_array_equal(unpack(shown["labels"]), model.clusters.label_N)
    np.testing.assert_array_equal(unpack(shown["tokens"]), np.bincount(model.reading.document_N))
    assert unpack(shown["lengths"]).sum() == sum(len(text.encode("utf-16-le")) // 2 for text in shown["texts"])
    experts = unpack(shown["chosen"]["experts"]).reshape(len(model.reading.pieces), 4)
    np.testing.assert_array_equal(experts[:, 2:], model.reading.chosen_LNC[1])
    lift = unpack(shown["layers"][0]["lift"]).reshape(EXPERTS, EXPERTS)
    np.testing.assert_allclose(lift, model.numbers["layers"][0]["lift"], rtol=2e-3)
    in_domain = unpack(shown["in_domain"]).reshape(3, 3)
    np.testing.assert_array_equal(in_domain.sum(1), shown["size"])


def test_a_clusters_words_are_those_that_tell_it_from_others(page):
    shown = payload(page)["models"][0]
    of = unpack(shown["in_domain"]).reshape(3, 3).argmax(0)
    code, laws, poems = (set(shown["words"][cluster]) for cluster in of)
    assert {" def", " self"} <= code and {" court", " article"[:7]} <= laws and {" moon", " rose"} <= poems
    assert not {" the", " of"} & code


def test_a_page_that_would_be_too_large_leaves_documents_out_evenly_and_says_so(tmp_path, monkeypatch):
    documents = texts(300)
    models = [explored(documents, "emo")]
    whole = write_explorer(tmp_path / "whole.html", documents, models)
    data = payload(whole)
    assert len(unpack(data["traced"])) == len(unpack(data["number"])) == data["total"] == 300
    texts_of = len(json.dumps(data["models"][0]["texts"]))
    for less in (5_000, texts_of):
        monkeypatch.setattr(explorer, "BUDGET", whole.stat().st_size - less)
        small = write_explorer(tmp_path / "small.html", documents, models)
        assert small.stat().st_size <= explorer.BUDGET
        cut = payload(small)
        numbers = unpack(cut["number"])
        assert numbers[0] == 1 and numbers[-1] == 300 and np.ptp(np.diff(numbers)) <= 1
        assert len(unpack(cut["traced"])) < 300
        assert cut["models"][0]["size"] == data["models"][0]["size"]
    assert len(numbers) < 300


def test_the_demos_page_is_below_ten_megabytes(tmp_path):
    documents, clusters = texts(600, length=100), 32
    models = []
    for name in ("emo", "standard"):
        _, own, numbers = explored(documents[::20], name, experts=31, layers=3)  # numbers do not grow with the text
        reading = read(documents, name, 31, 3)
        label_N = np.arange(len(reading.pieces)) % clusters
        own = own._replace(label_N=label_N, size_K=np.bincount(label_N))
        models.append(Explored(reading, own, numbers))
    page = write_explorer(tmp_path / "explore.html", documents, models)
    assert page.stat().st_size < 10e6
    assert len(unpack(payload(page)["traced"])) == 600, "nothing is left out"


def test_the_headline_shows_the_numbers_of_the_analysis(page):
    text, documents = page.read_text(), texts(30)
    for name, experts, layers in (("emo", EXPERTS, 2), ("standard", 5, 3)):
        numbers = explored(documents, name, experts=experts, layers=layers).numbers
        for part in (numbers, numbers["prose"]):
            assert f"<b>{100 * part['mutual']['domain_given_token']:.1f} %</b>" in text
            assert f"<b>{part['clusters']['nmi']:.2f}</b>" in text
            assert f"({part['document_clusters']['permuted']['purity'][0]:.2f})" in text
    assert "laws, poems" in text


def test_models_need_different_names(tmp_path):
    documents = texts(3)
    with pytest.raises(UserError, match="emo, emo"):
        write_explorer(tmp_path / "page.html", documents, [explored(documents, "emo")] * 2)
    with pytest.raises(UserError, match="no model"):
        write_explorer(tmp_path / "page.html", documents, [])


def test_the_library_is_the_locked_one_and_an_installation_has_every_asset():
    assets = Path(explorer.__file__).with_name("assets")
    locked = json.loads((assets / "vendor" / "package-lock.json").read_text())["packages"]["node_modules/echarts"]
    library = (assets / "vendor" / "echarts.min.js").read_text()
    assert f"Version {locked['version']}," in library and locked["integrity"].startswith("sha512-")
    assert "</script" not in library and "<!--" not in library
    root = Path(explorer.__file__).parents[2]
    patterns = re.search(r'"emo_jax.analysis": \[(.*?)\]', (root / "setup.py").read_text())[1]
    installed = {path for pattern in re.findall('"(.*?)"', patterns) for path in assets.parent.glob(pattern)}
    assert {path for path in assets.rglob("*") if path.is_file()} <= installed


@pytest.fixture
def tab(page):
    """A browser's tab with the page; it must stay without errors and without the network."""
    with browser() as chromium:
        tab = chromium.new_page(viewport={"width": 1280, "height": 860})
        seen: list[str] = []
        tab.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else 0)
        tab.on("pageerror", lambda error: seen.append(str(error)))
        tab.on("request", lambda request: None if request.url.startswith("file:") else seen.append(request.url))
        tab.goto(page.as_uri())
        tab.go = lambda hash: (tab.goto("about:blank"), tab.goto(page.as_uri() + hash))
        yield tab
        assert seen == []
        assert tab.evaluate("window.x") is None, "a document's script ran"


def ink(tab, chart: str) -> float:
    """How much a chart's pixels differ from one another."""
    return tab.locator(chart).first.evaluate(
        """async box => { while (!box.querySelector("canvas")) await new Promise(requestAnimationFrame);
        await new Promise(done => setTimeout(done, 100)); const canvas = box.querySelector("canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(Array.from({length: data.length / 4}, (_, n) => data[4 * n] + 256 * data[4 * n + 1])).size; }"""
    )


def test_a_cluster_shows_its_documents_and_filters_narrow_them(tab):
    lists = tab.locator("#clusters .lists > section")
    assert lists.count() == 2 and lists.nth(0).locator(".cluster").count() == 3
    assert ink(tab, "#clusters .chart") > 5, "which domains clusters hold"
    row = lists.nth(0).locator(".cluster").filter(has=tab.locator(".largest", has_text=re.compile("^laws")))
    row.click()
    assert row.get_attribute("aria-pressed") == "true"
    samples = tab.locator(".sample")
    assert samples.count() == 5 and "laws" in samples.first.inner_text()
    coloured = samples.first.locator(".token.shown")
    assert coloured.count() > 15 and coloured.first.evaluate("t => getComputedStyle(t).backgroundColor").startswith(
        "oklch"
    )
    tab.get_by_role("button", name="More").click()
    assert samples.count() == 10

    tab.get_by_role("combobox", name="Domain").select_option("poems")
    assert all("poems" in text for text in samples.all_inner_texts())
    assert "tokens of poems" in lists.nth(1).inner_text()
    tab.get_by_role("button", name="Clear").click()
    tab.keyboard.press("Escape")
    tab.get_by_role("searchbox").fill("MOON")
    tab.get_by_text("tokens found").first.wait_for()
    lists.nth(0).locator(".cluster").first.click()
    assert samples.first.locator(".token.match").first.inner_text().strip() == "moon"
    tab.get_by_role("searchbox").fill("no such text (")
    tab.get_by_text("No token here").first.wait_for()


def test_documents_are_compared_and_walked_through_by_keys(tab):
    tab.get_by_role("tab", name="Documents").click()
    cards = tab.locator(".side-by-side > section")
    assert cards.count() == 2
    joined = "e => [...e.querySelectorAll('.token')].map(t => t.textContent).join('')"
    hostile = HOSTILE.replace("\ud800", "\ufffd")
    assert cards.nth(0).evaluate(joined) == cards.nth(1).evaluate(joined) == hostile
    assert tab.locator("main img").count() == 0

    number = tab.locator("#documents input")
    tab.keyboard.press("ArrowRight")
    assert number.input_value() == "2"
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert number.input_value() == "1"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.name") == "text"
    tab.get_by_role("combobox", name="Domain").select_option("laws")
    assert "1 of 10 that match" in tab.locator(".position").inner_text() and number.input_value() == "11"
    number.fill("15")
    number.press("Enter")
    assert "5 of 10 that match" in tab.locator(".position").inner_text()

    cards.nth(1).locator("button.chip").first.click()
    chip = cards.nth(1).locator("button.chip[aria-pressed=true]")
    label = chip.locator(".badge").inner_text()
    hues = cards.nth(1).locator(".token.shown sup").evaluate_all("all => [...new Set(all.map(s => s.dataset.cluster))]")
    assert hues == [label]
    assert cards.nth(0).locator(".token:not(.shown)").count() == 0, "the other model's"


def test_a_token_tells_its_cluster_and_its_experts_to_mouse_keyboard_and_touch(tab, page):
    tab.go("#tab=documents&document=12")
    data = payload(page)
    model = data["models"][1]
    first = unpack(model["tokens"])[:11].sum()
    experts = unpack(model["chosen"]["experts"]).reshape(-1, 3, 2)[first + 2]
    tokens = tab.locator(".side-by-side > section").nth(1).locator(".token")
    tip = tab.get_by_role("tooltip")
    tokens.nth(2).hover()
    for layer, chosen in enumerate(experts):
        assert f"layer {layer}\texperts {chosen[0]}, {chosen[1]}" in tip.inner_text()
    assert str(unpack(model["labels"])[first + 2]) == tip.locator(".badge").inner_text()
    tab.mouse.move(5, 5)
    assert not tip.is_visible()
    tokens.nth(0).focus()
    assert "token 1" in tip.inner_text()
    tab.keyboard.press("ArrowRight")
    assert "token 2" in tip.inner_text() and tab.locator("#documents input").input_value() == "12"
    tab.keyboard.press("Escape")
    assert not tip.is_visible()


def test_heatmaps_and_graphs_are_drawn_and_lead_to_an_expert(tab):
    tab.get_by_role("tab", name="Domains").click()
    assert tab.locator("#domains .chart").count() == 4
    assert ink(tab, "#domains .chart >> nth=0") > 10 and ink(tab, "#domains .chart >> nth=3") > 3
    tab.get_by_role("combobox", name="Layer").select_option("2")
    assert tab.locator("#domains .chart").count() == 2, "one model has two layers only"
    tab.get_by_role("combobox", name="Show").select_option("use")
    assert "measure=use" in tab.url and ink(tab, "#domains .chart") > 10

    tab.get_by_role("tab", name="Experts").click()
    assert ink(tab, "#experts .chart") > 10
    tab.locator("#experts button.expert").first.click()
    detail = tab.locator("#experts .detail")
    assert "of standard" in detail.inner_text() and "poems" in detail.inner_text()
    box = tab.locator("#experts .chart").first.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.3)
    tab.get_by_role("combobox", name="Show").select_option("graph")
    assert ink(tab, "#experts .chart") > 10


def test_views_have_addresses_and_back_works(tab):
    tab.go("#tab=documents&document=25&domain=poems&model=standard&cluster=2")
    assert tab.locator("#documents input").input_value() == "25"
    assert tab.get_by_role("combobox", name="Domain").input_value() == "poems"
    assert tab.locator(".side-by-side > section").nth(1).locator("[aria-pressed=true] .badge").inner_text() == "2"
    selected = tab.locator("[role=tab][aria-selected=true]")
    selected.focus()
    tab.keyboard.press("ArrowRight")
    assert selected.inner_text() == "Domains" and tab.evaluate("document.activeElement.id") == "tab-domains"
    tab.keyboard.press("Home")
    assert selected.inner_text() == "Clusters"
    tab.go_back()
    tab.go_back()
    assert selected.inner_text() == "Documents" and tab.locator("#documents input").input_value() == "25"
    tab.go("#tab=nonsense&document=xyz&model=none&cluster=99&layer=-3&shape=blob&expert=1.5")
    assert selected.inner_text() == "Clusters" and tab.locator(".cluster").count() == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(tab, scheme):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.emulate_media(color_scheme=scheme)
    views = ["", "cluster=1", "tab=documents", "tab=domains", "tab=experts&expert=2", "tab=experts&shape=graph"]
    for view in views:
        tab.go(f"#{view}")
        tab.wait_for_timeout(100)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390, view
    tab.go("#tab=documents&document=3")
    tab.locator(".token").nth(30).click()
    box = tab.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_one_model_and_documents_without_labels_make_a_page_too(tmp_path, page, tab):
    documents = [Text(document.text, "") for document in texts(9)]
    reading = read(documents, "emo", EXPERTS, 1)
    clusters, numbers = measure(reading, documents, clusters=3, prose=[], seed=0)
    alone = write_explorer(tmp_path / "alone.html", documents, [Explored(reading, clusters, plain(numbers))])
    assert "nothing says how well" in alone.read_text()
    for view in ("cluster=0", "tab=documents", "tab=domains", "tab=experts&expert=0"):
        tab.goto("about:blank")
        tab.goto(f"{alone.as_uri()}#{view}")
        tab.wait_for_timeout(50)
    assert "no label" in tab.locator("#experts .detail").inner_text()
