"""Image folders and tars as people have them: damaged, cut, with links, bombs and what tools leave behind."""

import io
import os
import tarfile

import numpy as np
import pytest
import timm
from PIL import Image

from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_data, load_split, load_test_set


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()


def add(tar, name, content=b'', **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def archive(path, mode='w', images=4, extra=lambda tar: None):
    with tarfile.open(path, mode) as tar:
        for part in ('train', 'test'):
            for label in 'ab':
                for i in range(images):
                    add(tar, f'{part}/{label}/{i}.png', png(i))
        extra(tar)
    return path


def load(path, train=True, **options):
    return load_split(DataConfig('image_folder', str(path), **options), train)


@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:xz', 'w:bz2'])
def test_a_cut_archive_is_not_taken_for_the_whole(tmp_path, mode):
    path = archive(tmp_path / 'x.tar', mode)
    assert len(load(path)) == 8
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=r"x\.tar' \(data\.root\) is (truncated or damaged after|not a complete tar file)"
    ):
        load(path)


def test_a_cut_at_the_boundary_of_a_member_and_a_damaged_header(tmp_path):
    path = archive(tmp_path / 'x.tar')
    with tarfile.open(path) as tar:
        at = [member.offset for member in tar]
    content = path.read_bytes()
    path.write_bytes(content[: at[10]])
    with pytest.raises(ValueError, match='is truncated or damaged after 10 members'):
        load(path)
    path.write_bytes(content[: at[10]] + b'\xff' * 512 + content[at[10] + 512 :])
    with pytest.raises(ValueError, match='is truncated or damaged after 10 members'):
        load(path)
    path.write_text('no tar at all')
    with pytest.raises(ValueError, match='is not a complete tar file'):
        load(path)


def bad_links(tar):
    for i, target in enumerate(('../../../../etc/passwd', 'nowhere.png', 'link2.png')):
        add(tar, f'train/a/link{i}.png', type=tarfile.SYMTYPE, linkname=target)


def bomb(tar):
    add(tar, 'train/a/bomb.png', bytes(100 * 2**20))


def large_picture(tar, name='train/a/large.png'):
    buffer = io.BytesIO()
    Image.new('1', (20_000, 20_000)).save(buffer, 'PNG')
    add(tar, name, buffer.getvalue())


@pytest.mark.parametrize(
    'extra', [bad_links, bomb, large_picture, lambda tar: add(tar, 'train/a/x.png', b'\x89PNG half')]
)
def test_what_is_no_image_is_left_out_or_stops(tmp_path, extra):
    path = archive(tmp_path / 'x.tar.xz', 'w:xz', extra=extra)
    with pytest.warns(UserWarning, match='images that do not decode'):
        assert len(load(path)) == 8
    with pytest.raises(ValueError, match=r'train/a/\w+\.png does not decode'):
        load(path, broken='stop')


def test_a_link_to_an_image_of_the_archive_is_that_image(tmp_path):
    path = archive(
        tmp_path / 'x.tar', extra=lambda tar: add(tar, 'train/a/9.png', type=tarfile.LNKTYPE, linkname='train/a/3.png')
    )
    assert load(path).images[:5, 0, 0, 0].tolist() == [0, 1, 2, 3, 3]


def test_what_tools_leave_behind_is_no_class(tmp_path):
    path = archive(tmp_path / 'x.tar', extra=lambda tar: add(tar, '__MACOSX/train/a/._0.png', b'x'))
    assert load(path).class_names == ('a', 'b')
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / 'folder', filter='data')
    for leftover in ('train/.ipynb_checkpoints', 'test/__MACOSX'):
        (tmp_path / 'folder' / leftover).mkdir()
    (tmp_path / 'folder' / 'train' / 'a' / '._0.png').write_bytes(b'x')
    assert len(load(tmp_path / 'folder')) == 8
    config = DataConfig('timm', str(tmp_path / 'folder'), test_split='test', workers=0)
    assert len(load_data(config)[0]) == 8  # timm counts the file that is none; it is replaced where it is read


def test_a_pipe_does_not_hang(tmp_path):
    path = archive(tmp_path / 'x.tar')
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / 'folder', filter='data')
    os.mkfifo(tmp_path / 'folder' / 'train' / 'a' / 'pipe.png')
    with pytest.warns(UserWarning, match='Skipping 1 images that do not decode'):
        assert len(load(tmp_path / 'folder')) == 8


@pytest.fixture
def through_timm(tmp_path):
    """The training images as timm's readers give them; ``change`` gets the path of train.tar, or a folder."""

    def read(change, folder=False, **options):
        with tarfile.open(archive(tmp_path / 'x.tar')) as tar:
            tar.extractall(tmp_path / 'root', filter='data')
        for part in ('train', 'test'):
            with tarfile.open(tmp_path / 'root' / f'{part}.tar', 'w') as tar:
                for path in sorted((tmp_path / 'root' / part).rglob('*.png')):
                    tar.add(path, path.relative_to(tmp_path / 'root' / part))
            if not folder:
                (tmp_path / 'root' / part).rename(tmp_path / part)
        change(tmp_path / 'root' / ('train' if folder else 'train.tar'))
        config = DataConfig('timm', str(tmp_path / 'root'), test_split='train', workers=0, image_size=8, **options)
        images = load_test_set(config, timm.create_model('test_resnet'))
        return len(images), len(images.read(slice(0, len(images)))[0])

    return read


def appended(extra):
    def change(path):
        with tarfile.open(path, 'a') as tar:
            extra(tar)

    return change


def test_timm_does_not_take_a_cut_archive_for_the_whole(through_timm):
    with pytest.raises(ValueError, match=r"train\.tar' \(data\.root\) is truncated or damaged after"):
        through_timm(lambda path: path.write_bytes(path.read_bytes()[: 4 * 1024]))


@pytest.mark.parametrize(
    'extra',
    [
        lambda tar: add(tar, 'a/link.png', type=tarfile.SYMTYPE, linkname='../../etc/passwd'),
        lambda tar: large_picture(tar, 'a/large.png'),
        lambda tar: add(tar, 'a/half.png', b'\x89PNG half'),
    ],
)
def test_timm_leaves_out_what_is_no_image(through_timm, extra):
    assert through_timm(appended(extra))[1] == 8


def test_timm_leaves_out_a_pipe(through_timm):
    assert through_timm(lambda path: os.mkfifo(path / 'a' / 'pipe.png'), folder=True) == (9, 8)
