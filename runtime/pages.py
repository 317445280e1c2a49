"""Pages about methods, made from their files: `python -m effc.runtime.pages docs/methods README.md`.

A package of methods makes pages of its own by `python -m effc.runtime.pages --of acme_effc docs/methods`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from effc.runtime.catalogue import catalogue
from effc.specs.catalogue import Entry

BEGIN, END = "<!-- methods, made by `make docs` -->", "<!-- end of methods -->"
_FIDELITY = {
    "exact": "same function",
    "within": "bounded error",
    "lossy": "error measured",
    "healed": "train afterwards",
    "train": "trains",
}


def table(package: str = "") -> str:
    """Every method of a package, by default effc's own: what it does, how far it moves the function, its
    source. A Markdown table.
    """
    rows = ["| method | what it does | function | source |", "|---|---|---|---|"]
    rows += [_row(entry) for entry in _methods(package)]
    return "\n".join(rows)


def with_table(text: str) -> str:
    """The text with the table of methods between its two marks made anew.

    Raises:
        ValueError: when the text lacks the marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def write(folder: Path, package: str = "") -> list[Path]:
    """One page a method, and an index; returns the files."""
    from effc import passes
    from effc.compiler.describe import page

    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / "README.md"]
    made[0].write_text(f"# Methods\n\n{table(package)}\n")
    for entry in _methods(package):
        made.append(folder / f"{entry.kind}.md")
        made[-1].write_text(page(passes.resolve(entry.kind)))
    return made


def _methods(package: str) -> list[Entry]:
    """Those of one package; a neighbor that happens to be installed is no part of the pages."""
    found = (e for e in catalogue().entries if e.role == "method")
    return sorted((e for e in found if e.package.partition(" ")[0] == package), key=lambda e: e.kind)


def _row(entry: Entry) -> str:
    word, when, condition = str(entry.contract or "").partition(" when ")
    word = word.partition("(")[0].lower()
    function = _FIDELITY.get(word, word) + when + condition.partition(", else ")[0]
    cells = [f"`{entry.kind}`", entry.summary, function, str(entry.paper or "folklore")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    package = ""
    if arguments[0] == "--of":
        _, package, *arguments = arguments
    folder, *texts = arguments
    made = write(Path(folder), package)
    for name in texts:
        path = Path(name)
        path.write_text(with_table(path.read_text()))
    print(f"{len(made)} pages in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
