"""What torchrun starts for test_train_ranks.py: command lines, one after the other."""

import json
import sys

import torch

from vlmfast import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(max(cli.main(["train", *words]) for words in json.loads(sys.argv[1])))
