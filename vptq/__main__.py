"""`python -m vptq` is `vptq`."""

import sys

from vptq.cli.main import main

sys.exit(main())
