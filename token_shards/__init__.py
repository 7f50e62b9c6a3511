"""Token shards, the contract between the two stages: images as small grids of integers in plain WebDataset tar files.

A complete folder, one for each split (`tokens/train`, `tokens/validation`):

    manifest.json        what the ids mean (grids, views, token fingerprint, class names) and which shards there are; written last
    shard-000000.tar     the first images_per_shard sources in the order given by order_seed, whichever process wrote them
        000000012.image.npy   ids (V, T): every stored view of one image, one file for each grid; uint16, or int32 above 65,536 codes
        000000012.json        {"index": 12, "label": 3, "source": "cat/0013.jpg", "views": 2}; label is null without classes
        000000457.image.npy   ...
    shard-000000.json    sidecar: count, size and sha256 of the tar, skipped sources, where each array lies in it
    shard-000001.tar     ...

Any WebDataset code reads the shards without this package (none of the files holds a pickle):

    import glob, webdataset
    urls = sorted(glob.glob("runs/digits/tokens/train/shard-*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        ids_VT, label = sample["image.npy"], sample["json"]["label"]

Shuffling mixes only a few shards at a time, so the sources are permuted by order_seed: each shard holds a random part of the data set.
Inside a shard, images are sorted by their index in the data set, so the shuffle buffer of another reader should hold at least one shard.
Sets written by version 0.1.0 are not permuted, and their manifest has no order_seed.

With this package: TokenShardWriter writes, TokenShardReader trains from them in an order that can be resumed anywhere,
audit_folder proves them whole. Importing the package loads nothing; nothing in it needs torch (the audit loads webdataset).
"""

import importlib

_HOMES = {
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
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(_HOMES)}")


def __dir__():
    return sorted(_HOMES)
