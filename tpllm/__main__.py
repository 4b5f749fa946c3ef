"""`python -m tpllm` runs the program `tpllm`."""

import sys

from tpllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
