"""Commands about training-free scores: which there are, and what they say of given students."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import click

from edgekd.errors import UsageError


@click.group()
def proxies() -> None:
    """Training-free scores of untrained students."""


@proxies.command("list")
@click.option("--json", "as_json", is_flag=True)
def proxies_list(as_json: bool) -> None:
    """All scores; `+` adds them as ranks: --set search.score=nwot+synflow. Example: edgekd proxies list"""
    from edgekd.proxies import proxy_class, proxy_names

    classes = {name: proxy_class(name) for name in sorted(proxy_names())}
    modules = [made_by.__module__ for made_by in classes.values()]
    rows: list[dict[str, Any]] = []
    for name, made_by in classes.items():
        source = _first(inspect.getmodule(made_by))
        if modules.count(made_by.__module__) > 1:
            source = f"{source} {_first(made_by)}"
        rows.append({"name": name, "needs": list(made_by.needs), "source": source})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']:11} needs: {', '.join(row['needs']) or 'nothing more':36} {row['source']}")


def _first(documented: object) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


@proxies.command("score")
@click.option("--student", "students", multiple=True, help="package.module:factory or a 2-student.json.")
@click.option("--genome", "genomes", multiple=True, metavar="0,1,…", help="Of that json's space, or --space.")
@click.option("--space", help="Space of the genomes.  [default: mobile-cnn]")
@click.option("--proxy", "names", multiple=True, required=True, help="A name of `edgekd proxies list`.")
@click.option("--teacher", help="As of `edgekd compress`.")
@click.option("--weights", help="The teacher's: .safetensors, or a plain .pt state dict.")
@click.option("--teacher-state", type=click.Choice(["trained", "random"]), help="Its weights while scoring.")
@click.option("--data", help="Image folder, .npz file, or a `datasets` folder saved to disk.")
@click.option("--target", help="Device whose latency is predicted.  [default: jetson]")
@click.option("--seed", type=int, help="Of the batch and of the students' weights.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="TOML file (docs/recipe.md).")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers on stdout as JSON.")
def proxies_score(as_json: bool, **given: Any) -> None:
    """What scores say of students, beside their parameters, MACs and predicted latency.

    Several students are ranked too: the rank sum is 1 for one that is the best by every score.

    \b
    Example: edgekd proxies score --proxy nwot --proxy synflow --student runs/jetson/2-student.json
             edgekd proxies score --proxy diswot --teacher my.models:build --weights t.safetensors \\
               --data images/ --student my.models:small --student my.models:large
    """
    from edgekd.recipe import load_recipe, parse_override
    from edgekd.stages.scores import score_students

    keys = {
        "teacher": "teacher.source", "weights": "teacher.weights", "teacher_state": "search.teacher_state",
        "data": "data.source", "space": "search.space", "target": "target", "seed": "seed",
    }  # fmt: skip
    overrides = {key: given[name] for name, key in keys.items() if given[name] is not None}
    recipe = load_recipe(given["recipe_file"], overrides | dict(map(parse_override, given["settings"])))
    score = "+".join(given["names"])
    found = score_students(recipe, score, given["students"], [_genome(text) for text in given["genomes"]])
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print(found)


def _genome(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--genome {text}: expected whole numbers such as 0,1,2") from error


def _print(found: dict[str, Any]) -> None:
    """One line a student, and what the numbers rest on."""
    rows = found["students"]
    terms = list(dict.fromkeys(term for row in rows for term in row["terms"]))
    head = ["student", "parameters", "MMACs", "latency ms", *terms]
    table = [head + ["rank sum"] * (len(rows) > 1)]
    for row in rows:
        latency = "—" if row["latency_ms"] is None else f"{row['latency_ms']:.4f}"
        cells = [row["student"], f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}", latency]
        cells += [_number(row["terms"].get(term)) for term in terms]
        table.append(cells + [_number(row["rank_sum"])] * (len(rows) > 1))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        left, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join([left.strip().ljust(widths[0]), *others]))
    error = found["latency"]["error_percent"]
    doubt = "" if error is None else f", ±{error:.0f} %"
    teacher = f", {found['teacher_state']} teacher {found['teacher']}" if found["teacher"] else ""
    click.echo(
        f"{found['images']} images, seed {found['seed']}{teacher}; latency predicted for "
        f"{found['latency']['device']} ({found['latency']['kind']}{doubt}); higher scores are better",
        err=True,
    )


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.5g}"
