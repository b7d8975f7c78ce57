"""Sets read by workers through timm.data: folders, Hugging Face datasets, WebDataset shards of the same digits."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_batchout.cli.main import main
from timm_batchout.data.config import AugmentConfig, DataConfig
from timm_batchout.data.memory import load_data
from timm_batchout.data.timm_splits import TimmSplit
from timm_batchout.data.workers import TimmLoader

CFG = {'input_size': (3, 16, 16), 'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'center'}
AUGMENT = AugmentConfig(hflip=0.5, scale=[0.5, 1.0], color_jitter=0.4, auto_augment='rand-m7-mstd0.5-inc1')
COUNTS = {'train': 80, 'validation': 20}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """root/folder/<split>/<class>/*.png, root/hub (parquet) and root/shards, with the same images of digits 0 to 3."""
    datasets = pytest.importorskip('datasets')
    root = tmp_path_factory.mktemp('digits')
    data = load_digits()
    chosen = np.flatnonzero(data.target < 4)
    start = 0
    info = {}
    (root / 'hub').mkdir()
    (root / 'shards').mkdir()
    for split, count in COUNTS.items():
        rows = {'image': [], 'label': []}
        shards = [tarfile.open(root / 'shards' / f'{split}-{i}.tar', 'w') for i in range(2)]  # noqa: SIM115
        for i in chosen[start : start + count]:
            label = int(data.target[i])
            folder = root / 'folder' / split / f'digit {label}'
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f'{i:04d}.png'
            Image.fromarray((data.images[i] * 15).astype(np.uint8)).convert('RGB').save(path)
            rows['image'].append({'bytes': path.read_bytes(), 'path': path.name})
            rows['label'].append(label)
            for name, content in ((f'{i:04d}.png', path.read_bytes()), (f'{i:04d}.cls', str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shards[len(rows['label']) % 2].addfile(member, io.BytesIO(content))
        for shard in shards:
            shard.close()
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list('0123')))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / 'hub' / f'{split}-00000-of-00001.parquet')
        names = [f'{split}-{i}.tar' for i in range(2)]
        info[split] = {
            'name': split, 'filenames': names, 'shard_lengths': [count // 2] * 2, 'num_samples': count
        }  # fmt: skip
        start += count
    (root / 'shards' / 'info.json').write_text(json.dumps({'splits': info}))
    return root


@pytest.fixture(params=['folder', 'tar', 'hfds', 'wds', 'hfids'])
def config(request, digits, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    source = {
        'folder': {'root': str(digits / 'folder')},
        'tar': {'root': str(tmp_path)},
        'hfds': {'root': str(tmp_path), 'dataset': f'hfds/{digits / "hub"}'},
        'hfids': {'root': str(tmp_path), 'dataset': f'hfids/{digits / "hub"}', 'options': {'download': True}},
        'wds': {'root': str(digits / 'shards'), 'dataset': 'wds/'},
    }[request.param]
    if request.param == 'wds':
        pytest.importorskip('webdataset')
    if request.param == 'tar':
        for split in COUNTS:
            with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
                tar.add(digits / 'folder' / split, '.')
    return DataConfig('timm', val_split='validation', workers=0, **source)


def folder_config(digits, **options):
    return DataConfig('timm', str(digits / 'folder'), **{'val_fraction': 0.25, 'workers': 0, **options})


def loader(split, size=8, **options):
    return TimmLoader(split, size, CFG, classes=4, **options)


def labels(batches):
    return torch.cat([batch[1] for batch in batches])


def test_every_source_gives_the_same_images(config, digits):
    train, val, test = load_data(config)
    assert (len(train), len(val), len(test)) == (80, 20, 20)
    batches = list(loader(test))
    images = torch.cat([batch[0] for batch in batches])
    assert images.shape == (20, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and 0.9 < images.max() <= 1
    assert torch.bincount(labels(batches)).tolist() == [4, 7, 3, 6]
    # Shards and folders differ in order: what is compared is the sum over each class.
    for label in range(4):
        files = (digits / 'folder' / 'validation' / f'digit {label}').iterdir()
        expected = [np.asarray(Image.open(file).resize((16, 16), Image.Resampling.BILINEAR)) / 255 for file in files]
        assert images[labels(batches) == label].sum().item() == pytest.approx(np.sum(expected), rel=1e-5)


def test_training_is_the_same_again_and_goes_on_anywhere(config):
    """Order and augmentations depend on seed and epoch alone; a resumed epoch starts where it was left."""
    train = load_data(config)[0]

    def epoch(number, start=0, **options):
        batches = loader(train, shuffle=True, augment=AUGMENT, **{'seed': 1, **options})
        batches.epoch, batches.start = number, start
        torch.manual_seed(start)  # must not matter
        return list(batches)

    first = epoch(0)
    assert len(first) == 10
    again = epoch(0)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    resumed = epoch(0, start=6)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[6:], resumed, strict=True))
    assert not torch.equal(first[0][0], epoch(1)[0][0])
    assert not torch.equal(first[0][0], epoch(0, seed=2)[0][0])


def test_reading_leaves_the_global_random_state_alone(digits):
    train = load_data(folder_config(digits))[0]
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(train, shuffle=True, augment=AUGMENT))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_workers_and_processes_change_nothing(digits):
    train, _, test = load_data(folder_config(digits))
    with_workers = load_data(folder_config(digits, workers=2))[0]
    plain, others = (loader(split, shuffle=True, augment=AUGMENT) for split in (train, with_workers))
    for epoch in range(2):  # the workers live on
        plain.epoch = others.epoch = epoch
        assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, others, strict=True))
    ranks = [list(loader(train, 4, shuffle=True, augment=AUGMENT, rank=rank, world_size=2)) for rank in range(2)]
    plain.epoch = 0
    for whole, a, b in zip(plain, *ranks, strict=False):
        assert torch.equal(whole[0][0::2], a[0]) and torch.equal(whole[0][1::2], b[0])
    shares = [labels(loader(test, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [7, 7, 6]


def test_streamed_evaluation_reads_each_image_once(digits):
    pytest.importorskip('webdataset')
    config = DataConfig('timm', str(digits / 'shards'), dataset='wds/', val_split='validation', workers=2)
    test = load_data(config)[2]
    shares = [loader(test, 4, rank=rank, world_size=2) for rank in range(2)]
    together = torch.cat([labels(share) for share in shares])
    assert torch.bincount(together).tolist() == [4, 7, 3, 6]


def test_held_out_images(digits):
    train, val, _ = load_data(folder_config(digits))
    assert (len(train), len(val)) == (60, 20)
    assert torch.cat([train.indices, val.indices]).sort().values.tolist() == list(range(80))
    assert torch.equal(load_data(folder_config(digits))[1].indices, val.indices)
    assert not torch.equal(load_data(folder_config(digits, split_seed=1))[1].indices, val.indices)


@pytest.fixture
def copy(digits, tmp_path):
    import shutil

    return shutil.copytree(digits / 'folder', tmp_path / 'folder')


def test_broken_images(copy):
    victim = sorted((copy / 'train').glob('*/*'))[3]
    victim.write_bytes(b'no image')
    (copy / 'validation' / 'digit 1' / 'torn.png').write_bytes(victim.with_name(victim.name).read_bytes())
    config = DataConfig('timm', str(copy), val_fraction=0.25, workers=0)
    whole = TimmSplit(config, 'train')
    batches = loader(whole, 8, shuffle=True)
    assert len(labels(batches)) == 80 and batches.broken == 1, 'the next image stands in'
    test = loader(TimmSplit(config, 'validation'))
    assert len(labels(test)) == 20 and test.broken == 1, 'left out'
    config.broken = 'stop'
    with pytest.raises(ValueError, match=rf'{victim.name} cannot be read.*data.broken=skip'):
        list(loader(whole, 8, shuffle=True))
    for path in (copy / 'train').glob('*/*'):
        path.write_bytes(b'')
    config.broken = 'skip'
    with pytest.raises(ValueError, match='nor can the 9 images after it'):
        list(loader(whole, 8, shuffle=True))


