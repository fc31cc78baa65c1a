"""`python -m memseq` is the same as the `memseq` command."""

import sys

from memseq.cli import main

if __name__ == "__main__":
    sys.exit(main())
