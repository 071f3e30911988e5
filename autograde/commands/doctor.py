"""`course doctor`: says what is missing on this machine and how to mend it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autograde.course import find
from autograde.doctor import Finding, examine
from autograde.machine import gather

_WORDS = {"ok": "[green]ok[/green]", "optional": "[yellow]optional[/yellow]", "missing": "[red]missing[/red]"}


def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Look at this machine; exit code 1 when something is missing that the course needs."""
    findings = examine(gather(find()))
    if json_output:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        show(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def show(findings: Sequence[Finding]) -> None:
    """Print a row a check, then each command that mends something."""
    table = Table(box=box.SIMPLE, show_header=False)
    for finding in findings:
        table.add_row(finding.name, _WORDS[finding.state], escape(finding.found))
    Console(highlight=False).print(table)
    for finding in findings:
        if finding.mend:
            typer.echo(f"To mend {finding.name}:\n  {finding.mend}")
