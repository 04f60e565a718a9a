#!/bin/sh
# wrk is the one thing that make bench needs from the machine. Installed where that is plain to do, else asked for.
set -eu
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  apt-get install -y -qq wrk >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq wrk >/dev/null; }
  exit
fi
echo "make bench needs wrk, the load generator: install it (Debian and Ubuntu: sudo apt-get install wrk; macOS: brew install wrk)." >&2
exit 1
