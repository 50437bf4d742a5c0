"""Builds the demo model's corpora from Debian packages, held-out documents apart.

    apt-get download $(python -m expert_lens.demo.corpus packages)      # in an empty folder; no root needed
    python -m expert_lens.demo.corpus build . corpus/

A corpus folder holds `<domain>.train.xz` and `<domain>.heldout.xz` (UTF-8 documents, separated by a zero byte)
and `manifest.json` (what was taken from which package, at which version and licence). None of it is shipped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from expert_lens.demo import readers

SEPARATOR = "\0"
HELD_OUT_SHARE = 0.04
"""Share of the documents, drawn by the hash of their names, that training never sees."""
MAX_DOCUMENT_CHARS = 60_000
"""A longer document is cut, so that no single file or data set fills its domain."""
MIN_DOCUMENT_CHARS = 200
MAX_SOURCE_CHARS = 12_000_000


@dataclass(frozen=True)
class Source:
    """What one domain takes from one package."""

    domain: str
    package: str
    licence: str
    files: str
    """Regular expression, searched in the path of a file inside the package (or inside `archive`)."""
    reader: Callable[[str], Iterator[str]]
    archive: str | None = None
    """A tar archive in the package that holds the files."""
    sword: str | None = None
    """A SWORD module's folder in the package, read as a whole in place of `files`."""
    max_chars: int = MAX_SOURCE_CHARS


def _prose(domain: str, code: str, handbook: str, office: str) -> Iterator[Source]:
    """The packages that are translated into every one of the five languages."""
    page = partial(readers.html_prose, language=domain)
    yield Source(domain, "debian-handbook", "GPL-2+ or CC-BY-SA-3.0", rf"/html/{handbook}/.*\.html$", page)
    yield Source(domain, f"libreoffice-help-{office}", "MPL-2.0", r"/text/.*\.html$", page)
    yield Source(domain, "installation-guide-amd64", "GPL-2", rf"-amd64/{code}/.*\.html$", page)
    if code != "de":
        yield Source(domain, f"aptitude-doc-{code}", "GPL-2+", r"\.html$", page)
    if code != "ru":
        yield Source(domain, f"debian-reference-{code}", "GPL-2+", rf"/ch\d+\.{code}\.html$", page)
    if code != "es":
        package = "developers-reference" + ("" if code == "en" else f"-{code}")
        yield Source(domain, package, "GPL-2+", r"\.html$", page)
    manual = partial(readers.man_prose, language=domain)
    if code == "en":
        yield Source(domain, "manpages", "GPL-2+, BSD, verbatim: by page", r"/man\d/.*\.gz$", manual)
    else:
        yield Source(domain, f"manpages-{code}", "GPL-3+", r"/man\d/.*\.gz$", manual)


def _python(package: str, licence: str) -> Source:
    return Source("python", package, licence, r"(?<!/__init__)\.py$", readers.code, max_chars=3_500_000)


SOURCES = (
    *_prose("english", "en", "en-US", "en-us"),
    Source(
        "english",
        "jargon-text",
        "public domain",
        r"/jargon\.txt\.gz$",
        partial(readers.text_prose, language="english"),
    ),
    Source("scripture", "sword-text-kjv", "public domain", "", readers.plain, sword="engKJV2006eb"),
    *_prose("french", "fr", "fr-FR", "fr"),
    *_prose("german", "de", "de-DE", "de"),
    *_prose("spanish", "es", "es-ES", "es"),
    Source("spanish", "sword-text-sparv", "public domain", "", readers.plain, sword="spaRV1909eb"),
    *_prose("russian", "ru", "ru-RU", "ru"),
    _python("libpython3.11-stdlib", "PSF-2"),
    _python("libpython3.11-minimal", "PSF-2"),
    _python("python3-networkx", "BSD-3-Clause"),
    _python("python3-django", "BSD-3-Clause"),
    _python("python3-sklearn", "BSD-3-Clause"),
    _python("python3-statsmodels", "BSD-3-Clause"),
    _python("python3-matplotlib", "PSF-like"),
    Source(
        "c",
        "linux-source-6.1",
        "GPL-2",
        r"^[^/]*/(kernel|mm|fs|lib|block|ipc|net/core|net/ipv4|drivers/(base|char|i2c|input))/.*\.c$",
        readers.code,
        archive="usr/src/linux-source-6.1.tar.xz",
    ),
    Source(
        "json",
        "python3-botocore",
        "Apache-2.0",
        r"/data/.*/(service|examples|waiters)-\w+\.json$",
        readers.plain,
    ),
    Source("json", "node-caniuse-db", "CC-BY-4.0", r"/features-json/.*\.json$", readers.plain),
    Source("json", "iso-codes", "LGPL-2.1+", r"/json/.*\.json$", readers.plain),
    Source("table", "python3-statsmodels", "BSD-3-Clause", r"\.csv$", readers.plain),
    Source("table", "python3-vega-datasets", "MIT; data by file", r"\.csv$", readers.plain),
    Source("table", "gretl-data", "GPL-3", r"\.gdt$", readers.gretl_table),
    Source("html", "postgresql-doc-15", "PostgreSQL", r"\.html$", readers.html_body),
)
DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))


