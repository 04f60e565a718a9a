"""A disk that fails: a library that lets system calls on chosen files fail, in a process that preloads it.

The library is compiled from the C below. It intercepts what SQLite on Linux calls, and reads which calls fail from the
file that `FAILING_DISK` names, so that a test can change this while the process runs.
"""

import os
import subprocess
from pathlib import Path

from tests.support.external_programs import program

SYNC, TRUNCATE, WRITE = "sync", "truncate", "write"
STOP = -1
"""In place of an errno: the process is stopped in the call (SIGSTOP)."""
_ALWAYS = 10**6
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static ino_t rule_inode;
static int calls;

/* The errno with which this call is to fail, or 0. A rule is "CALL SUFFIX ERRNO FIRST COUNT". */
static int fault(const char *call, int fd) {
    const char *rules = getenv("FAILING_DISK");
    struct stat status;
    char text[256] = "", link[64], path[4096], rule_call[32], suffix[128];
    int number, first, count, rule_fd;
    if (!rules || stat(rules, &status)) return 0;
    rule_fd = open(rules, O_RDONLY);
    if (rule_fd < 0) return 0;
    if (read(rule_fd, text, sizeof text - 1) < 0) text[0] = 0;
    close(rule_fd);
    if (sscanf(text, "%31s %127s %d %d %d", rule_call, suffix, &number, &first, &count) != 5) return 0;
    if (strcmp(rule_call, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    size_t tail = strlen(suffix);
    if (strcmp(suffix, "*") && ((size_t)length < tail || strcmp(path + length - tail, suffix))) return 0;
    if (status.st_ino != rule_inode) { rule_inode = status.st_ino; calls = 0; }
    calls++;
    return calls >= first && calls < first + count ? number : 0;
}

#define INTERCEPT(result, name, call, parameters, arguments) \
    result name parameters { \
        static result (*real) parameters; \
        int number = fault(call, fd); \
        if (number < 0) { raise(SIGSTOP); number = 0; } \
        if (number) { errno = number; return -1; } \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        return real arguments; \
    }

INTERCEPT(int, fsync, "sync", (int fd), (fd))
INTERCEPT(int, fdatasync, "sync", (int fd), (fd))
INTERCEPT(int, ftruncate, "truncate", (int fd, off_t size), (fd, size))
INTERCEPT(int, ftruncate64, "truncate", (int fd, off64_t size), (fd, size))
INTERCEPT(ssize_t, pwrite, "write", (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
INTERCEPT(ssize_t, pwrite64, "write", (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
"""


class FailingDisk:
    """The compiled library, and the rule that it follows. Skips the test if there is no compiler."""

    def __init__(self, folder: Path) -> None:
        source, self._library, self._rule = folder / "failing.c", folder / "failing.so", folder / "rule"
        source.write_text(_SOURCE)
        compiler = program("gcc", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", self._library, source, "-ldl"], check=True)

    def environment(self) -> dict[str, str]:
        """For a process whose disk is to fail."""
        return {"LD_PRELOAD": str(self._library), "FAILING_DISK": str(self._rule)}

    def fail(self, call: str, *, file: str, error: int, first: int = 1, count: int = _ALWAYS) -> None:
        """Let a call on files whose path ends in `file` (`*`: on all) fail, from the `first` one on."""
        new = self._rule.with_suffix(".new")
        new.write_text(f"{call} {file} {error} {first} {count}")
        os.replace(new, self._rule)  # another inode: the library counts from 0 again

    def heal(self) -> None:
        """Let all calls succeed from now on."""
        self._rule.unlink(missing_ok=True)
