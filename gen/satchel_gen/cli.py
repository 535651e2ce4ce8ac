"""satchel-gen: generate the package, check it, list what is defined, explain how a rule came about."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table

from .calculus.terms import CalculusError
from .definitions import DefinitionError, Definitions, load
from .emit import package as emitted
from .explain import explain as explanation
from .lowering.support import support

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Layers, losses and features from mathematics to PyTorch and Triton.",
)
console = Console()

Out = Annotated[Path, typer.Option(help="Folder that the package is written to.")]
Package = Annotated[str, typer.Option(help="Import name of the package.")]
Only = Annotated[str, typer.Option(help="Comma-separated layers and losses; all by default. Features are always all.")]


def _definitions(only: str = "") -> Definitions:
    try:
        return load().only({name.strip() for name in only.split(",") if name.strip()})
    except DefinitionError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    console.print(f"[bold red]error[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def _render(definitions: Definitions, package: str) -> dict[str, str]:
    steps = len(emitted.tasks(definitions, package))
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=steps)

            def show(name: str) -> None:
                progress.update(bar, description=name, advance=1)

            return emitted.render(definitions, package, show)
    except (CalculusError, DefinitionError) as error:
        _fail(str(error))


@app.command()
def generate(out: Out = Path("generated"), package: Package = "satchel", only: Only = "") -> None:
    """Write the package. Files whose content stays the same are left alone."""
    if not package.isidentifier():
        _fail(f"{package!r} is no import name")
    files = _render(_definitions(only), package)
    changed, stale = emitted.write(files, out / package)
    for name in changed:
        console.print(f"[green]wrote[/]   {out / package / name}")
    for name in stale:
        console.print(f"[yellow]removed[/] {out / package / name}")
    console.print(f"{len(files)} files, {len(changed)} changed, {len(stale)} removed")


@app.command()
def check(out: Out = Path("generated"), package: Package = "satchel", only: Only = "") -> None:
    """Fail, with the difference, if the package is not what the definitions say."""
    found = list(emitted.differences(_render(_definitions(only), package), out / package))
    for diff in found:
        console.print(Syntax(diff, "diff", background_color="default"))
    if found:
        _fail(f"{len(found)} files in {out / package} are stale: run `make generate`")
    console.print(f"{out / package} is up to date")


@app.command(name="list")
def list_(only: Only = "", markdown: Annotated[bool, typer.Option(help="As a Markdown table.")] = False) -> None:
    """Definitions × features × backends, from what was derived."""
    definitions = _definitions(only)
    features = [feature.name for feature in definitions.features]
    rows = support(definitions)
    cells = [
        [
            row.name,
            row.kind,
            *("✓" if row.features[name] is None else "–" for name in features),
            "✓",
            f"{row.kernels} of {row.rules} rules",
        ]
        for row in rows
    ]
    header = ["definition", "kind", *features, "aten", "triton kernels"]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]
        sys.stdout.write("\n".join(lines) + "\n")
        return
    table = Table(*header)
    for line in cells:
        table.add_row(*line)
    console.print(table)
    for row in rows:
        for name, reason in row.features.items():
            if reason is not None:
                console.print(f"{row.name}, {name}: {reason}")


@app.command()
def explain(
    layer: str,
    feature: Annotated[str, typer.Argument()] = "",
    sizes: Annotated[str, typer.Option(help='Extents, as "V=10 N=128 R=1 O=256 I=784": traffic in bytes.')] = "",
) -> None:
    """The way from a layer's definition to the emitted functions, for one feature or all, with launches and traffic."""
    if not re.fullmatch(r"(\s*\w+=\d+\s*)*", sizes):
        _fail(f"sizes {sizes!r} are not of the form 'V=10 N=128'")
    known = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", sizes)}
    try:
        for part in explanation(_definitions(), layer, feature, known):
            if part.code:
                console.print(Syntax(part.text, "python", background_color="default", word_wrap=True))
            else:
                console.print(
                    part.text, style="bold" if part.heading else None, highlight=False, markup=False, soft_wrap=True
                )
    except DefinitionError as error:
        _fail(str(error))


@app.command()
def kernels(out: Out = Path("generated"), package: Package = "satchel") -> None:
    """Registers, shared memory and spills of every Triton kernel on every target; fails where one spills."""
    from .emit.compile import show  # Triton is needed by this command alone

    if not show(out / package, console):
        _fail("registers spill")
