"""FSDP2 without a GPU: torch's ``fully_shard`` on two gloo processes. Accelerate's FSDP is refused on CPUs."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

SHARDED = """
import sys
import timm, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from timm_batchout import batchout_sites
from timm_batchout.zoo.checkpoint import as_safetensors
import timm_batchout.zoo.register

folder = Path(sys.argv[1])
dist.init_process_group('gloo')
rank = dist.get_rank()
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)

def build(eta=(0.0, 0.2)):
    torch.manual_seed(0)
    model = timm.create_model('batchout_resnet18', num_classes=10, eta=eta)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4, model):
        fully_shard(stage)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(100 * step + rank)  # ranks see other images, and draw other partners
        images, labels = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
    return states.get_model_state_dict(model, options=WHOLE)

def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)

model, optimizer = build()
whole = train(model, optimizer, range(3))
torch.manual_seed(0)
images = torch.rand(4, 3, 32, 32)
with torch.no_grad():
    logits = model.eval()(images)

first, first_optimizer = build()
weights = train(first, first_optimizer, range(2))
moments = states.get_optimizer_state_dict(first, first_optimizer, options=WHOLE)
second, second_optimizer = build()
options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
states.set_model_state_dict(second, weights, options=options)
states.set_optimizer_state_dict(second, second_optimizer, moments, options=options)
resumed = train(second, second_optimizer, range(2, 3))
without = train(*build(eta=0.0), range(3))
if rank == 0:
    assert equal(resumed, whole), 'a resumed run ends with other weights'
    assert not equal(without, whole), 'BatchOut did not fire'
    (folder / 'model.safetensors').write_bytes(as_safetensors(whole))
    torch.save({'images': images, 'logits': logits}, folder / 'logits.pt')
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, 'record_event'), reason="fully_shard of this torch needs a GPU's streams"
)
def test_a_sharded_twin_trains_resumes_and_is_saved_as_the_plain_net(tmp_path):
    script = tmp_path / 'sharded.py'
    script.write_text(SHARDED)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, tmp_path]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    plain = timm.create_model('resnet18', num_classes=10)
    plain.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    saved = torch.load(tmp_path / 'logits.pt', weights_only=True)
    with torch.no_grad():
        assert torch.equal(plain.eval()(saved['images']), saved['logits'])