def read_documents(folder: Path, domain: str, split: str) -> list[str]:
    """The documents of a domain's split ("train" or "heldout") in a corpus folder."""
    text = lzma.decompress((folder / f"{domain}.{split}.xz").read_bytes()).decode()
    return text.split(SEPARATOR)


def build(debs: Path, out: Path) -> None:
    """Unpacks the downloaded packages, reads every source, and writes the corpus folder."""
    out.mkdir(parents=True, exist_ok=True)
    manifest: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        for domain in DOMAINS:
            splits: dict[str, list[str]] = {"train": [], "heldout": []}
            seen: set[int] = set()
            for source in (source for source in SOURCES if source.domain == domain):
                manifest.append(_add_source(source, debs, Path(scratch), splits, seen))
                print(manifest[-1], flush=True)
            for split, documents in splits.items():
                pool.submit(_write, out / f"{domain}.{split}.xz", documents)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, documents: list[str]) -> None:
    path.write_bytes(lzma.compress(SEPARATOR.join(documents).encode(), preset=6))


def _add_source(
    source: Source, debs: Path, scratch: Path, splits: dict[str, list[str]], seen: set[int]
) -> dict[str, Any]:
    """Appends the source's documents to their split; returns the manifest's line."""
    deb = next(debs.glob(f"{source.package}_*.deb"))
    counts = {"train": 0, "heldout": 0}
    num_chars = num_bytes = 0
    documents = ((_digest(source, name), raw) for name, raw in _raw_documents(source, _unpacked(deb, scratch)))
    for digest, raw in sorted(documents):
        text = _without_repeats(raw.replace(SEPARATOR, ""), seen)[:MAX_DOCUMENT_CHARS]
        if len(text) < MIN_DOCUMENT_CHARS or num_chars > source.max_chars:
            continue
        split = "heldout" if digest[-1] < HELD_OUT_SHARE * 256 else "train"
        splits[split].append(text)
        counts[split] += 1
        num_chars += len(text)
        num_bytes += len(text.encode())
    version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True)
    return {
        "domain": source.domain,
        "package": source.package,
        "version": version.stdout.strip(),
        "licence": source.licence,
        "bytes": num_bytes,
        "documents": counts,
    }


def _digest(source: Source, name: str) -> bytes:
    """Draws a document's place, held out or in which order, from its name: the same on every machine."""
    return hashlib.sha256(f"{name} of {source.package}".encode()).digest()


def _unpacked(deb: Path, scratch: Path) -> Path:
    """The folder into which the package is unpacked, once."""
    folder = scratch / deb.name
    if not folder.exists():
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
    return folder


def _raw_documents(source: Source, root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of each document."""
    if source.sword is not None:
        yield from readers.sword_chapters(root / "usr/share/sword/modules/texts/ztext" / source.sword)
        return
    for name, data in _files(source, root):
        if data.startswith(b"\x1f\x8b"):  # gzip, whatever the file is called
            data = gzip.decompress(data)
        for index, text in enumerate(source.reader(data.decode("utf-8", "replace"))):
            yield f"{name}#{index}", text


def _files(source: Source, root: Path) -> Iterator[tuple[str, bytes]]:
    if source.archive is not None:
        with tarfile.open(root / source.archive, "r|*") as archive:
            for member in archive:
                if member.isfile() and re.search(source.files, member.name):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield member.name, stream.read()
        return
    for path in _newest(sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())):
        name = path.relative_to(root).as_posix()
        if re.search(source.files, name):
            yield name, path.read_bytes()


def _newest(paths: list[Path]) -> list[Path]:
    """Without older versions of the same file (`ec2/2015-10-01/…`): they would leak into the held-out split."""
    by_key = {re.sub(r"/\d{4}-\d\d-\d\d/", "/", path.as_posix()): path for path in paths}
    return sorted(by_key.values())


def _without_repeats(text: str, seen: set[int]) -> str:
    """The text without the paragraphs (long ones; blank lines part them) that the domain has already had."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = hash(paragraph.strip())
        if len(paragraph) >= readers.MIN_PARAGRAPH_CHARS and key in seen:
            continue
        seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("packages", help="print the packages to download")
    builder = commands.add_parser("build", help="build the corpus folder")
    builder.add_argument("debs", type=Path, help="folder of downloaded packages (.deb)")
    builder.add_argument("out", type=Path, help="corpus folder to write")
    options = parser.parse_args()
    if options.command == "packages":
        print(*sorted({source.package for source in SOURCES}))
    else:
        build(options.debs, options.out)


if __name__ == "__main__":
    main()
