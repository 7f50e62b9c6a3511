"""Means of named losses over micro-batches and processes, without a wait for the device in every step."""

import torch


class RunningMeans:
    """Sums and counts by name; a name that is there only some of the time is averaged over the times it was there."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Take one micro-batch's losses, scalars."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def update(self, other: "RunningMeans") -> None:
        """Take all that another one has gathered."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + total
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def over_processes(self, accelerator) -> dict[str, float]:
        """Means by name, the same on all processes, which must have gathered the same names; nothing where nothing was gathered."""
        if not self.sums:
            return {}
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        return dict(zip(names, accelerator.reduce(means, "mean").tolist(), strict=True))
