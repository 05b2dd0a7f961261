"""`python -m services.decode`: one decode worker process."""

import sys

from services.decode.worker import main

if __name__ == "__main__":
    sys.exit(main())
