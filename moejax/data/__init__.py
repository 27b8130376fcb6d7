"""Text to batches: `open_data` is the front door.

sources    files, folders and globs -> documents of text
tokens     tokenizers, and the training of one
cache      documents tokenised once, in flat files
documents  which documents are for training and which for validation
batches    shuffle, fill in the middle, pack: training batches that are the same on any number of hosts
dataset    all of it together
"""

from moejax.data.batches import Batch, Prefetcher, TrainBatches, merge_states
from moejax.data.dataset import Data, open_data
from moejax.data.tokens import Tokenizer, open_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Data",
    "Prefetcher",
    "Tokenizer",
    "TrainBatches",
    "merge_states",
    "open_data",
    "open_tokenizer",
    "train_tokenizer",
]
