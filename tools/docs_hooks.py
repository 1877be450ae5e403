"""Turns the notebooks into pages of the site, and holds the site to be offline.

A notebook becomes notebooks/NAME.md with its text, its code and its stored outputs, so
that the site needs neither a notebook server nor a converter.
"""

from __future__ import annotations

import base64
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# What a page may not load: it is read offline.
ELSEWHERE = re.compile(
    r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//"
)

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page per notebook, and its figures."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, figures = page(path)
        files.append(_file(config, f"notebooks/{path.stem}.md", text))
        for name, data in figures.items():
            files.append(_file(config, f"notebooks/{name}", data))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuses a page that loads something from another place."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
    members = _members(page.markdown or "")
    lost = [f"{m}.{n}" for m, n in members if f'id="{m}.{n}"' not in output]
    if lost:
        raise PluginError(
            f"{page.file.src_uri} shows nothing of {', '.join(lost)}: a name that is "
            "public has a docstring"
        )
    return output


def _members(markdown: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a page of the API asks to be shown."""
    module = ""
    for line in markdown.splitlines():
        if line.startswith("::: "):
            module = line.removeprefix("::: ")
        elif line.startswith("        - "):
            yield module, line.removeprefix("        - ")


def _file(config: MkDocsConfig, path: str, content: str | bytes) -> File:
    return File.generated(config, path, content=content)


def page(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its figures by file name."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if len(parts) == 1:
                parts.append(
                    f"This page shows `experiments/notebooks/{path.name}` with the "
                    "outputs that are stored in it. The tests run it."
                )
        elif source.strip():
            parts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                parts += _output(output, path.stem, figures)
    return "\n\n".join(parts) + "\n", figures


def _output(output: dict[str, Any], stem: str, figures: dict[str, bytes]) -> list[str]:
    """The Markdown of one output; its picture is added to `figures`."""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{stem}_{len(figures)}.png"
        figures[name] = base64.b64decode("".join(data["image/png"]))
        return [f"![figure {len(figures)} of this notebook]({name})"]
    text = "".join(output.get("text", data.get("text/plain", "")))
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return [f"```text\n{text}\n```"] if text else []
