"""The report of a run: what the page holds, that it opens offline, and how a browser lays it out."""

import contextlib
import json
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from emo_jax.analysis import write_report
from emo_jax.analysis.run import Series, human, smooth, thin
from emo_jax.config import Config
from emo_jax.errors import UserError

DOMAINS = {"python": 2.4, "html": 2.1, "man pages": 3.0, "licences": 1.4, "c headers": 2.7, "changelogs": 3.4}
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x>'


def config(kind: str = "document", experts: int = 32, layers: int = 3, steps: int = 600) -> Config:
    result = Config()
    model = result.model
    model.vocab_size, model.d_model, model.num_layers, model.num_heads = 8192, 128, layers, 4
    model.num_experts, model.num_shared_experts, model.top_k, model.d_expert = experts, 1, 5, 64
    model.d_dense = 256
    result.pool.kind, result.pool.min, result.pool.max = kind, 4, 31
    result.train.steps, result.train.eval_every = steps, steps // 6
    result.optimizer.warmup_steps = steps // 10
    result.validate()
    return result


def simulate(config: Config, *, every: int = 1, steps: int = 0, domains: dict[str, float] = DOMAINS) -> list[dict]:
    """Log lines of a plausible run."""
    rng = np.random.default_rng(0)
    total, routed = config.train.steps, config.model.routed_experts
    pooled = config.pool.kind != "none"
    lines = []
    for step in sorted({1, *range(every, (steps or total) + 1, every)}):
        t = step / total
        level = 2.6 + 6.4 * np.exp(-18 * t) + 0.9 * np.exp(-3 * t)
        loss = level - 0.15 * pooled * t + rng.normal(0, 0.06)
        line = {
            "step": step,
            "loss": loss + 0.1,
            "cross_entropy": loss,
            "logits_z": 48.0,
            "grad_norm": 0.25 + 2 * np.exp(-30 * t) + abs(rng.normal(0, 0.03)) + (rng.random() < 0.004),
            "learning_rate": 4e-3
            * min(step / max(1, config.optimizer.warmup_steps), 1)
            * (0.55 + 0.45 * np.cos(np.pi * t)),
            "loss_tokens": 8000,
            "timing": {
                "tokens_per_second": 18_000 * (1 + rng.normal(0, 0.03)),
                "seconds": 0.4,
                "data_wait": abs(rng.normal(0.01, 0.004)),
                "mfu": 0.21 + rng.normal(0, 0.004),
            },
        }
        evaluation = step == total or step % config.train.eval_every == 0
        if routed:
            layer = np.arange(len(routed))
            uniform = np.log(routed)
            drawn = rng.integers(config.pool.min, config.pool.max + 1, (len(routed), 12)) if pooled else None
            sizes = drawn if pooled else np.array(routed)[:, None]
            noise = rng.normal(0, 0.01, (8, len(routed)))
            routing = {
                "balance": 1.02 + 0.5 * np.exp(-12 * t) * (1 + 0.3 * layer) + noise[0],
                "router_z": 12 + 3 * np.exp(-5 * t) + layer + 10 * noise[1],
                "load_max_over_mean": 1.4 + 2.2 * np.exp(-8 * t) + 0.15 * layer + 10 * abs(noise[2]),
                "dead_experts": np.floor(5 * np.exp(-20 * t) * (1 + layer)),
                "token_entropy": uniform * (0.45 + 0.5 * np.exp(-6 * t) + 0.04 * layer + noise[3]),
                "document_entropy": uniform * (0.66 + 0.33 * np.exp(-5 * t) - 0.03 * layer + noise[4]),
                "pool_mass": np.minimum(
                    1, 0.88 - 0.35 * np.exp(-5 * t) + 0.02 * layer + noise[5] if pooled else 1.0 + 0 * layer
                ),
                "experts_per_document": sizes.mean(1) * 0.92,
                "pool_size_mean": sizes.mean(1),
                "pool_size_min": sizes.min(1),
                "pool_size_max": sizes.max(1),
            }
            line["routing"] = {name: np.asarray(value, float).tolist() for name, value in routing.items()}
            if evaluation:
                loads = [rng.lognormal(0, 0.3, count) for count in routed]
                line["routing"]["expert_load"] = [(load / load.mean()).tolist() for load in loads]
        if evaluation:
            by_domain = {
                name: {"loss": floor + level - 2.6 + rng.normal(0, 0.01), "tokens": 2345 + 997 * number}
                for number, (name, floor) in enumerate(domains.items())
            }
            tokens = sum(domain["tokens"] for domain in by_domain.values())
            mean = sum(domain["loss"] * domain["tokens"] for domain in by_domain.values()) / tokens
            line["heldout"] = {"loss": mean, "tokens": tokens, "domains": by_domain}
            if routed:
                use = [rng.gamma(1 + 3 * t, 1 / (1 + 3 * t), (len(domains), count)) for count in routed]
                line["heldout"]["structure"] = {
                    "names": list(domains),
                    "information": (0.3 * t * (1 + 0.2 * layer)).tolist(),
                    "chance": (0.02 + 0 * layer).tolist(),
                    "similarity": (0.95 - 0.5 * t - 0.02 * layer).tolist(),
                    "use": [part.round(3).tolist() for part in use],
                }
        lines.append(line)
    return lines


