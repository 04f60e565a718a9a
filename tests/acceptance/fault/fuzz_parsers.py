"""Coverage-guided fuzzing of one parser: `python -m tests.acceptance.fault.fuzz_parsers TARGET RUNS SEED FOLDER`.

The process ends with a status other than 0 at the first input that is a defect, and leaves that input in FOLDER.
"""

import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["adapters", "app"]):
    from tests.acceptance.fault.parser_targets import TARGETS, run


def main() -> None:
    """See above."""
    name, runs, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    target = TARGETS[name]
    for number, example in enumerate(target.examples):
        (corpus / f"example-{number}").write_bytes(example)
    # libFuzzer takes a seed of 0 for none.
    options = [f"-runs={runs}", f"-seed={seed % 2**31 or 1}", "-max_len=2048", "-timeout=30", "-rss_limit_mb=3000"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], lambda data: run(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
