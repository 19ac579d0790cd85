"""Checks that every link inside the built pages leads somewhere: `python docs/check_links.py docs/_build/html`.

Sphinx checks references while it builds; this sees what readers click, raw links and anchors of the theme included.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


def broken(root: Path) -> list[str]:
    """A line for each link that leads nowhere."""
    pages = {file: Page(file) for file in sorted(root.resolve().rglob("*.html"))}
    lines = []
    for file, page in pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:  # `make links` asks those
                continue
            path = (file.parent / unquote(target.path)).resolve() if target.path else file
            anchor = unquote(target.fragment)
            missing = not path.exists() or (anchor and path in pages and anchor not in pages[path].anchors)
            if missing:
                lines.append(f"{file.relative_to(root.resolve())}: {link}")
    return lines


def main() -> int:
    """Prints what is broken."""
    lines = broken(Path(sys.argv[1]))
    print("\n".join(lines) if lines else "Every link inside the pages leads somewhere.")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