def run_directory(path: Path, config: Config, lines: list[dict]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config.to_json())
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def own_html(page: Path) -> str:
    """The page without plotly.js, whose source mentions addresses that it never visits here."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"<script>.{1000000,}?</script>", "", text, count=1, flags=re.DOTALL)


def figures(text: str) -> list[str]:
    return re.findall(r'<div id="([\w-]+)" class="plotly-graph-div"', text)


def test_an_emo_runs_page_shows_its_numbers(tmp_path):
    run = config()
    lines = simulate(run)
    page = write_report(run_directory(tmp_path / "first try", run, lines))
    assert page == tmp_path / "first try" / "report.html"
    text = own_html(page)
    assert "EMO" in text and "first try" in text and "step 600 of 600 (100%), finished" in text
    last = lines[-1]["heldout"]
    assert f"{last['loss']:.3f}" in text and "final held-out loss" in text
    for name, domain in last["domains"].items():
        assert name in text and f"{domain['loss']:.3f}" in text and f"{domain['tokens']:,}" in text
    assert "not a likelihood" in text and "uses no pool" in text
    assert "MFU 21" in text
    assert len(figures(text)) == len(set(figures(text))) == 22
    assert page.stat().st_size < 7e6
    assert stat.S_IMODE(page.stat().st_mode) == 0o644
    assert [path.name for path in page.parent.glob(".*")] == [], "a temporary file stayed"


def test_parameters_are_counted_and_domains_sorted_by_loss(tmp_path):
    run = config()
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run))))
    # embedding and head, per layer: attention, 32 experts and a router of 31, two norms; the last norm
    total = 2 * 8192 * 128 + 3 * (4 * 128**2 + 32 * 3 * 128 * 64 + 31 * 128 + 2 * 128) + 128
    active = total - 3 * (31 - 4) * 3 * 128 * 64
    assert f"{human(total)} parameters, {human(active)} active" in text
    table = text[text.index("<tbody>") : text.index("</tbody>")]
    shown = re.findall(r"</i> ([\w ]+)</td>", table)
    assert shown == sorted(DOMAINS, key=lambda name: -DOMAINS[name])


def test_nothing_is_fetched_from_anywhere(tmp_path):
    run = config()
    page = write_report(run_directory(tmp_path, run, simulate(run, every=50)))
    text = own_html(page)
    assert not re.search(r"""(src|href|action|poster)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"<(link|iframe|object|embed|base)\b|@import|url\(", text)
    assert "default-src 'none'" in text
    full = page.read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]*\ssrc=", full) and full.count("plotly.js v") == 1


def test_hostile_names_are_shown_not_run(tmp_path):
    run = config()
    run.data.path = "</td><script>alert(2)</script>"
    lines = simulate(run, every=50, domains={HOSTILE: 3.0, "<b onclick=alert(3)>": 2.0, "%{x}": 1.0, "": 2.5})
    directory = run_directory(tmp_path / "<i>run", run, lines)
    text = own_html(write_report(directory))
    assert "<script>alert" not in text and "<img" not in text and "<b onclick" not in text and "<i>run" not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in text
    assert "&lt;/td&gt;&lt;script&gt;alert(2)" in text


