"""A run's record as one self-contained HTML file, as Markdown for CI, and as tables in a terminal."""

from __future__ import annotations

from pathlib import Path

from edgekd.files import write_text
from edgekd.report.comparison import comparison_markdown, comparison_page
from edgekd.report.facts import Record
from edgekd.report.file_page import file_page
from edgekd.report.html import page
from edgekd.report.text import markdown, print_summary

__all__ = [
    "comparison_markdown",
    "comparison_page",
    "file_page",
    "html_report",
    "markdown_report",
    "print_summary",
    "write_reports",
]


def html_report(record: Record) -> str:
    """One offline HTML file with every chart, and the record itself embedded as JSON."""
    return page(record)


def markdown_report(record: Record) -> str:
    """A short Markdown summary: verdict, accuracy ladder, runtimes, checks."""
    return markdown(record)


def write_reports(record: Record, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a folder and return their paths.

    Raises:
        StorageError: the folder cannot be written.
    """
    html_path, markdown_path = folder / "report.html", folder / "report.md"
    write_text(html_path, html_report(record))
    write_text(markdown_path, markdown_report(record))
    return html_path, markdown_path
