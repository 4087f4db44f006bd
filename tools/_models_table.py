"""The tables of docs/models.md, made from the families in the code: print them, or write them into the document."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fqvit_plugin.blocks.family import short_name
from fqvit_plugin.blocks.refused import CONVOLUTIONAL, REFUSED
from fqvit_plugin.surgery import FAMILIES

DOCUMENT = Path(__file__).resolve().parents[1] / 'docs' / 'models.md'


def covered_table() -> str:
    """A row per family: its models, where they come from, what is covered of them and what refused."""
    rows = []
    for family in FAMILIES:
        names = ', '.join(f'`{short_name(path)}`' for path in family.models)
        packages = ', '.join(dict.fromkeys(path.partition('.')[0] for path in family.models))
        rows.append(f'| {names} | {packages} | {family.covers} | {family.refuses} |')
    return '\n'.join(['| model | of | covers | refuses |', '|---|---|---|---|', *rows])


def refused_table() -> str:
    """A row per reason, and one for all convolutional networks."""
    by_reason = sorted((reason, name) for name, reason in REFUSED.items())
    rows = []
    for reason, pairs in groupby(by_reason, key=lambda pair: pair[0]):
        rows.append((', '.join(f'`{name}`' for _, name in pairs), reason))
    rows.sort(key=lambda row: row[0].lower())
    rows.append((', '.join(f'`{name}`' for name in sorted(CONVOLUTIONAL)), 'convolutional networks'))
    return '\n'.join(['| backbone | why |', '|---|---|', *(f'| {names} | {why} |' for names, why in rows)])


TABLES = {'covered': covered_table, 'refused': refused_table}


def with_tables(text: str) -> str:
    """``text`` with the tables of today between their marks.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in TABLES.items():
        begin, end = f'<!-- table: {name} -->\n', f'\n<!-- end: {name} -->'
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f'the document lacks {begin.strip()} or {end.strip()}')
        text = before + begin + table() + end + after
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--write', action='store_true', help='write the tables into the document')
    parser.add_argument('--check', action='store_true', help='exit with 1 if the document has other tables')
    parser.add_argument('--document', type=Path, default=DOCUMENT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the document as it should be, or write it; 1 if ``--check`` finds it different."""
    args = parse_args(argv)
    old = args.document.read_text(encoding='utf-8')
    new = with_tables(old)
    if args.write:
        args.document.write_text(new, encoding='utf-8')
    elif not args.check:
        print(new)
    if args.check and new != old:
        print(f'{args.document} has other tables than the code: run python tools/_models_table.py --write')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
