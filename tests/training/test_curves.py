"""Runs side by side: the table says what metrics.jsonl holds, and the figure is drawn."""

import json

import pytest
from PIL import Image

from timm_batchout.cli.main import main

PLAIN = [{'epoch': 1, 'train_loss': 2.0}, {'epoch': 2, 'train_loss': 1.0, 'val_loss': 1.1, 'val_accuracy': 0.5}]
ROBUST = [
    {'epoch': i, 'train_loss': 3.0 / i, 'val_loss': 1.0, 'val_accuracy': clean, 'val_robust_accuracy': robust}
    for i, (clean, robust) in enumerate([(0.6, 0.3), (0.7, 0.4), (0.8, 0.35)], 1)
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, records in (('plain', PLAIN), ('robust', ROBUST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return ['plain', 'robust/']


def test_the_best_epoch_is_that_of_the_robust_accuracy(folders, capsys):
    assert main(['compare', *folders, '--figure', 'curves.png']) == 0
    _, _, plain, robust = capsys.readouterr().out.splitlines()
    assert plain == '| plain | 2 | 1.000 | 50.00 |  | 2 | 50.00 |  |'
    assert robust == '| robust | 3 | 1.000 | 80.00 | 35.00 | 2 | 70.00 | 40.00 |'
    with Image.open('curves.png') as image:
        assert image.width > 1200, 'a panel for robust accuracy'
    assert main(['compare', 'plain', '--figure', 'one.png']) == 0
    with Image.open('one.png') as image:
        assert image.width < 1000


def test_what_is_not_a_run(folders, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'report.json').write_text('{}')
    (tmp_path / 'torn').mkdir()
    (tmp_path / 'torn' / 'metrics.jsonl').write_text('{"epoch": 1, ')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'metrics.jsonl').write_text('{"epoch": 1}\n')
    for arguments, message in (
        (['empty'], "'empty' is not a run folder"),
        (['torn'], 'is damaged'),
        (['other'], 'does not contain the metrics of a run'),
        (['plain', 'report.json'], 'either reports or run folders'),
        (['plain', '--csv'], '--csv is for reports'),
    ):
        assert main(['compare', *arguments]) == 2
        assert message in capsys.readouterr().err
