"""Operations that are faster than torch's on some devices. Each falls back to torch's own elsewhere."""
