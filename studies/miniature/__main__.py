"""`python -m studies.miniature [TABLE ...]`: train and measure what has no result yet, then write the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.miniature import page
from studies.miniature.material import Material
from studies.miniature.runs import TABLES, execute, runs_of


def main() -> None:
    known = sorted(path.stem for path in TABLES.glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m studies.miniature", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(known)}; all by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="what is made and measured")
    parser.add_argument("--page", action="store_true", help="write the report from the committed results, no more")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tables if name not in known]:
        parser.error(f"there is no table {unknown[0]}; choose from {', '.join(known)}")
    if not arguments.page:
        try:
            Material(arguments.folder).require_same_recipes()
        except ValueError as error:
            parser.error(str(error))
        tables = arguments.tables or known
        runs = [run for name in tables for run in runs_of(name)]
        # So that an unfinished study has all arms of some seeds.
        execute(sorted(runs, key=lambda run: run.seed), arguments.folder)
        page.collect(arguments.folder, tables)
    page.draw_all()
    page.write()


if __name__ == "__main__":
    main()
