"""Token shards, the interface between the two stages: images stored as small grids of integers in plain WebDataset tar files.

A complete folder, one for each split (`tokens/train`, `tokens/validation`):

    manifest.json        what the ids mean (grids, views, token fingerprint, class names) and the list of shards; written last
    shard-000000.tar     the first images_per_shard sources in the order given by order_seed, whichever process wrote them
        000000012.image.npy   ids (V, T): every stored view of one image, one file for each grid; uint16, or int32 above 65,536 codes
        000000012.json        {"index": 12, "label": 3, "source": "cat/0013.jpg", "views": 2}; label is null without classes
        000000457.image.npy   ...
    shard-000000.json    sidecar: count, size and sha256 of the tar, skipped sources, byte offset of each array in the tar
    shard-000001.tar     ...

Any WebDataset code can read the shards without this package (no file holds a pickle):

    import glob, webdataset
    urls = sorted(glob.glob("runs/digits/tokens/train/shard-*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        ids_VT, label = sample["image.npy"], sample["json"]["label"]

Shuffling mixes only a few shards at a time, so order_seed permutes the sources: each shard holds a random part of the data set.
Inside a shard, images are sorted by their index in the data set. The shuffle buffer of another reader should therefore hold at least one shard.
Shard sets written by version 0.1.0 are not permuted, and their manifest has no order_seed.

In this package, TokenShardWriter writes shards, TokenShardReader reads them for training in an order that can be resumed at any position, and
audit_folder checks that they are complete and undamaged. Importing the package loads nothing. Nothing in it needs torch (the audit loads webdataset).
"""

import importlib

_SUBMODULES = {
    "Grid": "manifest",
    "ShardEntry": "manifest",
    "ShardSetHeader": "manifest",
    "TokenShardManifest": "manifest",
    "TokenShardWriter": "writer",
    "default_key": "writer",
    "EpochOrder": "order",
    "TokenBatch": "reader",
    "TokenShardReader": "reader",
    "AuditReport": "audit",
    "audit_folder": "audit",
    "audit_tokens": "audit",
}


def __getattr__(name: str):
    if name in _SUBMODULES:
        return getattr(importlib.import_module(f"{__name__}.{_SUBMODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_SUBMODULES)}")


def __dir__():
    return sorted(_SUBMODULES)
