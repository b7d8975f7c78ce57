"""The documentation site: it builds without a broken link, and its examples run."""

import os
import re
import subprocess
import sys
from pathlib import Path

from timm_batchout.robustness.report import Report

ROOT = Path(__file__).parents[1]
PAGES = ROOT / '.docs' / 'pages'


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--config-file', ROOT / '.docs' / 'mkdocs.yml']
    environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
    done = subprocess.run([*command, '--site-dir', tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    method = (tmp_path / 'method.html').read_text()
    assert 'x_j + eta * (x_r - x_j)' in method and 'Share of the mini-batch to augment' in method
    assert (tmp_path / 'files' / 'recipes' / 'paper' / 'fig2.svg').is_file()
    for page in tmp_path.glob('*.html'):
        assert '--8&lt;--' not in page.read_text(), f'{page.name} was not included'


def test_the_examples_run(tmp_path):
    pages = [(PAGES / name).read_text() for name in ('method.md', 'reports.md')]
    code = '\n'.join(block for page in pages for block in re.findall(r'```python\n(.*?)```', page, re.S))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert code and done.returncode == 0, done.stderr
    assert Report.load(tmp_path / 'report.json').score('pgd', '0.2').n == 60
