import sys

from timm_batchout.cli.main import main

sys.exit(main())
