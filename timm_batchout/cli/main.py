"""timm-batchout: robust image classifiers for timm. Every flag is a field of the command's config dataclass."""

import os
import sys
from collections.abc import Callable
from typing import Any

from timm_batchout import __version__
from timm_batchout.cli import compare, evaluate, publish, train
from timm_batchout.cli import list as list_
from timm_batchout.hub.privacy import redacted
from timm_batchout.recipe import help_text, parse
from timm_batchout.text import did_you_mean

__all__ = ['main']

COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    'train': (train.TrainConfig, train.run),
    'evaluate': (evaluate.EvaluateConfig, evaluate.run),
    'compare': (compare.CompareConfig, compare.run),
    'publish': (publish.PublishConfig, publish.run),
    'list': (list_.ListConfig, list_.run),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if ``evaluate --expect`` found a difference, 2 after an error."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ['--help']
    try:
        if name == '--version':
            print(f'timm-batchout {__version__}')
            return 0
        if name not in COMMANDS:
            print(_overview())
            return 0 if name in ('-h', '--help', 'help') else _fail(
                f'unknown command {name!r}.{did_you_mean(name, COMMANDS)}'
            )  # fmt: skip
        config_class, run = COMMANDS[name]
        asked = next((i for i, word in enumerate(words) if word in ('-h', '--help')), None)
        if asked is not None:
            print(help_text(config_class, f'timm-batchout {name}', ''.join(words[asked + 1 : asked + 2])))
            return 0
        status = run(parse(config_class, words))
        sys.stdout.flush()
        return status
    except ImportError as error:
        return _fail(f'{error.name} is missing. In a checkout: pip install -e ".[train,attacks]"')
    except BrokenPipeError:  # closed by `| head`; the rest of the buffer must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        return _fail(f'{str(error.filename)!r} does not exist.' if error.filename else str(error))
    except (ValueError, FloatingPointError, RuntimeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt as error:
        return _fail(str(error) or 'interrupted')


def _overview() -> str:
    lines = [f'{__doc__}\n']
    lines += [f'  {name:9} {(config.__doc__ or "").splitlines()[0]}' for name, (config, _) in COMMANDS.items()]
    return '\n'.join([*lines, '\ntimm-batchout COMMAND --help lists its flags.'])


def _fail(message: str) -> int:
    print(f'error: {redacted(message)}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
