"""What is staged in hub_cards/ before anything is pushed: whose words it keeps, and what it does not tell."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.functional import to_pil_image

import timm_batchout
from timm_batchout.cli.main import main
from timm_batchout.hub.card import OWN_SECTION
from timm_batchout.hub.privacy import publishable, redacted
from timm_batchout.hub.publish import bundled, publish, stage
from timm_batchout.robustness.report import Report
from timm_batchout.zoo.pretrained import FOLDER

BASELINE = 'mnist_cnn.baseline_mnist'


def staged_baseline(cards, **changes):
    file, run = bundled(BASELINE)
    report = Report.load(FOLDER / f'{BASELINE}.json')
    return stage(
        'mnist_cnn', **{'weights': file, 'report': report, 'run': run, 'cards': cards, 'repo': 'me/net', **changes}
    )


def staged_net(tmp_path, name, run, images=None, labels=None, **model_args):
    model = timm.create_model(name, **model_args).eval()
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    images = torch.rand(4, *model.pretrained_cfg['input_size']) if images is None else images
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    report = timm_batchout.evaluate(model, images, labels, ['fgsm'], data='my animals')
    staged = stage(
        name, tmp_path / 'weights.safetensors', report, run, tmp_path / 'cards', 'me/net', model_args=model_args
    )
    return report, json.loads((staged.folder / 'config.json').read_text()), (staged.folder / 'README.md').read_text()


def test_what_is_staged_tells_nothing_of_this_machine(tmp_path):
    """Neither where its files lay, nor what else lies in the folder of the card."""
    _, run = bundled(BASELINE)
    recipe = {
        **run['recipe'],
        'data': {**run['recipe']['data'], 'root': str(tmp_path / 'data')},
        'output': str(tmp_path / 'runs' / 'x'),
        'model_args': {'features': [str(tmp_path / 'pretrained.safetensors')], 'drop_rate': 0.5},
    }
    report = Report.load(FOLDER / f'{BASELINE}.json')
    report.model = str(tmp_path / 'runs' / 'x' / 'model.safetensors')
    twin = Report.load(FOLDER / 'mnist_cnn.fgsm_at_mnist.json')
    twin.model = str(tmp_path / 'runs' / 'y' / 'model.safetensors')
    staged = staged_baseline(tmp_path / 'cards', report=report, run={**run, 'recipe': recipe}, twin=twin)
    (staged.folder / '.env').write_text('HF_TOKEN=hf_mine')
    (staged.folder / 'notes.md').write_text('mine')
    assert list(staged.files()) == ['README.md', 'config.json', 'results.json', 'curves.svg', 'model.safetensors']
    for name in ('README.md', 'config.json', 'results.json', 'curves.svg'):
        text = staged.files()[name].read_text()
        assert str(tmp_path) not in text and '/home' not in text and 'pretrained.safetensors' not in text, name
    assert 'drop_rate: 0.5' in (staged.folder / 'README.md').read_text()
    assert recipe['data']['root'] and report.model.startswith('/'), 'the caller keeps what it had'

    report.scores = [score for score in report.scores if score.attack == 'clean']
    assert 'curves.svg' not in staged_baseline(tmp_path / 'cards', report=report).files(), 'of an earlier report'


@pytest.mark.parametrize(
    'secret',
    [
        '/home/alice/secret', 'hfds//home/alice/secret', '~/secret/x', 'file:///secret', 's3://bucket/x?key=secret',
        'C:\\Users\\secret', 'data/secret', '../secret', 'https://alice:secret@host/x', '${HOME}/secret',
    ],
)  # fmt: skip
def test_places_and_secrets_do_not_go_up(secret):
    recipe = {
        'model': secret, 'output': secret, 'trackers': [secret], 'model_args': {'file': secret, secret: 1, 'k': 0.3},
        'data': {'name': 'timm', 'root': secret, 'dataset': secret, 'options': {'token': secret, 'n': 3}},
        'unknown': secret, 'seed': 3,
    }  # fmt: skip
    kept = publishable(
        {'recipe': recipe, 'where': secret, 'seed': 3, 'data': 'MNIST', 'metrics': {'x': 0.5, secret: 1}}
    )
    assert 'secret' not in json.dumps(kept)
    assert kept['recipe']['model_args'] == {'file': '', 'k': 0.3} and kept['recipe']['seed'] == kept['seed'] == 3
    assert kept['recipe']['data']['options'] == {'token': '', 'n': 3} and kept['metrics'] == {'x': 0.5}


def test_datasets_of_the_hub_keep_their_name():
    for name in ('hfds/uoft-cs/cifar10', 'wds/shards', 'torch/cifar100'):
        assert publishable({'recipe': {'data': {'dataset': name}}})['recipe']['data']['dataset'] == name


def test_a_token_that_a_server_echoes_is_not_shown():
    told = redacted("401 for url x: headers {'authorization': 'Bearer hf_abcdefghijklmn'}, hf_abcdefghijklmn")
    assert 'hf_abc' not in told and told.count('[token]') == 2


def test_words_of_people_are_kept_and_edits_elsewhere_are_not_overwritten(tmp_path):
    card = staged_baseline(tmp_path).folder / 'README.md'
    first = card.read_text()
    mine = first.replace(OWN_SECTION[0], f'{OWN_SECTION[0]}\n\nTrained on a *boat*.')
    card.write_text(mine)
    staged_baseline(tmp_path)
    assert card.read_text() == mine
    card.write_text(mine.replace('## Robustness', '## Robustness, as I see it'))
    results = (card.parent / 'results.json').read_bytes()
    with pytest.raises(ValueError, match='was edited outside its hand-written section'):
        staged_baseline(tmp_path)
    assert 'as I see it' in card.read_text() and (card.parent / 'results.json').read_bytes() == results
    card.unlink()
    staged_baseline(tmp_path)
    assert card.read_text() == first


def test_labels_are_those_of_the_data_that_trained_it(tmp_path):
    names = ['ant', 'bee', 'cat', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibis', 'jay']
    _, config, _ = staged_net(tmp_path, 'batchout_cifar_vgg', {'class_names': names})
    assert config['label_names'] == names and 'label_names' not in config['pretrained_cfg']
    for run in ({}, {'class_names': names[:9]}):
        _, config, _ = staged_net(tmp_path, 'batchout_cifar_vgg', run)
        assert 'label_names' not in config and 'label_names' not in config['pretrained_cfg'], "not CIFAR-10's"


def test_the_report_comes_back_with_timms_own_transform_of_the_published_config(tmp_path):
    """Nets of timm's crop; what was evaluated whole must be published whole."""
    images = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    name, args = 'test_resnet', {'num_classes': 3}
    labels = torch.randint(3, (40,))
    report, config, _ = staged_net(tmp_path, name, {}, images, labels, **args)
    cfg = config['pretrained_cfg']
    assert timm.create_model(name).pretrained_cfg['crop_pct'] < 1 == cfg['crop_pct']
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg))
    model = timm.create_model(name, checkpoint_path=str(tmp_path / 'weights.safetensors'), **args).eval()
    with torch.no_grad():
        logits = model(torch.stack([transform(to_pil_image(image)) for image in images]))
    assert int((logits.argmax(1) == labels).sum()) == report.score('clean').correct


