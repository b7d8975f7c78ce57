"""Test processes side by side (``make test``) share the cores, and so do the processes that they start."""

import os

import torch

workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
if workers > 1:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    threads = max(1, cores // workers)
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = str(threads)
