"""Ray Serve again, with what its documentation calls high throughput: HAProxy in front instead of its own proxy."""

import os

os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"

from benchmarks.servers.ray_serve_base import main

if __name__ == "__main__":
    main()