@pytest.mark.parametrize(
    ('name', 'license', 'stated', 'head'),
    [
        (
            'batchout_mobileone_s0',
            '',
            'mobileone-license',
            'license: other\nlicense_name: mobileone-license\nlicense_link: ',
        ),
        ('batchout_test_resnet', '', 'apache-2.0', 'license: apache-2.0\n'),
        ('batchout_test_resnet', 'mit', 'mit', 'license: mit\n'),
    ],
)
def test_card_and_config_state_one_licence_that_the_hub_takes(tmp_path, name, license, stated, head):
    model = timm.create_model(name, num_classes=3).eval()
    report = timm_batchout.evaluate(model, torch.rand(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64), ['fgsm'])
    publish('me/net', model, report, cards=tmp_path, license=license, dry_run=True)
    folder = tmp_path / 'net'
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['license'] == stated
    assert head in (folder / 'README.md').read_text()


def test_a_net_without_a_licence_in_timm_does_not_become_apache(tmp_path):
    model = timm.create_model('test_resnet', num_classes=3).eval()
    model.pretrained_cfg.pop('license')
    report = timm_batchout.evaluate(model, torch.rand(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64), ['fgsm'])
    publish('me/net', model, report, cards=tmp_path, dry_run=True)
    assert 'license: unknown\n' in (tmp_path / 'net' / 'README.md').read_text()
    with pytest.raises(ValueError, match='has no architecture'):
        publish('me/net', torch.nn.Linear(3, 3), report, cards=tmp_path, dry_run=True)


def test_markup_in_names_stays_text(tmp_path):
    report = Report.load(FOLDER / f'{BASELINE}.json')
    report.data = 'MNIST <script>alert(1)</script> | x `y`'
    text = (staged_baseline(tmp_path, report=report).folder / 'README.md').read_text()
    body = text.split('---', 2)[2]
    assert '<script>' not in body and '&lt;script&gt;alert(1)&lt;/script&gt; &#124; x' in body
    rows = [line for line in body.splitlines() if line.startswith('| clean') or line.startswith('| MNIST')]
    assert {line.count('|') for line in rows} == {4}


def test_links_are_replaced_and_files_are_not_taken_for_folders(tmp_path, capsys):
    target = tmp_path / 'target'
    target.write_text('mine')
    folder = tmp_path / 'cards' / 'net'
    folder.mkdir(parents=True)
    for name in ('config.json', 'results.json', 'curves.svg'):
        (folder / name).symlink_to(target)
    staged_baseline(tmp_path / 'cards')
    assert target.read_text() == 'mine' and not any(path.is_symlink() for path in folder.iterdir())
    arguments = [BASELINE, '--report', str(FOLDER / f'{BASELINE}.json'), '--cards', str(tmp_path), '--dry-run']
    assert main(['publish', *arguments, '--repo', 'me/target']) == 2
    assert 'is a file in the place of the card of me/target' in capsys.readouterr().err


def test_a_picture_of_examples_is_shown_and_taken_away_again(tmp_path):
    picture = tmp_path / 'grid.png'
    picture.write_bytes(b'a picture')
    staged = staged_baseline(tmp_path / 'cards', examples=picture)
    assert '](examples.png)' in (staged.folder / 'README.md').read_text()
    assert staged.files()['examples.png'].read_bytes() == b'a picture'
    again = staged_baseline(tmp_path / 'cards')
    assert 'examples.png' not in (again.folder / 'README.md').read_text() and 'examples.png' not in again.files()
    for wrong in (tmp_path / 'missing.png', FOLDER / f'{BASELINE}.json'):
        with pytest.raises(ValueError, match=r'is not a \.png file'):
            staged_baseline(tmp_path / 'new', examples=wrong)
    assert not (tmp_path / 'new').exists()
