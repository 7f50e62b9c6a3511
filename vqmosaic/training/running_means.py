"""Means of named losses over micro-batches and processes, without a device synchronization per step."""

import torch


class RunningMeans:
    """Sums and counts by name. A name is averaged over the micro-batches that contain it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add the scalar losses of one micro-batch."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def update(self, other: "RunningMeans") -> None:
        """Add the sums and counts of another RunningMeans."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def average_over_processes(self, accelerator) -> dict[str, float]:
        """Means by name over all processes, which must have added the same names. Empty if nothing was added."""
        if not self.sums:
            return {}
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        return dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))
