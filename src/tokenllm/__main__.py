"""`python -m tokenllm` is `tokenllm`."""

import sys

from tokenllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