def test_a_dense_models_page_has_no_experts(tmp_path):
    run = config(kind="none", experts=0)
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run, every=10))))
    assert "<h1>Dense model" in text and "active" not in text[: text.index("</header>")]
    assert "Gradient norm" in text and "Throughput" in text
    assert not re.search(r"Expert load|Document pools|Router health|not a likelihood", text)


def test_a_standard_moes_training_loss_carries_no_warning_about_pools(tmp_path):
    run = config(kind="none")
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run, every=10))))
    assert "<h1>Standard MoE" in text and "trains without pools" in text
    assert "not a likelihood" not in text and "pool_mass" not in figures(text)
    assert "expert_load" in figures(text)


def test_a_run_that_has_logged_one_line(tmp_path):
    run = config()
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run, steps=1))))
    assert "step 1 of 600 (0%), in progress" in text
    assert "No evaluation is logged yet" in text and "first at step 100" in text


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1, "lo', None])
def test_a_run_that_has_logged_nothing_says_so(tmp_path, content):
    directory = run_directory(tmp_path, config(), [])
    if content is None:
        (directory / "metrics.jsonl").unlink()
    else:
        (directory / "metrics.jsonl").write_text(content)
    text = own_html(write_report(directory))
    assert "Nothing is logged yet" in text and "Configuration" in text and not figures(text)


def test_a_last_line_cut_off_is_ignored_and_a_broken_one_before_is_counted(tmp_path):
    run = config()
    directory = run_directory(tmp_path, run, simulate(run, steps=50))
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 51, "cross_entropy": 3.')
    text = own_html(write_report(directory))
    assert "step 50 of 600" in text and "unreadable" not in text
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('\n7\n{"step": 52, "cross_entropy": 3.1}\n')
    text = own_html(write_report(directory))
    assert "step 52 of 600" in text and "Left out: 2 unreadable line(s)" in text


def test_a_loss_that_is_not_a_number_is_named(tmp_path):
    run = config()
    lines = simulate(run, steps=120)
    for line in lines[70:]:
        line |= {"loss": float("nan"), "cross_entropy": None, "grad_norm": float("inf")}
    lines[-21]["heldout"]["loss"] = float("nan")
    lines[-21]["heldout"]["domains"]["python"]["loss"] = float("nan")
    text = own_html(write_report(run_directory(tmp_path, run, lines)))
    assert "not a finite number at step 71" in text


def test_a_long_deep_run_stays_light(tmp_path):
    run = config(layers=48, steps=30_000)
    run.train.eval_every = 250
    lines = simulate(run, every=5, domains={f"domain {n}": 2 + n / 50 for n in range(40)})
    page = write_report(run_directory(tmp_path, run, lines))
    assert page.stat().st_size < 7e6
    assert "28 domains with the fewest tokens" in own_html(page)


def test_an_annealed_run_marks_where_pools_start(tmp_path):
    run = config()
    run.pool.start_step = 300
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run, every=20))))
    assert "From step 300 on, the training loss is not a likelihood" in text and "pools on" in text


def test_a_mixture_with_dense_layers_names_the_layers_that_have_experts(tmp_path):
    run = config()
    run.model.experts_per_layer = (0, 16, 32)
    run.pool.max = 16
    run.validate()
    text = own_html(write_report(run_directory(tmp_path, run, simulate(run, every=20))))
    assert "16 to 32 experts" in text
    assert 'data-key="layer 1"' in text and 'data-key="layer 0"' not in text


def test_what_is_not_a_run_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        write_report(tmp_path)


def test_a_failing_write_keeps_the_earlier_page(tmp_path, monkeypatch):
    run = config()
    page = write_report(run_directory(tmp_path, run, simulate(run, every=50)))
    before = page.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


def test_thinning_keeps_spikes_ends_and_order():
    values = np.sin(np.arange(10_000) / 500)
    values[[1234, 8000]] = 50, -50
    values[3000:3200] = np.nan
    steps, kept = thin(Series(np.arange(10_000), values), 500)
    assert len(steps) <= 504 and (np.diff(steps) > 0).all()
    assert {0, 1234, 8000, 9999} <= set(steps.tolist()) and np.isnan(kept).any()
    np.testing.assert_array_equal(kept, values[steps])


