"""`python -m moejax`; see `moejax.cli`."""

import sys

from moejax.cli import main

sys.exit(main())
