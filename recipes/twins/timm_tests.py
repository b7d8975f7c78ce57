"""timm's own model tests, on the twin of one architecture per family.

    python recipes/twins/timm_tests.py PATH/TO/pytorch-image-models/tests/test_models.py [pytest options]

Wherever the tests ask timm for model names, they get the twins of the representatives among them, so that timm's own
lists of nets that a test does not apply to hold for the twins. Writes the outcomes to timm_tests.json.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import timm

import timm_batchout  # noqa: F401
from timm_batchout.provenance import environment, write_atomically

HERE = Path(__file__).parent
list_models = timm.list_models


def representatives() -> set[str]:
    sys.path.insert(0, str(HERE))
    import coverage

    known = json.loads((HERE / 'coverage.json').read_text())['architectures']
    return set(coverage.representatives(known).values())


def list_twins(*args: Any, **kwargs: Any) -> list[str]:
    names = [name for name in list_models(*args, **kwargs) if name.partition('.')[0] in REPRESENTATIVES]
    first_tags = {name.partition('.')[0]: name for name in reversed(names)}  # one tag each: the nets are the same
    return [f'batchout_{name}' for name in sorted(first_tags.values())]


class Outcomes:
    """Counts per test function; reasons where a test did not pass."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.others: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != 'call' and report.passed:
            return
        test = report.nodeid.partition('::')[2]
        self.counts[test.partition('[')[0]][report.outcome] += 1
        if not report.passed:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext.splitlines()[-1]
            self.others[test] = reason


if __name__ == '__main__':
    REPRESENTATIVES = representatives()
    timm.list_models = list_twins
    tests, *options = sys.argv[1:]
    outcomes = Outcomes()
    status = pytest.main([tests, '-p', 'no:cacheprovider', f'--rootdir={Path(tests).parent}', *options], [outcomes])
    report = {
        'options': options,
        'outcomes': {test: dict(counts) for test, counts in sorted(outcomes.counts.items())},
        'not_passed': dict(sorted(outcomes.others.items())),
        'environment': environment(),
    }
    write_atomically(HERE / 'timm_tests.json', json.dumps(report, indent=1) + '\n')
    sys.exit(status)
