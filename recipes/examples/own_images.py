"""Your own images, from a folder to a model card: fine-tune a twin and the plain net, attack both, compare, publish.

    python recipes/examples/own_images.py animals --epochs 10 --repo me/animals

``animals`` holds ``train/CLASS/*.jpg`` and ``validation/CLASS/*.jpg``. Without ``--repo`` the card is written and
nothing goes up.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import timm

import timm_batchout as tb
from timm_batchout.data.config import DataConfig
from timm_batchout.data.memory import load_test_set
from timm_batchout.robustness.plots import draw_curves

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('images', type=Path)
parser.add_argument('--model', default='resnet18', help="any of timm's")
parser.add_argument('--scratch', action='store_true', help="do not start from timm's weights")
parser.add_argument('--size', type=int, default=224, help='pixels')
parser.add_argument('--epochs', type=int, default=10)
parser.add_argument('--batch_size', type=int, default=64)
parser.add_argument('--output', type=Path, default=Path('runs/own_images'))
parser.add_argument('--repo', default='', help='NAMESPACE/NAME on the Hugging Face Hub')
arguments = parser.parse_args()

data = DataConfig('timm', str(arguments.images), image_size=arguments.size)
nets, reports = [], []
for name in (arguments.model, f'batchout_{arguments.model}'):
    run = arguments.output / name
    result = tb.train(
        model=name,
        model_args={'pretrained': not arguments.scratch},
        data=asdict(data),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        output=str(run),
        resume='auto',
    )
    net = timm.create_model(
        name, checkpoint_path=str(run / 'model.safetensors'), num_classes=len(result['class_names'])
    )
    report = tb.evaluate(
        net, load_test_set(data, net),  # resized and cropped as in training
        attacks=['fgsm', 'pgd', 'corruptions'], eps=['1/255', '2/255', '4/255'], name=name, data=arguments.images.name,
    )  # fmt: skip
    report.save(run / 'report.json')
    nets.append(net)
    reports.append(report)

print(tb.compare(reports))
draw_curves(reports, arguments.output / 'curves.svg')
losses = [json.loads(line)['train_loss'] for line in (run / 'metrics.jsonl').read_text().splitlines()]
print(f'{name}: training loss by epoch {[round(loss, 3) for loss in losses]}')
repo = arguments.repo or 'me/own_images'
tb.publish(repo, nets[1], reports[1], run=run, twin=reports[0], cards=arguments.output, dry_run=not arguments.repo)
print(f'The card: {arguments.output / repo.split("/")[1] / "README.md"}')
