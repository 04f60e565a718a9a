"""Run the console script as `python -m loraplex`, also in a folder that has a package named `app`."""

import sys

from loraplex.cli import main

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # Python puts the working directory first, where it would hide the packages of the service.
        del sys.path[0]
    main()
