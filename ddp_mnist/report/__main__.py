"""The command that draws runs and compares them: `python -m ddp_mnist.report RUN_DIR ...`."""

import sys

from ddp_mnist.report.page import main

if __name__ == "__main__":
    sys.exit(main())
