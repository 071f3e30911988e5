"""The command `course`: assembles the commands, and turns a `CourseError` into one line and exit code 1."""

import importlib
import signal
import sys

import typer

from autograde.errors import CourseError

# name -> group in --help. Each lives in autograde/commands/<name>.py as a function of that name, and is imported
# only when it runs: `course progress` need not wait for nbgrader.
_COMMANDS = {
    "lab": "Learner",
    "check": "Learner",
    "progress": "Learner",
    "reset": "Learner",
    "doctor": "Learner",
    "build": "Author",
    "run": "Author",
    "prove": "Author",
    "lint": "Author",
    "grade": "Instructor",
}
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Work, check, prove and grade the notebooks of the path.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _register(only: str | None) -> None:
    for name, panel in _COMMANDS.items():
        if only in (None, name):
            module = importlib.import_module(f"autograde.commands.{name}")
            settings = _PASS_THROUGH if name == "lab" else None
            command = getattr(module, "Command", None)
            app.command(name, cls=command, rich_help_panel=panel, context_settings=settings)(getattr(module, name))


def main() -> None:
    """Entry point of the `course` command."""
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    _register(asked if asked in _COMMANDS else None)
    app.callback()(_group)  # keeps `course NAME` a subcommand even when one alone is registered
    # What schedulers, containers and `timeout` send ends a command as Ctrl-C does: with its kernels, not before them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except CourseError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        sys.exit(1)


def _group() -> None:
    pass


if __name__ == "__main__":
    main()
