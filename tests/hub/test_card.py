"""Cards and the gallery, from made-up reports: what they say, and what a browser shows."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from timm_batchout.hub.card import Entry, eval_results, make_card, summary
from timm_batchout.hub.gallery import write_gallery
from timm_batchout.robustness import Report
from timm_batchout.robustness.report import Score

SITE = Path(__file__).parents[2] / 'hub_cards'


def report(model='net', clean=80, masked=False):
    scores = [
        Score('clean', '', '', None, clean, 100),
        Score('fgsm', '2/255', 'Linf', 2 / 255, 50, 100, masked=masked),
        Score('fgsm', '8/255', 'Linf', 8 / 255, 20, 100, masked=masked),
        Score('pgd', '8/255', 'Linf', 8 / 255, 10, 50, masked=masked),
        Score('autoattack', '8/255 after apgd-ce', 'Linf', None, 2, 50),
        Score('autoattack', '8/255', 'Linf', 8 / 255, 1, 50),
        Score('deepfool', '4 iterations', 'L2', None, 30, 100, 0.2, 0.3),
        Score('deepfool', '5 iterations', 'L2', None, 20, 100, 0.25, 0.3),
    ]
    reasons = ['3% of the images have zero gradients'] if masked else []
    audit = {
        'n': 80, 'radius': 8 / 255, 'steps': 20, 'logit_std': 4.0, 'zero_gradients': 0.03 * masked,
        'pgd': {'cross-entropy': 0.1}, 'unbounded': {'cross-entropy': 0.0}, 'suspicions': reasons,
        'verdict': 'LIKELY: 3% of the images have zero gradients.' if masked else 'no sign of it.',
    }  # fmt: skip
    return Report(
        model=model, data='CIFAR-10 (JPEG q75 copy)', n=100, batch_size=50, seed=0,
        indices='the first n of torch.randperm(100), seed 0',
        weights_sha256='0' * 64, preprocessing={'mean': [0.0], 'std': [1.0], 'input_size': [3, 32, 32]},
        settings={'pgd': {'steps': 20}}, scores=scores, audit=audit, environment={'torch': '2.15'},
    )  # fmt: skip


def entry(**changes):
    recipe = {'model': 'batchout_cifar_vgg', 'data': {'val_fraction': 0.1, 'root': ''}, 'objective': {'name': 'plain'}}
    known = {
        'name': 'net', 'repo': 'me/net', 'architecture': 'batchout_cifar_vgg', 'report': report(), 'sha256': 'ab' * 32,
        'config': {'architecture': 'batchout_cifar_vgg'}, 'run': {'recipe': recipe, 'seed': 1},
    }  # fmt: skip
    return Entry(**{**known, **changes})


def test_the_card_is_valid_and_tells_the_truth():
    card = make_card(entry(twin=report('plain', clean=90, masked=True)))
    again = ModelCard(card.content)
    assert again.data.library_name == 'timm' and again.data.datasets == ['uoft-cs/cifar10']
    assert {'timm', 'batchout'} <= set(again.data.tags)
    name, results = model_index_to_eval_results(again.data.to_dict()['model-index'])
    assert name == 'net' and len(results) == len(eval_results(report())) == 7
    values = {result.metric_name: result.metric_value for result in results}
    assert values['AutoAttack Linf 8/255'] == 2.0 and values['Accuracy'] == 80.0
    assert len({(r.metric_type, r.metric_config) for r in results}) == 7, 'eps in the fields keeps them apart'
    assert not any(result.verified for result in results)
    text = card.text
    lead = text.split('\n\n')[1]
    assert lead.startswith('**Accuracy: 2.0% under AutoAttack Linf 8/255 (n = 50); 80.0% clean. Gradient masking: no')
    assert '| FGSM Linf 8/255 | 100 | **20.00** | 20.00 (masked) |' in text, 'masked figures are never best'
    assert 'JPEG compression' in text and 'ab' * 32 in text and 'val_fraction: 0.1' in text
    assert "timm.create_model('hf-hub:me/net', pretrained=True)" in text
    assert "root: ''" not in text


def test_masked_figures_say_so_in_the_metadata():
    masked = report(masked=True)
    names = [result.metric_name for result in eval_results(masked)]
    assert 'PGD Linf 8/255 (masked: overstated)' in names and 'AutoAttack Linf 8/255' in names
    assert 'LIKELY' in summary(masked)
    masked.audit = None
    assert summary(masked).endswith('not checked.')
    masked.scores = masked.scores[:1]
    assert 'Not attacked' in summary(masked)


def test_the_gallery(tmp_path):
    for name, clean, masked in (('b', 80, False), ('a', 90, True)):
        (tmp_path / name).mkdir()
        results = {'repo': f'me/{name}', 'report': report(name, clean, masked).to_dict()}
        (tmp_path / name / 'results.json').write_text(json.dumps(results))
    write_gallery(tmp_path)
    table = (tmp_path / 'README.md').read_text()
    # Clean, AutoAttack, PGD, then FGSM at two radii.
    assert '| [a](a/README.md) | **90.00** | **2.00** | 20.00 (masked) | 50.00 (masked) | 20.00 (masked) |' in table
    assert '| [b](b/README.md) | 80.00 | **2.00** | **20.00** | **50.00** | **20.00** |' in table
    page = (tmp_path / 'index.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', page), 'self-contained'

    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('no Chromium here')
    # A click on "clean" puts the best first, a second one last.
    click = """<script>
    const head = document.querySelectorAll('th')[1], names = () => [...document.querySelectorAll('tbody tr')]
        .map(row => row.cells[0].textContent).join('');
    const seen = [names()];
    for (let i = 0; i < 2; i++) { head.click(); seen.push(names() + ' ' + head.getAttribute('aria-sort')); }
    document.body.innerHTML = 'SEEN ' + seen.join(', ') + ' END';
    </script></body>"""
    (tmp_path / 'clicked.html').write_text(page.replace('</body>', click))
    dom = subprocess.run(
        [chromium, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom',
         (tmp_path / 'clicked.html').as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert 'SEEN ab, ab descending, ba ascending END' in dom


@pytest.mark.skipif(not list(SITE.glob('*/results.json')), reason='no cards are staged in this checkout')
def test_the_cards_in_the_repository_are_those_of_the_bundled_weights(tmp_path):
    """Made by publish --all from the reports and weights that are here."""
    from timm_batchout.zoo.weights import bundled_cards

    for name, card in bundled_cards().items():
        results = json.loads((SITE / name / 'results.json').read_text())
        assert results['sha256'] == card['sha256'] == json.loads((SITE / name / 'config.json').read_text())['sha256']
        assert results['run'] == card
        reported = json.loads((SITE.parent / 'recipes' / 'paper' / 'reports' / f'{name}.json').read_text())
        assert results['report'] == reported
        clean = next(score for score in reported['scores'] if score['attack'] == 'clean')
        assert clean['correct'] == card['test']['clean']['correct']
    shutil.copytree(SITE, tmp_path / 'cards')
    write_gallery(tmp_path / 'cards')
    for name in ('README.md', 'index.html'):
        assert (tmp_path / 'cards' / name).read_text() == (SITE / name).read_text()
