"""Cards and the gallery, from made-up reports: what they say, and what a browser shows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from timm_batchout.cli.main import main
from timm_batchout.hub.card import Entry, eval_results, make_card, summary
from timm_batchout.hub.leaderboard import write_gallery
from timm_batchout.robustness.attacks import ATTACKS
from timm_batchout.robustness.masking import judge
from timm_batchout.robustness.plots import draw_curves
from timm_batchout.robustness.report import Audit, Report, Score
from timm_batchout.robustness.tables import compare
from timm_batchout.zoo.pretrained import bundled_cards

SITE = Path(__file__).parents[2] / 'hub_cards'
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def report(model='net', clean=80, masked=False):
    scores = [
        Score('clean', clean, 100),
        Score('fgsm', 50, 100, 'Linf', 2 / 255, masked=masked),
        Score('fgsm', 20, 100, 'Linf', 8 / 255, masked=masked),
        Score('pgd', 10, 50, 'Linf', 8 / 255, masked=masked),
        Score('autoattack', 2, 50, 'Linf', 8 / 255, stage='apgd-ce'),
        Score('autoattack', 1, 50, 'Linf', 8 / 255),
        Score('deepfool', 30, 100, 'L2', iteration=4, median_distance=0.2, mean_distance=0.3),
        Score('deepfool', 20, 100, 'L2', iteration=5, median_distance=0.25, mean_distance=0.3),
    ]
    reasons = ['6% of the images have zero gradients'] if masked else []
    audit = Audit(
        n=80, radius=8 / 255, steps=20, logit_std=4.0, zero_gradients=0.06 * masked, queries=500, left=30, taken=1,
        pgd={'cross-entropy': 0.1}, unbounded={'cross-entropy': 0.0}, suspicions=reasons,
        verdict='LIKELY: 6% of the images have zero gradients.' if masked else 'no sign of it.',
    )  # fmt: skip
    return Report(
        model=model, data='CIFAR-10', n=100, batch_size=50, seed=0,
        indices='the first n of torch.randperm(100), seed 0',
        weights_sha256='0' * 64, preprocessing={'mean': [0.0], 'std': [1.0], 'input_size': [3, 32, 32]},
        settings={'pgd': {'steps': 20, 'eps': ['2/255', '8/255'], 'n': 50}}, scores=scores, audit=audit,
        environment={'torch': '2.15'},
    )  # fmt: skip


RECIPE = {
    'model': 'batchout_cifar_vgg', 'model_args': {}, 'data': {'val_fraction': 0.0, 'root': '', 'download': False},
    'objective': {'name': 'plain', 'epsilon': 0.0}, 'seed': 0, 'clip_grad': 0.0, 'precision': 'no', 'trackers': [],
}  # fmt: skip


def entry(batchout=True, recipe=RECIPE, **changes):
    name = 'batchout_cifar_vgg' if batchout else 'cifar_vgg'
    known = {
        'name': 'net', 'repo': 'me/net', 'report': report(), 'sha256': 'ab' * 32,
        'config': {'architecture': name, 'trained_with': name}, 'run': {'recipe': recipe, 'seed': 1},
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
    pgd = next(result for result in results if result.metric_name == 'PGD Linf 8/255')
    assert pgd.metric_args == {'steps': 20, 'eps': '8/255', 'n': 50, 'norm': 'Linf'}, "not the settings' list of eps"
    assert not any(result.verified for result in results)
    text = card.text
    lead = text.split('\n\n')[1]
    assert lead.startswith('**Accuracy: 2.0% under AutoAttack Linf 8/255 (n = 50); 80.0% clean. Gradient masking: no')
    assert text.count('no sign of it.') == 1, 'the verdict stands once'
    assert '| FGSM Linf 8/255 | 100 | 20.00 (13.3 to 28.9) | 20.00 (13.3 to 28.9) (masked) |' in text, (
        'masked figures are never best, nor beaten'
    )
    assert 'ab' * 32 in text
    assert "timm.create_model('hf-hub:me/net', pretrained=True)" in text
    assert 'pgd: {"steps": 20, "eps": ["2/255", "8/255"], "n": 50}\n' in text


def test_the_printed_recipe_is_the_recipe():
    text = make_card(entry()).text
    assert yaml.safe_load(text.partition('```yaml\n')[2].partition('```')[0]) == RECIPE


def test_what_is_said_of_the_method():
    def card(recipe=RECIPE, **changes):
        return make_card(entry(recipe=recipe, **changes)).text

    assert 'BatchOut: in training, features of the first half of each mini-batch were pushed' in card()
    noise = card({**RECIPE, 'model_args': {'noise': 'gaussian', 'k': 0.25}})
    assert (
        'Gaussian feature noise' in noise
        and 'of 25% of each mini-batch' in noise
        and 'BatchOut: in training' not in noise
    )
    both = card({**RECIPE, 'objective': {'name': 'fgsm', 'epsilon': 0.1}})
    assert (
        'BatchOut: in training' in both
        and 'together with FGSM adversarial training' in both
        and 'training epsilon Linf 0.1' in both
    )
    pgd = card({**RECIPE, 'objective': {'name': 'pgd', 'epsilon': 0.35, 'norm': 'Linf', 'steps': 5}}, batchout=False)
    assert 'Method: PGD adversarial training (Madry et al., 2018), 5 steps for each mini-batch (training' in pgd
    plain = card(batchout=False)
    assert 'Method: plain training.' in plain and 'BatchOut adds no parameters' not in plain
    assert 'BatchOut adds no parameters' in card()
    assert 'batchout' not in make_card(entry(batchout=False)).data.tags
    # A backbone of timm's: its recipe may be lost, but its config knows, and timm alone checks no hashes.
    config = {'architecture': 'resnet18', 'trained_with': 'batchout_resnet18', 'pretrained_cfg': {'license': 'mit'}}
    stock = make_card(entry(config=config, run={}))
    assert 'BatchOut: in training' in stock.text and 'timm-batchout is not needed' in stock.text
    assert 'the package checks it' in card() and 'the package checks it' not in stock.text
    assert (stock.data.license, make_card(entry()).data.license) == ('mit', 'unknown')


def test_cards_say_whether_plain_timm_knows_the_architecture():
    names = {name.partition('.')[0] for name in bundled_cards()} | {'resnet18'}
    code = 'import timm, sys; print(*filter(timm.is_model, sys.argv[1:]))'
    known = subprocess.run([sys.executable, '-c', code, *names], capture_output=True, text=True, check=True).stdout
    assert known.split() == ['resnet18']
    for name in names:
        text = make_card(entry(config={'architecture': name, 'trained_with': name})).text
        assert ('timm-batchout is not needed' in text) == (name == 'resnet18')
        assert ('import timm, timm_batchout' in text) == (name != 'resnet18')


def test_a_card_shows_only_what_its_own_model_was_measured_on():
    twin = report('plain', clean=90)
    twin.scores.append(Score('fgsm', 5, 100, norm='Linf', radius=0.5))
    assert 'FGSM Linf 0.5' not in make_card(entry(twin=twin)).text
    assert 'FGSM Linf 0.5' in compare([report(), twin])


def test_without_a_twin_nothing_is_best():
    text = make_card(entry()).text
    assert '| AutoAttack Linf 8/255 | 50 | 2.00 (0.4 to 10.5) |' in text and 'Bold' not in text
    assert text.count('no sign of it.') == 1


def test_images_of_different_nets_are_not_compared():
    ours, theirs = report(), report('plain')
    for one, source in ((ours, 'a' * 64), (theirs, 'b' * 64)):
        one.scores.append(Score('transfer', 30 + 30 * (one is ours), 100, 'Linf', 8 / 255))
        one.settings['transfer'] = {'steps': 20, 'source_sha256': source}
    text = make_card(entry(report=ours, twin=theirs, nets={'a' * 64: 'plain'})).text
    assert '| 100 | 60.00 (50.2 to 69.1) | 30.00 (21.9 to 39.6) |' in text, 'in bold neither'
    assert 'this model were crafted on `plain`, ' in text and 'crafted on weights with the hash bbbbbbbbbbbb...' in text
    theirs.settings['transfer']['source_sha256'] = 'a' * 64
    assert '| **60.00** | 30.00 |' in compare([ours, theirs])


def test_stages_of_autoattack_that_tell_nothing_new_are_left_out():
    one, other = report(), report()
    assert '| AutoAttack Linf 8/255 after apgd-ce | 50 | 4.00 |' in compare([one])
    one.score('autoattack', '8/255', stage='apgd-ce').correct = 1
    assert 'apgd-ce' not in compare([one])
    assert 'apgd-ce' in compare([one, other]), 'it tells something of the other'
    one.scores.append(Score('deepfool', 60, 100, 'L2', iteration=1))
    assert '| DeepFool L2 1 iteration |' in compare([one])


def test_curves_in_rows_of_three(tmp_path):
    one = report()
    for attack in ('fgsm', 'pgd', 'pgd_l2', 'noise'):
        norm = ATTACKS[attack].norm
        one.scores += [Score(attack, 30, 100, norm, radius, masked=attack == 'pgd') for radius in (0.1, 0.2)]
    draw_curves([one, report('twin')], tmp_path / 'curves.svg')
    svg = (tmp_path / 'curves.svg').read_text()
    assert len(re.findall(r'id="axes_\d+"', svg)) == 6
    texts = re.findall(r'<!-- (.*?) -->', svg)
    assert {
        'AutoAttack Linf',
        'PGD Linf',
        'PGD L2',
        '2/255',
        '8/255',
        'twin',
        'net',
        'dashed: gradients masked, overstated',
    } <= set(texts)
    width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
    assert 1 < width / height < 3, 'six panels in two rows'


def test_masked_figures_say_so_in_the_metadata():
    masked = report(masked=True)
    names = [result.metric_name for result in eval_results(masked)]
    assert 'PGD Linf 8/255 (masked: overstated)' in names and 'AutoAttack Linf 8/255' in names
    assert 'LIKELY' in summary(masked)
    masked.audit = None
    assert summary(masked).endswith('not checked.')
    masked.scores = masked.scores[:1]
    assert 'Not attacked' in summary(masked)


@pytest.fixture
def gallery(tmp_path):
    for name, clean, masked in (('b', 80, False), ('a', 90, True)):
        (tmp_path / name).mkdir()
        made_up = report(name, clean, masked)
        made_up.scores.append(Score('noise', 60, 100, '', 8 / 255))
        made_up.score('fgsm', '8/255').correct = 0
        (tmp_path / name / 'results.json').write_text(json.dumps({'repo': f'me/{name}', 'report': made_up.to_dict()}))
    write_gallery(tmp_path)
    return tmp_path


@pytest.fixture
def browse(tmp_path):
    """What a script sees of a page in headless Chromium: the text that it puts into ``seen``."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f'no browser here ({", ".join(BROWSERS)})')

    def browse(page, script, width=1280):
        ending = (
            f"<script>const seen = [];{script};document.body.innerHTML = 'SEEN ' + seen.join(', ') + ' END';</script>"
        )
        (tmp_path / 'scripted.html').write_text(page.read_text().replace('</body>', f'{ending}</body>'))
        dom = subprocess.run(
            [browser, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-sync',
             '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
             f'--user-data-dir={tmp_path / "profile"}', f'--window-size={width},900', '--dump-dom',
             (tmp_path / 'scripted.html').as_uri()],
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        return re.search('SEEN (.*) END', dom)[1]

    return browse


# Clicks on the first table's column "clean" twice; the order of the names, and of what the column says.
CLICKS = """
const head = document.querySelectorAll('th')[2], rows = () => [...document.querySelector('tbody').rows];
const names = () => rows().map(row => row.cells[0].textContent).join(' ');
seen.push(names());
for (let i = 0; i < 2; i++) { head.click(); seen.push(names() + ' ' + head.getAttribute('aria-sort')); }
"""


def test_the_gallery(gallery):
    table = (gallery / 'README.md').read_text()
    heads = 'clean<br>n = 100 | AutoAttack Linf<br>8/255<br>n = 50 | PGD Linf<br>8/255<br>n = 50 | FGSM Linf<br>2/255'
    assert heads in table and 'noise' not in table
    assert '| [a](a/README.md) | **90.00** | 2.00 | 20.00 (masked) | 50.00 (masked) | 0.00 (masked) |' in table
    assert '| [b](b/README.md) | 80.00 | 2.00 | 20.00 | 50.00 | 0.00 |' in table, 'none to compare with'
    assert_self_contained((gallery / 'index.html').read_text())


def test_nothing_right_is_nothing_checked(tmp_path):
    hopeless = report()
    hopeless.audit = judge(Audit(n=0))
    (tmp_path / 'net').mkdir()
    (tmp_path / 'net' / 'results.json').write_text(json.dumps({'repo': 'me/net', 'report': hopeless.to_dict()}))
    write_gallery(tmp_path)
    assert (tmp_path / 'README.md').read_text().endswith('| not checked |\n')
    assert 'too few images to tell' in make_card(entry(report=hopeless)).text


def assert_self_contained(page):
    """Nothing from elsewhere: its own folder has all that it shows."""
    links = re.findall(r'(?:src|href)="([^"#][^"]*)"', page)
    assert links and all(re.fullmatch(r'[\w.-]+/(?:curves\.svg|README\.md)', link) for link in links)
    assert '@import' not in page and 'url(' not in page


def test_the_gallery_sorts_in_a_browser(gallery, browse):
    assert browse(gallery / 'index.html', CLICKS) == 'a b, a b descending, b a ascending'


@pytest.mark.parametrize('width', [400, 1280])
def test_the_page_in_the_repository_in_a_browser(browse, width):
    """The strongest attack, clean accuracy and masking are seen without scrolling; the rest folds out."""
    script = """
    const sheet = document.querySelector('table'), seen_heads = () => [...sheet.tHead.rows[0].cells]
      .filter(cell => cell.offsetParent).length;
    seen.push(document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'overflows', innerWidth, seen_heads());
    document.querySelector('input').click(); seen.push(seen_heads());
    location.hash = '#' + document.querySelector('details').id; dispatchEvent(new HashChangeEvent('hashchange'));
    seen.push(document.querySelectorAll('details[open]').length);
    """
    page = SITE / 'index.html'
    text = page.read_text()
    assert_self_contained(text)
    assert len(text) < 300_000 and text.count('<img') == len(bundled_cards())
    assert all((SITE / path).is_file() for path in re.findall(r'src="([^"]+)"', text))
    *orders, fits, inner, heads, all_heads, opened = browse(page, CLICKS + script, width).split(', ')
    assert fits == 'fits' and int(inner) <= max(width, 500) and int(heads) <= 5 < int(all_heads) and opened == '1'
    names = orders[0].split()
    accuracy = {
        name: Report.from_dict(json.loads((SITE / name / 'results.json').read_text())['report']).score('clean').accuracy
        for name in names
    }
    best_first = sorted(names, key=accuracy.__getitem__, reverse=True)
    assert orders[1:] == [' '.join([*best_first, 'descending']), ' '.join([*best_first[::-1], 'ascending'])]


def test_the_cards_in_the_repository_are_those_of_the_bundled_weights(tmp_path, monkeypatch):
    """What publish --all makes of the reports and weights that are here, byte for byte; a dry run asks nobody."""

    def refuse(*args):
        raise AssertionError(f'a dry run opened a connection: {args}')

    monkeypatch.setattr('socket.socket.connect', refuse)
    cards = bundled_cards()
    monkeypatch.chdir(SITE.parent)
    assert main(['publish', '--all', '--dry-run', '--cards', str(tmp_path)]) == 0
    assert sorted(path.name for path in SITE.iterdir()) == sorted([*cards, 'README.md', 'index.html'])
    for name, card in cards.items():
        for file in ('README.md', 'config.json', 'results.json'):
            assert (tmp_path / name / file).read_text() == (SITE / name / file).read_text(), (
                'timm-batchout publish --all'
            )
        assert json.loads((SITE / name / 'results.json').read_text())['sha256'] == card['sha256']
        shutil.copy(SITE / name / 'curves.svg', tmp_path / name)  # how it is drawn is matplotlib's affair
    write_gallery(tmp_path)
    for file in ('README.md', 'index.html'):
        assert (tmp_path / file).read_text() == (SITE / file).read_text()


def test_names_with_markup_break_neither_figures_nor_tables(tmp_path):
    odd = [report('a $x_ | b'), report('c $y$')]
    draw_curves(odd, tmp_path / 'curves.svg')
    assert '<!-- a $x_ | b -->' in (tmp_path / 'curves.svg').read_text(), 'drawn as text'
    lines = compare(odd).splitlines()
    assert len({re.sub(r'\\\|', '', line).count('|') for line in lines}) == 1
