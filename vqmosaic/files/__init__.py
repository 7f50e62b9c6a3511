"""Files: atomic writes, strict JSON, permissions, full disks, fingerprints, exported weights."""
