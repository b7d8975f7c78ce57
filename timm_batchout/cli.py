"""``timm-batchout train | evaluate | verify | list``"""

import sys

__all__ = ['main']


def main(argv: list[str] | None = None) -> int:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        print('error: the command line needs extra packages: pip install "timm-batchout[train]"', file=sys.stderr)
        return 2
    from timm_batchout.training.config import TrainConfig, make_parser, nearest_key

    parser = ArgumentParser(prog='timm-batchout', description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands()
    train = make_parser(ArgumentParser(exit_on_error=False))
    commands.add_subcommand('train', train, help='train a model by a recipe')
    try:
        args = parser.parse_args(argv)
    except Exception as error:
        keys = [action.dest for action in train._actions]
        print(f'error: {nearest_key(str(error), keys)}', file=sys.stderr)
        return 2
    try:
        from timm_batchout.training.loop import train as run

        values = parser.instantiate_classes(args).train.as_dict()
        values.pop('config')
        run(TrainConfig(**values))
    except (ValueError, FloatingPointError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
