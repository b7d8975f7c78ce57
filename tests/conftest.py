"""Test processes side by side (``make test``) share the cores, and so do the processes that they start."""

import os

import pytest
import torch
from PIL import Image

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
if workers > 1:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = max(1, cores // workers)
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = str(threads)


@pytest.fixture(scope='session')
def make_class_folders():
    """A function that writes ``root/PART/CLASS/*.png``, N pictures of several sizes per class for each ``PART=N``."""

    def make(root, **counts):
        generator = torch.Generator().manual_seed(0)
        for part, count in counts.items():
            for i, label in enumerate(('ant', 'bee', 'cat')):
                folder = root / part / label
                folder.mkdir(parents=True)
                for j in range(count):
                    size = (60 + 4 * (j % 5), 70 - 3 * (j % 4), 3)
                    noise = torch.randint(0, 120, size, generator=generator)
                    noise[:, :, i] += 100
                    Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f'{j}.png')

    return make
