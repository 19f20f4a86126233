"""The command ``edgekd embed``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

_LANGUAGES = ("cpp", "c", "web", "python", "docker")  # the keys of LANGUAGES, which is slow to import


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--lang", required=True, type=click.Choice(_LANGUAGES), help="Language and engine.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="A new or an empty folder for the project."
)
@click.option("--variant", help="A variant's id.  [default: the first that fits]")
@click.option("--json", "as_json", is_flag=True, help="Print folder, variant and engine on stdout as JSON.")
def embed(bundle: Path, lang: str, out: Path, variant: str | None, as_json: bool) -> None:
    """Write a small program around a bundle that builds, runs and checks itself.

    \b
    cpp     C++17 and CMake with OpenVINO, from its Python wheel
    c       C and CMake with ONNX Runtime's shared library
    web     a page with onnxruntime-web: picture or camera
    python  an HTTP service with numpy and one engine
    docker  the same service with a Dockerfile
    Example: edgekd embed runs/x86/6-bundle --lang cpp --out my-app
    """
    from edgekd.embed.project import write_project

    project = write_project(bundle, lang, out, variant)
    if as_json:
        row = {"folder": str(project.folder), "variant": project.variant, "engine": project.engine}
        click.echo(json.dumps(row))
        return
    click.echo(f"{project.folder}: variant {project.variant} with {project.engine}; README.md says more")
    for command in (f"cd {shlex.quote(str(project.folder))}", *project.commands):
        click.echo(f"  {command}")
