"""Real text that every Python machine already holds, labelled by kind: source code, documentation, licences."""

import gzip
import hashlib
import inspect
import os
import pathlib
import pydoc_data.topics
import re
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from emo_jax.data.documents import Document, digest
from emo_jax.errors import require

BYTES_PER_KIND = 2_000_000
MIN_DOCUMENTS = 20
_BYTES_PER_FILE = 8_000  # the head of many files says more about a kind than the whole of a few
_MIN_CHARACTERS = 200
_MAX_LINE = 2_000  # longer lines mean minified code or data
_MAX_DIGITS = 0.2

_SUFFIXES = {
    "python": ".py",
    "stubs": ".pyi",
    "c": ".h .hh .hpp .c .cc .cpp",
    "web": ".js .mjs .ts .css .htm .html .svg",
    "perl": ".pl .pm",
    "vim": ".vim",
    "cmake": ".cmake",
    "shell": ".sh .bash .zsh",
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# For other suffixes: the first that matches the end of a path, its `.gz` removed, takes the file.
_PATTERNS = {
    "man_pages": r"/man/man\d\w*/[^/]+\.\d\w*",
    "shell": r"/bash-completion/completions/[^/]+",
    "licences": r"/common-licenses/[^/]+|/(copyright|licen[cs]e|copying|notices?)([-_.][^/]*)?",
    "changelogs": r"/(changelog|changes|news|history)([-_.][^/]*)?",
    "reference": r"/(metadata|readme[^/]*)|.*\.(rst|md|txt)",
}
_KIND_OF_PATH = re.compile("|".join(f".*(?P<{kind}>{pattern})" for kind, pattern in _PATTERNS.items()))
_DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*r?"""(.+?)"""', re.DOTALL)
_TEST_FOLDERS = ("test", "tests")
_OTHER_ROOTS = ("site-packages", "dist-packages")
_DATA_FOLDERS = ("__pycache__", "locale", "icons", "zoneinfo", "fonts", "i18n", "unicore")
_SKIPPED_FOLDERS = frozenset((*_TEST_FOLDERS, *_OTHER_ROOTS, *_DATA_FOLDERS))


def default_roots() -> tuple[str, ...]:
    """The folders that are searched: Python's own, its packages, and the system's documentation and headers."""
    paths = sysconfig.get_paths()
    roots = [paths[name] for name in ("stdlib", "purelib", "platlib", "include")]
    return tuple(dict.fromkeys([*roots, "/usr/include", "/usr/share"]))


def installed_documents(
    roots: Sequence[str] | None = None, bytes_per_kind: int = BYTES_PER_KIND, min_documents: int = MIN_DOCUMENTS
) -> Iterator[Document]:
    """Yields the machine's own text, kind after kind, the same documents in the same order every time.

    Files are taken in the order of a hash of their path inside their root, in turn from every package, so
    that a kind's share is a sample of the machine rather than its largest package. Text that differs
    from an earlier document only in case or white space is left out, and so are minified files, tables
    of numbers, tests and this project.

    Args:
      roots: folders to search; `default_roots()` when None. Missing ones are ignored.
      bytes_per_kind: a kind ends after this many UTF-8 bytes, so that none swamps the others.
      min_documents: kinds with fewer documents are left out.

    Raises:
      UserError: if no kind has enough documents.
    """
    files = _files_by_kind(default_roots() if roots is None else roots)
    seen: set[bytes] = set()
    found = False
    for kind in sorted(files):
        texts = _texts(kind, files[kind], bytes_per_kind, seen)
        if len(texts) >= min_documents:
            found = True
            yield from (Document(text, kind) for text in texts)
    require(
        found,
        "data.source='installed_text' found no text on this machine; "
        "set data.source to 'text' or 'jsonl' and data.path to your own.",
    )


def _files_by_kind(roots: Sequence[str]) -> dict[str, list[str]]:
    files: dict[str, list[tuple[bytes, str, str]]] = defaultdict(list)
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
            for name in names:
                path = f"{folder}/{name}"
                kind = _kind(path.lower().removesuffix(".gz"))
                if not kind:
                    continue
                relative = path.removeprefix(root)
                order = hashlib.blake2b(relative.encode(errors="replace"), digest_size=8).digest()
                package = "/".join(re.split(r"[/_.-]", relative, maxsplit=4)[:4])
                if kind == "python" and order[-1] % 2:  # a file gives its code or its docstrings, never both
                    kind = "docstrings"
                files[kind].append((order, package, path))
    return {kind: [path for _, _, path in _interleaved(found)] for kind, found in files.items()}


def _interleaved(found: list[tuple[bytes, str, str]]) -> list[tuple[int, bytes, str]]:
    """Orders (hash, package, path) so that every package gives its first file before any gives its second."""
    ranks: dict[str, int] = defaultdict(int)
    ordered = []
    for order, package, path in sorted(found):
        ordered.append((ranks[package], order, path))
        ranks[package] += 1
    return sorted(ordered)


def _kind(path: str) -> str:
    kind = _KIND_OF_SUFFIX.get(os.path.splitext(path)[1], "")
    if kind:
        return kind
    match = _KIND_OF_PATH.fullmatch(path)
    return next(name for name, value in match.groupdict().items() if value) if match else ""


def _is_skipped(folder: str) -> bool:
    return folder in _SKIPPED_FOLDERS or folder.startswith((".", "emo_jax"))


def _texts(kind: str, paths: Sequence[str], max_bytes: int, seen: set[bytes]) -> list[str]:
    texts, size = [], 0
    for text in _candidates(kind, paths):
        if not _is_prose_or_code(text):
            continue
        key = digest(" ".join(text.lower().split()))
        if key in seen:
            continue
        seen.add(key)
        texts.append(text)
        size += len(text.encode())
        if size >= max_bytes:
            break
    return texts


def _candidates(kind: str, paths: Sequence[str]) -> Iterator[str]:
    if kind == "reference":
        yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))
    for path in paths:
        text = _read(path)
        if kind == "docstrings":
            text = _docstrings(text)
        elif kind == "man_pages":
            text = _man_page(text)
        elif path.endswith("/METADATA"):
            text = text.partition("\n\n")[2]  # the long description behind the header fields
        yield text


def _read(path: str) -> str:
    """The head of a file up to the last whole line; empty if it cannot be read as UTF-8 text."""
    try:
        if not pathlib.Path(path).is_file():
            return ""
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read(_BYTES_PER_FILE + 1)
        if len(data) > _BYTES_PER_FILE:
            data = data[: data.rfind(b"\n") + 1]
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""


def _is_prose_or_code(text: str) -> bool:
    if len(text) < _MIN_CHARACTERS or "\0" in text or max(map(len, text.splitlines())) > _MAX_LINE:
        return False
    data = text.encode()
    return len(data) - len(data.translate(None, delete=b"0123456789")) <= _MAX_DIGITS * len(data)


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and functions, a blank line between.

    A docstring is what a pattern takes for one: parsing the files would take a quarter of a minute.
    """
    return "\n\n".join(inspect.cleandoc(docstring) for docstring in _DOCSTRING.findall(source))


def _man_page(source: str) -> str:
    """A page from its title macro on: what stands before are comments and definitions that many pages share."""
    start = re.search(r"^\.(TH|Dd)\b", source, re.MULTILINE)
    return source[start.start() :] if start else ""
