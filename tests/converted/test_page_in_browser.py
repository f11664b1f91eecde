"""The page in headless Chromium: what it shows follows the slider, and it asks for nothing."""

import json
import shutil

import pytest
import torch
from architectures import build
from factories import cnn
from pages import NASTY, of_texts, read_page
from reference import randomize

import moe_rewrite
from moe_rewrite import PatchRouter, TokenRouter
from moe_rewrite.converted.page.write import render

pytestmark = pytest.mark.sweep
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
RUN = {
    "method": "pmoe", "tasks": ["one", "two"], "outputs": ["frozen model", "expert0", "two"],
    "over_time": [[0.3, 0.7, 0.0], [0.2, 0.4, 0.4]],
    "by_task": [{"task": t, "shares": [0.2, 0.4, 0.4]} for t in ("one", "two", "the base task")],
}  # fmt: skip
RATIO = """([front, back]) => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const find = (of) => document.querySelector(of);
  const [a, b] = [light(getComputedStyle(find(front)).color), light(getComputedStyle(find(back)).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the path")
    with api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files by name: a dense ViT, converted models with routing and a run, and odd ones."""
    folder = tmp_path_factory.mktemp("pages")
    files = {n: folder / f"{n}.html" for n in ("dense", "tokens", "patches", "map", "odd", "long")}
    moe_rewrite.inspect(build("ViT"), html=files["dense"])
    token, image = TokenRouter(granularity="token", init=1.0), torch.randn(1, 3, 16, 16)
    llama = moe_rewrite.convert(build("Llama"), split=1, num_experts=2, router=token)
    randomize(llama)
    llama.report.html(files["tokens"], torch.tensor([[5, 6, 7]]), ["one", " two", " three"], RUN)
    vit = moe_rewrite.convert(build("ViT"), split=1, num_experts=2, router=token)
    vit.report.html(files["map"], image)
    x, router = torch.randn(1, 3, 32, 32), PatchRouter(grid=4, per_expert=3)
    net = moe_rewrite.convert(cnn().eval(), split="layer2", router=router, num_experts=2)
    net.report.html(files["patches"], x)
    files["odd"].write_text(render(of_texts(NASTY)), errors="replace")
    files["long"].write_text(render(of_texts("a.very_long_name_without_any_place_to_break" * 4)))
    return files


@pytest.fixture
def show(browser, pages):
    """Opens a page; at the end nothing may have been logged, asked for, or asked of the user."""
    said, opened = [], []

    def go(name, width=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        tab = context.new_page()
        opened.append(context)
        for event in ("console", "pageerror", "dialog"):
            tab.on(event, lambda e: said.append(str(getattr(e, "text", e))))
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or said.append(r.url))
        tab.goto(pages[name].as_uri())
        return tab

    yield go
    for context in opened:
        context.close()
    assert said == []


def test_the_keyboard_moves_the_slider_and_all_follows(show, pages):
    tab, facts = show("dense"), read_page(pages["dense"]).facts
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "split"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("Home")
    for split in facts["splits"]:
        index, (kind, *_) = split["index"], split["kinds"]
        assert tab.inner_text("#split-title") == f"Split before block {index}: {split['label']}"
        assert split["label"] in tab.get_attribute("#split", "aria-valuetext")
        assert tab.locator("#bars .row").first.locator(".shallow").count() == index + 1  # the stem
        assert f"{len(kind['takes'])} sites can hold LoRA experts" in tab.inner_text(
            "#sites-summary"
        )
        counts = tab.locator("#sites-tables table").first.locator("td:last-child").all_inner_texts()
        assert sum(map(int, counts)) == len(kind["takes"])
        for _, reason in kind["rejected"]:
            assert reason in tab.inner_text("#sites-tables")
        assert split["crosses"][0]["shape"] in tab.inner_text("#crosses")
        tab.keyboard.press("ArrowRight")


def test_the_kind_of_experts_is_chosen_and_kept(show, pages):
    tab, facts = show("dense"), read_page(pages["dense"]).facts
    tab.check("text=region experts")
    problem = facts["splits"][facts["start"]]["kinds"][2]["problem"]
    assert problem and problem in tab.inner_text("#sites-summary")
    tab.focus("#split")
    tab.keyboard.press("End")
    assert "No site can hold region experts here" in tab.inner_text("#sites-summary")
    tab.check("text=feed-forward experts")
    assert "1 site can hold feed-forward experts" in tab.inner_text("#sites-summary")


def test_tokens_and_a_run(show):
    tab = show("tokens")
    assert tab.locator(".token").all_inner_texts() == ["one", " two", " three"]
    assert tab.inner_text(".badge") == "this model's split"
    assert tab.locator(".stack").count() == 2 and "after two" in tab.inner_text("#run")
    assert tab.locator("#run td").count() == 3 * 4
    label = tab.get_attribute(".stack >> nth=0", "aria-label")
    assert label == "frozen model 30%, expert0 70%, two 0%"


def test_patches_are_drawn_on_the_image(show, pages):
    tab, (first, *_) = show("patches"), read_page(pages["patches"]).facts["routing"]["taken"]
    drawn = tab.locator("#routing svg").first
    assert drawn.locator("image").count() == 1 and drawn.locator("text").count() == 3
    assert drawn.locator("rect[fill=none]").count() == len(first["patches"])
    tab = show("map")
    assert tab.locator("#routing svg text").count() == 16
    assert "Each of 16 patches" in tab.inner_text("#routing")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["dense", "tokens", "patches", "map", "odd", "long"])
def test_narrow_screens_need_no_scrolling_sideways(show, name, scheme):
    tab = show(name, 360, color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    for front, back in ((".lead", "html"), ("#shallow small", ".side"), ("th", "html")):
        assert tab.evaluate(RATIO, [front, back]) >= 4.5, (front, scheme)


def test_texts_are_shown_as_they_are(show):
    tab, text = show("odd"), " ".join(NASTY.replace("\udc80", "").split())
    for place in ("h1", "#split-title", "#sites-tables", "#crosses", ".token", "#run", "dl"):
        assert text[:40] in " ".join(tab.inner_text(place).split()), place
    assert tab.locator("img").count() == 0


def test_without_scripts_the_blocks_are_there(show, pages):
    tab, facts = show("dense", java_script_enabled=False), read_page(pages["dense"]).facts
    assert tab.locator("#depth tbody tr").count() == len(facts["parts"])
    assert tab.is_visible("noscript") and not tab.is_visible("#split")
    assert json.dumps(facts["model"])[1:-1] in tab.inner_text("h1")