def test_smoothing_leaves_a_constant_alone_and_skips_gaps():
    values = np.full(50, 3.0)
    values[10] = np.nan
    np.testing.assert_allclose(np.delete(smooth(values, 7), 10), 3.0)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (3.14159, "3.14"),
        (950, "950"),
        (9999, "9,999"),
        (18_234, "18.2k"),
        (999_999, "1M"),
        (1.451e9, "1.45B"),
    ],
)
def test_numbers_are_short(number, text):
    assert human(number) == text


@contextlib.contextmanager
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    switches += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=switches)
        try:
            yield chromium
        finally:
            chromium.close()


def test_a_browser_draws_every_figure_offline_and_fits_a_phone(tmp_path):
    emo, dense = config(), config(kind="none", experts=0)
    long_names = {**DOMAINS, HOSTILE: 2.2, "a-domain-whose-name-never-ends-" * 4: 2.6}
    pages = [
        write_report(run_directory(tmp_path / "emo", emo, simulate(emo, domains=long_names))),
        write_report(run_directory(tmp_path / "one", emo, simulate(emo, steps=1))),
        write_report(run_directory(tmp_path / "none", emo, [])),
        write_report(run_directory(tmp_path / "dense", dense, simulate(dense, every=5))),
    ]
    open_in_a_browser(pages)


def open_in_a_browser(pages):
    """Every figure is drawn, on a desk and on a phone, without an error and without the network."""
    with browser() as chromium:
        for page in pages:
            tab = chromium.new_page(viewport={"width": 1280, "height": 900})
            problems, requests = [], []
            tab.on(
                "console", lambda message, seen=problems: seen.append(message.text) if message.type == "error" else 0
            )
            tab.on("pageerror", lambda error, seen=problems: seen.append(str(error)))
            tab.on("dialog", lambda dialog, seen=problems: (seen.append(dialog.message), dialog.dismiss()))
            tab.on("request", lambda request, seen=requests: seen.append(request.url))
            tab.on("requestfailed", lambda request, seen=problems: seen.append(request.url))
            tab.goto(page.as_uri())
            expected = len(figures(own_html(page)))
            tab.wait_for_function("n => document.querySelectorAll('.js-plotly-plot').length === n", arg=expected)
            fits = "f => f.querySelector('.main-svg').getBoundingClientRect().width <= f.parentElement.clientWidth + 1"
            for width in (1280, 390):
                if width != 1280:
                    tab.set_viewport_size({"width": width, "height": 844})
                # Polled: Plotly redraws a while after a resize. A figure drawn too wide at first stays so.
                tab.wait_for_function(f"() => [...document.querySelectorAll('.plotly-graph-div')].every({fits})")
                drawn = "[...document.querySelectorAll('.plotly-graph-div')].map(f => f.querySelectorAll('svg').length)"
                counts = tab.evaluate(drawn)
                assert len(counts) == expected and all(counts), (page, counts)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, (page, width)
                ends = "[...document.querySelectorAll('.main-svg')].map(svg => svg.getBoundingClientRect().right)"
                assert max(tab.evaluate(ends), default=0) <= width, (page, width)
            assert problems == [], page
            assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
            tab.close()


def test_a_chip_isolates_its_layer_in_every_figure_of_its_section(tmp_path):
    run = config()
    page = write_report(run_directory(tmp_path, run, simulate(run, every=20)))
    shown = (
        "id => document.getElementById(id).data.filter(t => t.meta && (t.visible ?? true) === true).map(t => t.meta)"
    )
    with browser() as chromium:
        tab = chromium.new_page()
        tab.goto(page.as_uri())
        chip = tab.locator("section", has_text="Router health").locator('button[data-key="layer 1"]')
        chip.click()
        assert tab.evaluate(shown, "balance") == tab.evaluate(shown, "token_entropy") == ["layer 1"]
        assert len(tab.evaluate(shown, "pool_mass")) == 3, "another section"
        chip.click()
        assert len(tab.evaluate(shown, "balance")) == 3
