"""`python -m services.prefill`: one prefill worker process."""

import sys

from services.prefill.worker import main

if __name__ == "__main__":
    sys.exit(main())
