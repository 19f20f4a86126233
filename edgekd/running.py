"""A run on the terminal: the stages, then the summary and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekd.errors import EXIT_GATE, UsageError

if TYPE_CHECKING:
    from edgekd.recipe import Recipe


def run_and_show(recipe: Recipe, folder: Path, last: str, *, as_json: bool = False) -> None:
    """All stages up to `last`, those that are up to date left out; what came out; leaves with the code of the
    verdict where there is one."""
    from edgekd.console import Console
    from edgekd.pipeline import run_pipeline

    with Console() as console:
        if recipe.teacher.source == "demo":
            console.say("built-in demonstration: Fashion-MNIST images and a teacher trained on them "
                        "(--teacher and --data use your own)")  # fmt: skip
        console.say(f"target {recipe.target}, run folder {folder}")
        record = run_pipeline(recipe, folder, console, last)
    if not record:  # one of several processes: the first reports
        return
    from edgekd.report import print_summary

    print_summary(record, console.console, folder / "report.html")
    if as_json:
        click.echo(json.dumps(record, default=str))
    if last in ("gate", "bundle"):
        raise SystemExit(EXIT_GATE[record["verdict"]])


def continue_run(folder: Path, last: str, *, as_json: bool = False) -> None:
    """A run goes on by the recipe that it was started with.

    Raises:
        UsageError: the folder is not that of a run.
    """
    from edgekd.recipe import load_recipe

    recipe = folder / "recipe.toml"
    if not recipe.is_file():
        raise UsageError(
            f"{folder} is not the folder of a run: it has no recipe.toml",
            f"give one such as runs/jetson, or files: edgekd {last} --help",
        )
    run_and_show(load_recipe(recipe, {}), folder, last, as_json=as_json)