def test_bad_sets(copy, digits, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    victim = next((copy / 'train').glob('*/*')).read_bytes()
    config = DataConfig('timm', str(copy), val_fraction=0.25, workers=0)
    with pytest.raises(ValueError, match='The data has the label 3, but the model 3 classes'):
        list(TimmLoader(TimmSplit(config, 'validation'), 8, CFG, classes=3))
    with pytest.raises(ValueError, match="Neither 'test'"):
        TimmSplit(config, 'test')
    os.makedirs(copy / 'validation' / 'digit 9')
    with pytest.raises(ValueError, match=r'Class folders without an image in .*: digit 9\.'):
        TimmSplit(config, 'validation')
    Image.new('RGB', (8, 8)).save(copy / 'validation' / 'digit 9' / 'new.png')
    with pytest.raises(ValueError, match=r"validation' has classes that the training split lacks: digit 9\."):
        load_data(config)
    with pytest.raises(ValueError, match='cannot open split'):
        TimmSplit(DataConfig('timm', str(tmp_path), dataset='wds/'), 'train')
    rows = {'image': [{'bytes': victim, 'path': None}], 'label': [-1]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    (tmp_path / 'hub').mkdir()
    for split in ('train', 'test'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'hub' / f'{split}-0-of-1.parquet')
    unlabelled = DataConfig('timm', str(tmp_path), dataset=f'hfds/{tmp_path / "hub"}', test_split='test', workers=0)
    with pytest.raises(ValueError, match=r"Split 'test' of .* has no labels \(the first is -1\)"):
        load_data(unlabelled)
    with pytest.raises(ValueError, match='an image without a label'):
        list(TimmLoader(TimmSplit(unlabelled, 'train'), 1, CFG, classes=3))
    with pytest.raises(ValueError, match=r'Set data\.val_split'):
        load_data(DataConfig('timm', str(digits / 'shards'), dataset='wds/'))


RECIPE = [
    'train', '--data.name', 'timm', '--model', 'batchout_test_vit3', '--model_args', '{num_classes: 4, img_size: 32}',
    '--data.val_fraction', '0.25', '--data.workers', '1', '--data.image_size', '32', '--epochs', '2',
    '--augment', '{scale: [0.5, 1], hflip: 0.5, mixup: 0.2, cutmix: 1}', '--batch_size', '16',
    '--objective.label_smoothing', '0.1', '--checkpoint.steps', '2',
]  # fmt: skip


def test_a_normalised_net_trains_on_a_folder_and_resumes_within_an_epoch(digits, tmp_path):
    """Mixup, CutMix, augmentation: the run that went on from its middle ends with the same bits."""
    recipe = [*RECIPE, '--data.root', str(digits / 'folder'), '--checkpoint.keep', '9']
    assert main([*recipe, '--output', str(tmp_path / 'run')]) == 0
    run = tmp_path / 'run'
    weights, metrics = (run / 'model.safetensors').read_bytes(), (run / 'metrics.jsonl').read_text()
    assert '"broken_images": 0' in metrics
    steps = sorted((run / 'checkpoints').glob('step_*'))
    assert [path.name[-2:] for path in steps] == ['02', '03', '05', '06']
    for path in steps[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert main(['train', '--config', str(run / 'config.yaml'), '--resume', 'true']) == 0
    assert (run / 'model.safetensors').read_bytes() == weights


def test_labels_beyond_the_classes_are_found_before_training(digits, tmp_path, capsys):
    recipe = [*RECIPE, '--data.root', str(digits / 'folder'), '--output', str(tmp_path / 'run')]
    assert main([*recipe, '--model_args', '{num_classes: 3, img_size: 32}']) == 2
    assert 'The model has 3 classes, the data 4. Set model_args.num_classes=4.' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()
