"""The command line: `vlmpack pack`, `train-demo` and more. Imports neither torch nor numba before it must."""

import sys


def main() -> None:
    """Run the command that the process's arguments name.

    Raises:
        SystemExit: Always; 0 if all went well, 1 for a failure, 2 for wrong settings.
        ModuleNotFoundError: If a module is missing that the extra `cli` does not bring.
    """
    try:
        from vlmpack.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"rich", "typer"}:
            raise
        sys.stderr.write(f"the command line needs {missing}: pip install 'vlmpack[cli]'\n")
        raise SystemExit(1) from None
    app(prog_name="vlmpack")


__all__ = ["main"]
