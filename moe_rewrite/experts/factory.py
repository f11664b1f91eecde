"""The experts' parameters: one module per site.

A site's `parts` name what its experts have, in the order in which the graph takes them.
"""

from __future__ import annotations

from ..ir.sites import AnySite, HeadSite, Site
from .base import ExpertSite
from .copies import RegionCopies
from .head import HeadColumns
from .lora.parameters import LoRASite


def make_site(site: AnySite, rank: int) -> ExpertSite:
    if isinstance(site, HeadSite):
        return HeadColumns(site)
    return LoRASite(site, rank) if isinstance(site, Site) else RegionCopies(site)
