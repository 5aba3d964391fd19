"""The ``mtl-lora`` command's door: where the library alone is installed, it says what the command needs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run :func:`jobs.cli.main`, or name the missing package and the remedy."""
    try:
        from jobs.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("jobs", "pipeline", "mtl_lora"):
            raise
        sys.stderr.write(
            f"error: the mtl-lora command needs the pipeline's packages, and {error.name} is not installed; "
            "run: pip install 'mtl-lora[pipeline]'\n"
        )
        sys.exit(1)
    command()


if __name__ == "__main__":
    main()
