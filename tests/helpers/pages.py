"""Read a page: its facts, its tags and its texts; and facts of which pages are made."""

import json
from html.parser import HTMLParser

from moe_rewrite import TokenRouter
from moe_rewrite.converted.page.facts import page_facts
from moe_rewrite.ir.depth_map import Block, DepthMap
from moe_rewrite.passes.possible_splits import Crossing, PossibleSplit, SitesOf

NASTY = "</script><img src=x onerror=alert(1)>\"'&amp; \u2028😀 \udc80"


class Page(HTMLParser):
    """tags: the names of all elements. texts: (element, text) in order. attributes: all values."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.attributes, self._open = [], [], [], [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        self.texts.append((self._open[-1], data))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]

    @property
    def facts(self):
        return json.loads(self.of("script")[0])


def read_page(file):
    return Page(file.read_text())


def of_texts(text):
    """Facts of a model in which everything that has a name is called so."""
    block = Block(text, text, (text,), 3, 5, 0, 1)
    depth = DepthMap(text, block, (block,), None, (), {}, text, None, ((text, 3),))
    crossing = Crossing(text, text, (text,), text, True)
    sites = SitesOf(text, TokenRouter(), ((text, text, text),), ((text, text),), (text,))
    split = PossibleSplit(0, text, text, (block,), (block,), (crossing,), kinds=(sites,))
    row = {"text": text, "gates": [float("nan"), 1.0], "chosen": 1}
    routing = {"kind": "tokens", "outputs": ["frozen model", text], "image": None, "rows": [row]}
    run = {
        "method": text, "tasks": [text], "outputs": ["frozen model", text],
        "over_time": [[0.25, 0.75]], "by_task": [{"task": text, "shares": [0.25, 0.75]}],
    }  # fmt: skip
    converted = {"split": 0, "inside": True, "facts": [[text, text]], "experts": [text]}
    return page_facts(depth, [split], 0, converted, routing, run)
