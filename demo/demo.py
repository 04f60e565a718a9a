"""Run the demo on real digits: `make demo`, or `.venv/bin/python demo/demo.py`.

The steps are in `demo/story.py`; this file makes them runnable by its path.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # For a script, Python looks for modules in the script's own folder; `demo` is found from the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from demo.story import main

    sys.exit(main())
