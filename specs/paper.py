"""Paper: the citation that every method owes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from. `section` points at the formula that the code follows."""

    title: str
    arxiv: str | None = None
    year: int | None = None
    section: str | None = None
    doi: str | None = None

    @property
    def url(self) -> str | None:
        if self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://doi.org/{self.doi}" if self.doi else None

    def __str__(self) -> str:
        """One line: title, year, arXiv number or DOI, section; `folklore` for what has no paper."""
        number = f"arXiv {self.arxiv}" if self.arxiv else f"doi {self.doi}" if self.doi else None
        year = str(self.year) if self.year else None
        section = f"section {self.section}" if self.section else None
        return ", ".join(part for part in (self.title, year, number, section) if part)


FOLKLORE = Paper("folklore")
"""For what everybody does and nobody published."""
