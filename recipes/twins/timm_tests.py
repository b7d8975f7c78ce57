"""timm's own model tests, on the twin of one architecture per family; those that do not pass also on the plain net.

    python recipes/twins/timm_tests.py PATH/TO/pytorch-image-models/tests/test_models.py [pytest options]

Wherever the tests ask timm for model names, they get the twins of the representatives among them, so that timm's own
lists of nets that a test does not apply to hold for the twins. Writes the outcomes to timm_tests.json.
"""

import json
import multiprocessing
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm

import timm_batchout  # noqa: F401
from timm_batchout.provenance import environment, write_atomically

HERE = Path(__file__).parent
TWIN = 'batchout_'


def representatives() -> set[str]:
    sys.path.insert(0, str(HERE))
    import survey

    known = json.loads((HERE / 'survey.json').read_text())['architectures']
    return set(survey.representatives(known).values())


class Outcomes:
    """Outcome and reason by test, e.g. 'test_model_forward[1-batchout_resnet18]'."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != 'call' and report.passed:
            return
        reason = ''
        if not report.passed:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext.splitlines()[-1]
        self.of[report.nodeid.partition('::')[2]] = (report.outcome, reason)


def run(archs: set[str], prefix: str, tests: str, options: list[str]) -> dict[str, tuple[str, str]]:
    """The outcomes for these architectures, their names with a prefix. Once per process: pytest imports tests once."""
    list_models = timm.list_models

    def chosen(*args: Any, **kwargs: Any) -> list[str]:
        names = [name for name in list_models(*args, **kwargs) if name.partition('.')[0] in archs]
        first_tags = {name.partition('.')[0]: name for name in reversed(names)}  # one tag each: the nets are the same
        return [prefix + name for name in sorted(first_tags.values())]

    timm.list_models = chosen
    outcomes = Outcomes()
    pytest.main([tests, '-p', 'no:cacheprovider', f'--rootdir={Path(tests).parent}', *options], [outcomes])
    return outcomes.of


def main(tests: str, options: list[str]) -> int:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), max_tasks_per_child=1)
    archs = representatives()
    twins = pool.submit(run, archs, TWIN, tests, options).result()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test, (outcome, _) in twins.items():
        counts[test.partition('[')[0]][outcome] += 1
    others = {test: reason for test, (outcome, reason) in twins.items() if outcome != 'passed'}
    again = {arch for arch in archs if any(f'-{TWIN}{arch}{end}' in test for test in others for end in '].')}
    plain = pool.submit(run, again, '', tests, options).result()
    report = {
        'options': options,
        'outcomes': {test: dict(count) for test, count in sorted(counts.items())},
        'not_passed': {
            test: {'reason': reason, 'plain net': plain.get(test.replace(TWIN, ''), ('not run', ''))[0]}
            for test, reason in sorted(others.items())
        },
        'environment': environment(),
    }
    write_atomically(HERE / 'timm_tests.json', json.dumps(report, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1], sys.argv[2:]))
