"""docs/keys.md, a page of every key: `python -m trainer.keys FILE` writes it from the configuration."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.command_line import GROUPS, _parser

HEAD = """\
# Every key

A key is a flag of `train.py` (`--batch-size 64`) and a line of a recipe
(`batch-size: 64`); flags win. Lists are written `a,b` on the command line, and
`null` unsets a key. `python train.py ... --print-config` shows the outcome.

This page is made from the configuration by `python -m trainer.keys`.
"""


def page() -> str:
    """Markdown: a table of keys for each group of `train.py --help`."""
    parts = [HEAD]
    for group in _parser()._action_groups:
        if group.title in GROUPS.values():
            lines = ["| key | what it is |", "| --- | --- |"]
            for action in group._group_actions:
                text = str(action.help).replace("%%", "%").replace("|", "\\|")
                lines.append(f"| `{action.option_strings[0][2:]}` | {text} |")
            parts.append(f"## {str(group.title).capitalize()}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
