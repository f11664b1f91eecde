"""The page: its facts are those of the analysis, its texts are escaped, it is whole or not there."""

import copy
import gc
import pickle

import pytest
import torch
from architectures import build
from factories import cnn, mlp
from pages import NASTY, Page, of_texts, read_page
from reference import randomize

import moe_rewrite
from moe_rewrite import PatchRouter, TokenRouter
from moe_rewrite.converted.page.facts import router_words
from moe_rewrite.converted.page.write import render
from moe_rewrite.errors import ConfigError, InputError


def require_alone(page):
    """It asks for nothing outside of itself, and a browser that reads it is told to refuse."""
    assert not {"link", "iframe", "img", "object", "base"} & set(page.tags)
    assert not [v for _, name, v in page.attributes if name in ("src", "href", "action")]
    policy = next(v for tag, name, v in page.attributes if tag == "meta" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and "http" not in policy


def require_as_reported(split, report):
    """A split of the page has the cut and the sites of a conversion there, with the reasons."""
    (kind, *_) = split["kinds"]
    assert split["cut"] == report.cut
    assert kind["takes"] == [[n, str(i), str(o)] for n, i, o in report.sites] != []
    assert kind["rejected"] == [list(pair) for pair in report.rejected]


def test_a_dense_page_has_the_blocks_and_every_split(tmp_path):
    file = tmp_path / "new" / "page.html"
    model = mlp().eval()
    depth = moe_rewrite.inspect(model, html=file, split=3)
    page = read_page(file)
    require_alone(page)
    facts = page.facts
    assert str(depth) == str(moe_rewrite.inspect(model)) and facts["start"] == 3
    assert [(p["name"], p["params"], p["flops"]) for p in facts["parts"]] == [
        (b.name, b.params, b.flops) for b in depth.parts
    ]
    report = moe_rewrite.convert(model, split=2, dry_run=True)
    require_as_reported(facts["splits"][2], report)
    for split in facts["splits"]:
        _, feedforward, region = split["kinds"]
        assert split["shallow"]["params"] + split["deep"]["params"] == 4 * 17 * 16
        assert (
            feedforward["experts"] == "feed-forward experts"
            and "patch" in region["problem"].lower()
        )
    assert {p.name for p in file.parent.iterdir()} == {"page.html"}  # no temporary file


def test_the_page_of_a_converted_llama_is_its_report(tmp_path):
    model = build("Llama", layers=2)
    router = TokenRouter(granularity="token", init=1.0)
    moe = moe_rewrite.convert(model, split=1, num_experts=3, router=router, verify=False)
    randomize(moe)
    ids, texts = torch.tensor([[5, 6, 7, 8, 9]]), ["a", " b", NASTY, "\n", "é"]
    moe.report.html(tmp_path / "p.html", {"input_ids": ids}, texts)
    page = read_page(tmp_path / "p.html")
    require_alone(page)
    facts, report = page.facts, moe.report
    require_as_reported(facts["splits"][facts["converted"]["split"]], report)
    assert not facts["converted"]["inside"]
    routing, plan = facts["routing"], moe.route(input_ids=ids)
    assert routing["kind"] == "tokens" and routing["outputs"] == ["frozen model", *moe.names]
    assert [r["text"] for r in routing["rows"]] == texts
    assert [r["chosen"] for r in routing["rows"]] == plan.selected[0].tolist()
    gates = torch.tensor([r["gates"] for r in routing["rows"]])
    torch.testing.assert_close(gates, plan.gates[0], atol=1e-4, rtol=0)
    for facts_row in report.facts()[:4]:
        assert list(facts_row) in facts["converted"]["facts"]
    with pytest.raises(InputError, match="3 texts for 5 rows"):
        moe.report.html(tmp_path / "no.html", {"input_ids": ids}, ["a", "b", "c"])
    assert not (tmp_path / "no.html").exists()


def test_the_page_of_a_cnn_shows_the_patches_that_experts_take(tmp_path):
    pytest.importorskip("PIL")
    model, x = cnn().eval(), torch.randn(2, 3, 32, 32)
    router = PatchRouter(grid=4, per_expert=3)
    moe = moe_rewrite.convert(model, split="layer2", router=router, num_experts=2, verify=False)
    moe.report.html(tmp_path / "p.html", x)
    facts, plan = read_page(tmp_path / "p.html").facts, moe.route(x)
    require_as_reported(facts["splits"][facts["converted"]["split"]], moe.report)
    routing = facts["routing"]
    assert routing["kind"] == "patches" and routing["grid"] == [4, 4]
    assert routing["image"].startswith("data:image/png;base64,")
    for e, taken in enumerate(routing["taken"]):
        assert taken["expert"] == moe.names[e] and taken["patches"] == plan.patch_ids[0, e].tolist()
        torch.testing.assert_close(
            torch.tensor(taken["gates"]), plan.patch_gates[0, e], atol=1e-4, rtol=0
        )


def test_the_page_of_a_vit_places_its_tokens_on_the_image(tmp_path):
    pytest.importorskip("PIL")
    router = TokenRouter(granularity="token", init=1.0)
    moe = moe_rewrite.convert(build("ViT"), split=1, router=router, num_experts=2, verify=False)
    x = torch.randn(1, 3, 16, 16)
    moe.report.html(tmp_path / "p.html", x)
    facts = read_page(tmp_path / "p.html").facts
    require_as_reported(facts["splits"][1], moe.report)
    routing = facts["routing"]
    assert (routing["kind"], routing["grid"], routing["prefix"]) == ("map", [4, 4], 1)
    assert [r["chosen"] for r in routing["rows"]] == moe.route(x).selected[0].tolist()


def test_texts_are_escaped_wherever_they_stand():
    text = NASTY.replace("\udc80", "")
    plain, odd = Page(render(of_texts("name"))), Page(render(of_texts(text)))
    assert odd.tags == plain.tags  # no text has become an element
    assert odd.facts["parts"][0]["name"] == text and odd.of("h1") == [text]
    assert odd.facts["routing"]["rows"][0]["gates"] == [None, 1.0]  # JSON has no NaN
    assert Page(render(of_texts(NASTY))).facts["model"] == NASTY  # half a character too


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("before")
    with pytest.raises(ConfigError, match=r"is a folder: expected the name of a file"):
        moe_rewrite.inspect(mlp(), html=tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        moe_rewrite.inspect(mlp(), html=file / "below.html")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match="the disk is full.*name another file"):
        moe_rewrite.inspect(mlp(), html=file)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_report_without_its_model_says_what_to_do(tmp_path):
    moe = moe_rewrite.convert(mlp(), split=2, verify=False)
    dry = moe_rewrite.convert(mlp(), split=2, dry_run=True)
    report = moe.report
    assert report == pickle.loads(pickle.dumps(report))
    other = copy.deepcopy(moe)
    del moe
    gc.collect()
    for gone in (report, dry, pickle.loads(pickle.dumps(report))):
        with pytest.raises(InputError, match=r"model of this report is gone.*inspect\(model, html"):
            gone.html(tmp_path / "p.html")
    other.report.html(tmp_path / "p.html")
    assert read_page(tmp_path / "p.html").facts["converted"]["split"] == 2


@pytest.mark.sweep
def test_layers_with_routers_of_their_own_are_refused_a_sample(tmp_path):
    moe = moe_rewrite.convert(build("Llama", layers=2), mode="upcycle", split=1, num_experts=2)
    with pytest.raises(InputError, match="every layer of this model has a router of its own"):
        moe.report.html(tmp_path / "p.html", torch.tensor([[5, 6, 7]]))


def test_words_of_routers():
    patches = PatchRouter(grid=4, per_expert=3)
    assert router_words(patches) == "Each expert takes 3 of the 4 × 4 patches of a sample."
    top = router_words(TokenRouter(top_k=2))
    assert top.endswith("by its own features, to at most 2 experts.") and router_words(None) == ""


def test_notebooks_get_tables_without_script():
    depth = moe_rewrite.inspect(mlp())
    shown = Page(depth._repr_html_())
    assert shown.of("td")[1::6] == [b.name for b in depth.parts]
    assert shown.of("caption") == [str(depth).split("\n")[0].strip()]
    report = moe_rewrite.convert(mlp(), split=1, dry_run=True)
    tables = Page(report._repr_html_())
    assert {n for n, _, _ in report.sites} <= set(tables.of("td"))
    assert "script" not in {*shown.tags, *tables.tags} and len(depth._repr_html_()) < 5000
