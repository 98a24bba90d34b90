"""How every job in ``jobs/`` is run: settings from the command line, errors for people, an exit status."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from passreid_ray.config import Section, SectionT, describe, load_config
from passreid_ray.engines.terminated import Terminated, terminated_by_sigterm
from passreid_ray.errors import UserError

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
PIPED_WIDTH = 120
SETTING_WIDTH = 36
DEFAULT_WIDTH = 22
REQUIRED = "must be given"
VALUES = """
Values are written as in TOML: 3, 1e-4, true, [256, 128]; text needs no quotes. A setting whose default is none, or that
says so, takes the word none. Later wins: default below, preset, command line. What a job used is
written into its output.
"""

# Jobs connect to Ray themselves. Where Ray may, a thread of Ray Tune that outlives Ctrl-C for a moment starts another
# cluster. Ray reads this when it is imported: jobs import this module first.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def run_job(
    config_cls: type[SectionT],
    run: Callable[[SectionT], Any],
    summary: str | None,
    arguments: Sequence[str] | None = None,
    *,
    presets: Path | None = None,
    default_preset: str | None = None,
    preset_prefix: str | None = None,
) -> None:
    """Build the settings from ``arguments`` (default: the command line) and call ``run``; exits not 0 on failure.

    ``preset_prefix``: what the names of its presets begin with, where that is not the name of the job.
    Without a preset among the arguments ``default_preset`` is used, or the defaults of ``config_cls``. A ``UserError``
    is printed as its one line, without a traceback; so is a file that cannot be read or written.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    presets = Path(sys.argv[0]).resolve().parent / "presets" if presets is None else presets
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if {"-h", "--help"} & set(arguments):
            print_help(config_cls, summary or "", presets, default_preset, preset_prefix)
            return
        with terminated_by_sigterm():
            run(load_config(config_cls, arguments, presets=presets, default_preset=default_preset))
    except UserError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        console.print(f"error: {error.filename}: {error.strerror}", style="bold red", markup=False)
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        console.print("stopped by SIGTERM. The same command goes on from what was saved.", style="yellow")
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt:
        console.print("stopped. The same command goes on from what was saved.", style="yellow")
        sys.exit(EXIT_INTERRUPTED)


def print_help(
    config_cls: type[Section], summary: str, presets: Path, default_preset: str | None, preset_prefix: str | None = None
) -> None:
    """Print what the job does, how it is called, its presets and every setting with default and meaning."""
    terminal = Console(highlight=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, width=PIPED_WIDTH)
    job = Path(sys.argv[0]).name
    names = sorted(file.stem for file in presets.glob(f"{preset_prefix or Path(job).stem}_*.toml"))
    console.print(summary.strip(), markup=False)
    console.print(f"\nusage: python jobs/{job} [PRESET] [section.key=value ...]\n", markup=False)
    if names:
        console.print(f"PRESET is a TOML file or one of: {', '.join(names)}.", markup=False)
        console.print(f"Without one: {default_preset or 'the defaults below'}.", markup=False)
    console.print(VALUES, markup=False)
    for section in describe(config_cls):
        if section.name:
            title = Text.assemble((section.name, "bold"), f"  {section.meaning}")
            console.print()
            console.print(title)
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(width=SETTING_WIDTH, overflow="fold")
        table.add_column(width=DEFAULT_WIDTH, overflow="fold", style="cyan")
        table.add_column(ratio=1)
        for setting in section.settings:
            table.add_row(Text(f"  {setting.key}"), Text(setting.default or REQUIRED), Text(setting.meaning))
        console.print(table)
