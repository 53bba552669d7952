"""files -> items -> batches. Any set of pictures, clips and captions; the emoji data set; codes on the disk."""

from emulus.data.source import SPLITS, Item, Kind, Source, Split, open_source, split_of_key

__all__ = ["SPLITS", "Item", "Kind", "Source", "Split", "open_source", "split_of_key"]
