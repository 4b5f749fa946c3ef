"""The program `tpllm`: one file for each command, and what they share.

`program` reads the command line, `options` makes flags of settings, `sources` collects settings
from flags, environment and file.
"""

from tpllm.cli.program import main

__all__ = ["main"]
