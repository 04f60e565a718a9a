"""`python -m loraplex` is the console script, also in a folder that has an `app` of its own."""

import sys

from loraplex.cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python put the working directory first, where it would shadow the service's packages.
        del sys.path[0]
    main()
