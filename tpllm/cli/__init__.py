"""The program `tpllm`: one file for each command, and modules that they share.

`program` reads the command line, `options` turns settings into flags, `sources` collects settings
from flags, environment and file.
"""

from tpllm.cli.program import main

__all__ = ["main"]
