"""timm-batchout train"""

from timm_batchout.training.config import TrainConfig

__all__ = ['TrainConfig', 'run']


def run(config: TrainConfig) -> int:
    config.validate()  # before torch and timm are loaded
    from timm_batchout.training.launch import Interrupted, train

    try:
        train(config)
    except Interrupted as stopped:  # requested and saved, so not a failure
        if str(stopped):  # on the main process
            print(stopped)
    return 0
