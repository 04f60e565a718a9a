"""Every parser either reads what it is given or refuses it with an error of ours.

`FAULT_INPUTS` is how many inputs each parser gets.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.fault.parser_targets import TARGETS, run
from tests.support.deadlines import scaled
from tests.support.external_programs import skip_or_fail
from tests.support.fault_results import chosen_count, chosen_seed, recorded

pytestmark = pytest.mark.slow

INPUTS = chosen_count("FAULT_INPUTS", 2000)
_SHORT = ("PEFT tensors",)
"""What the short form fuzzes; it gives every parser its examples cut and changed."""
_DONE = re.compile(r"Done (\d+) runs")


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_reads_or_refuses_its_examples_with_any_byte_changed_or_cut_off(name: str) -> None:
    target = TARGETS[name]
    for example in target.examples:
        for position in range(0, len(example), max(len(example) // 60, 1)):
            run(target, example[:position])
            for mask in (1, 0x80, 0xFF):
                run(target, example[:position] + bytes([example[position] ^ mask]) + example[position + 1 :])


@pytest.mark.timeout(scaled(300 + INPUTS // 20))
@pytest.mark.parametrize("name", TARGETS if INPUTS > 2000 else _SHORT)
def test_a_parser_reads_or_refuses_any_bytes(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        skip_or_fail("atheris is not installed")
    seed = chosen_seed()
    with recorded(f"fuzzing: {name}", seed) as counts:
        arguments = [sys.executable, "-m", "tests.acceptance.fault.fuzz_parsers", name, str(INPUTS), str(seed)]
        ended = subprocess.run([*arguments, str(tmp_path / "found")], check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        done = _DONE.search(ended.stderr)
        assert done is not None, ended.stderr[-3000:]
        counts["inputs"] = int(done[1])
