"""Commands for token shards: audit, repair, import and export."""
