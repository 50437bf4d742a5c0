"""Readers for `corpus`: each turns one file of a package into the plain documents it holds."""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

MIN_PARAGRAPH_CHARS = 40
"""Shorter paragraphs are mostly menu entries, option names and headings, not prose."""

STOPWORDS = {
    "english": "the of and to is in that for with this are be it as not by from which or you can",
    "french": "le la les des est une un dans pour que qui pas sur par du et avec au ce cette être sont vous de",
    "german": "der die das und ist nicht ein eine mit von den für wird dem auf sie werden zu als auch im oder",
    "spanish": "el la los las de que en un una para por con no es se del al como más este esta son su o y",
}
"""Frequent words, to drop the paragraphs that a translator has left in English."""


def is_prose(paragraph: str, language: str) -> bool:
    """Whether a paragraph is running text in the language (a key of `STOPWORDS`, or "russian")."""
    letters = sum(c.isalpha() or c in " ,." for c in paragraph)
    if len(paragraph) < MIN_PARAGRAPH_CHARS or letters < 0.85 * len(paragraph):
        return False
    if language == "russian":
        return len(re.findall("[\u0430-\u044f]", paragraph.lower())) > 0.6 * letters
    words = re.findall(r"\w+", paragraph.lower())
    scores = {name: sum(word in stop.split() for word in words) for name, stop in STOPWORDS.items()}
    return scores[language] > 0 and scores[language] == max(scores.values())


class _Paragraphs(HTMLParser):
    """Collects the text of a page's block elements, without code, tables and navigation."""

    BLOCKS = frozenset(("p", "li", "dd", "dt", "div", "br", "td", "blockquote", "h1", "h2", "h3", "h4", "h5"))
    SKIPPED = frozenset(("script", "style", "head", "pre", "nav", "footer", "table"))

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Ends the paragraph at a block element."""
        self._skipped += tag in self.SKIPPED
        self._end_paragraph(tag)

    def handle_endtag(self, tag: str) -> None:
        """Ends the paragraph at a block element."""
        self._skipped -= tag in self.SKIPPED
        self._end_paragraph(tag)

    def handle_data(self, data: str) -> None:
        """Takes the text outside skipped elements."""
        if not self._skipped:
            self._text.append(data)

    def _end_paragraph(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self.paragraphs.append(" ".join("".join(self._text).split()))
            self._text.clear()


def html_prose(text: str, language: str) -> Iterator[str]:
    """A page's paragraphs of running text, as one document."""
    parser = _Paragraphs()
    parser.feed(text)
    yield "\n\n".join(p for p in parser.paragraphs if is_prose(p, language))


def man_prose(text: str, language: str) -> Iterator[str]:
    """A manual page's paragraphs of running text, without markup and examples, as one document."""
    if re.search(r"(?m)^\.Dd", text):  # written with the BSD macros, another language
        return
    text = re.sub(r"(?ms)^\.(nf|EX|TS)\b.*?^\.(fi|EE|TE)\b", "", text)
    text = "\n".join(_without_macro(line) for line in text.splitlines() if not line.startswith((".\\", "'")))
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\[&/,:%|^]|\\s[-+]?\d", "", text)
    text = re.sub(r"\\\([lrd]q|\\\[[lrd]q\]", '"', text)
    text = re.sub(r"\\\([aoc]q|\\\[[aoc]q\]", "'", text)
    text = text.replace("\\-", "-").replace("\\ ", " ").replace("\\(bu", "•")
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    yield "\n\n".join(p for p in paragraphs if "\\" not in p and is_prose(p, language))


def _without_macro(line: str) -> str:
    """The words of a font macro's line; any other macro ends the paragraph."""
    match = re.match(r"\.(B|I|BR|IR|BI|IB|RB|RI|SM)\s+(.*)", line)
    if match is None:
        return "" if line.startswith(".") else line
    words = match[2].replace('"', "").split()
    return (" " if match[1] in ("B", "I", "SM") else "").join(words)


def text_prose(text: str, language: str) -> Iterator[str]:
    """The running text of a file that holds one long work, in documents of 40 paragraphs."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    prose = [p for p in paragraphs if is_prose(p, language)]
    for start in range(0, len(prose), 40):
        yield "\n\n".join(prose[start : start + 40])


def sword_chapters(folder: Path) -> Iterator[tuple[str, str]]:
    """The chapters of a Bible in SWORD's zText format, one verse a line: (name, text).

    `bzz` holds compressed books, `bzs` where each lies (start, size, size unpacked), `bzv` where each verse lies
    (book, start, size).
    """
    for testament in ("ot", "nt"):
        packed = (folder / f"{testament}.bzz").read_bytes()
        index = struct.iter_unpack("<III", (folder / f"{testament}.bzs").read_bytes())
        books = [zlib.decompress(packed[start : start + size]) for start, size, _ in index]
        verses: list[str] = []
        for book, start, size in struct.iter_unpack("<IIH", (folder / f"{testament}.bzv").read_bytes()):
            marked = books[book][start : start + size].decode("utf-8", "replace")
            name = re.search(r'<chapter [^>]*osisID="([^"]*)"', marked)
            if name is not None:
                yield name[1], "\n".join(verses)
                verses = []
            plain_text = html.unescape(re.sub(r"<title.*?</title>|<note.*?</note>|<[^>]*>", "", marked))
            if verse := " ".join(plain_text.replace("¶", "").split()):
                verses.append(verse)
        yield testament, "\n".join(verses)


def code(text: str) -> Iterator[str]:
    """A source file without its leading comments: licence headers would only be learnt by heart."""
    yield re.sub(r"\A(?:\s+|//[^\n]*\n|/\*.*?\*/|#(?![ \t]*(?:include|if|def))[^\n]*\n)*", "", text, flags=re.S)


def plain(text: str) -> Iterator[str]:
    """The file as it is."""
    yield text


def html_body(text: str) -> Iterator[str]:
    """A page's marked-up body, without the head and the navigation that all pages share."""
    text = re.sub(r'(?s).*?<body[^>]*>(<div class="navheader">.*?<hr /></div>)?', "<html><body>\n", text, count=1)
    yield re.sub(r'(?s)<div class="navfooter">.*', "</body></html>\n", text)


def gretl_table(text: str) -> Iterator[str]:
    """A gretl data file (XML) as comma-separated values below a line of names."""
    root = ElementTree.fromstring(text.encode())
    names = [variable.attrib["name"] for variable in root.iter("variable")]
    rows = [",".join((row.text or "").split()) for row in root.iter("obs")]
    yield "\n".join([",".join(names), *rows]) + "\n"
