"""How every job in ``jobs/`` is run: settings from the command line, errors for people, an exit status."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from passreid_ray.config import SectionT, describe, load_config
from passreid_ray.errors import UserError

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


def run_job(
    config_cls: type[SectionT],
    run: Callable[[SectionT], Any],
    summary: str | None,
    arguments: Sequence[str] | None = None,
    *,
    presets: Path | None = None,
    default_preset: str | None = None,
) -> None:
    """Build the settings from ``arguments`` (default: the command line) and call ``run``; exits not 0 on failure.

    Without a preset among the arguments ``default_preset`` is used, or the defaults of ``config_cls``. A ``UserError``
    is printed as its one line, without a traceback.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    presets = Path(sys.argv[0]).resolve().parent / "presets" if presets is None else presets
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if {"-h", "--help"} & set(arguments):
            print_help(config_cls, summary or "", presets, default_preset)
            return
        run(load_config(config_cls, arguments, presets=presets, default_preset=default_preset))
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        console.print("stopped. The same command goes on from the last checkpoint.", style="yellow")
        sys.exit(EXIT_INTERRUPTED)


def print_help(config_cls: type[SectionT], summary: str, presets: Path, default_preset: str | None) -> None:
    """Print what the job does, its presets and every setting with default and meaning."""
    console = Console(highlight=False, soft_wrap=True)
    job = Path(sys.argv[0]).name
    console.print(summary.strip(), markup=False)
    console.print(f"\nusage: python jobs/{job} [preset.toml] [section.key=value ...]\n", markup=False)
    names = sorted(file.stem for file in presets.glob(f"{Path(job).stem}_*.toml"))
    if names:
        console.print(f"presets: {', '.join(names)}", markup=False)
    console.print(f"without a preset: {default_preset or 'the defaults below'}\n", markup=False)
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for key, default, meaning in describe(config_cls):
        table.add_row(key, default, meaning)
    console.print(table, markup=False)
