"""A hook of MkDocs: files of the repository that pages link to, outside docs/, become pages.

A page links to ``../examples/with_trl.py`` as it does on a code host; the site shows that file under
``source/``. A link to what is not there stays as it is, and MkDocs warns about it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def outside(page: str, target: str, root: Path) -> str | None:
    """The path from `root` of what a page of docs/ links to, if that is a file outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if not path.startswith("docs/") and (root / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    wanted = {
        outside(file.src_uri, target, root)
        for file in files.documentation_pages()
        for target, _ in LINK.findall(file.content_string)
    }
    for path in sorted(filter(None, wanted)):
        text = (root / path).read_text()
        if not path.endswith(".md"):
            text = f"# {path}\n\n````{Path(path).suffix[1:]}\n{text}````\n"
        files.append(File.generated(config, f"source/{path}.md", content=text))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    root, here = Path(config.config_file_path).parent, page.file.src_uri

    def to_source(link: re.Match) -> str:
        path = outside(here, link[1], root)
        if path is None:
            return link[0]
        to = posixpath.relpath(f"source/{path}.md", posixpath.dirname(here) or ".")
        return f"]({to}{link[2] or ''})"

    return LINK.sub(to_source, markdown)
