"""The method of a pipeline that draws labelled images for a data set: balanced classes, the best of several candidates, and rejection.

    for out in pipe.labelled_batches(1_000, oversample=4, seed=1):
        for image, label in zip(out.images, out.class_indices):
            ...

The candidates of an image have random numbers of their own, derived from its seed. The first one is the image that a call of the pipeline draws.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.augment.candidates import MAX_ATTEMPTS, RANKINGS
from pipelines.condition_inputs import ConditionInputs
from pipelines.decoded_images import OUTPUT_TYPES, concatenate, decode_in_batches, to_output_type
from pipelines.editing.scores import bits_of_tokens
from pipelines.generation_output import GenerationOutput
from pipelines.generation_request import Given, Request, as_labels, check_training_size, tries_seeds
from pipelines.labels import balanced_labels, class_indices
from stage1_tokenizer.tokenizer_protocol import Ids, Tokenizer, concatenate_ids
from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.prior_chain import PriorChain
from vqmosaic.errors import InputError, check_name, check_range, printable
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.out_of_memory import FittingBatches, ranges
from vqmosaic.wording import counted

Accept = Callable[[torch.Tensor, Sequence[int]], Any]
"""Takes candidates (B, C, H, W) in [-1, 1] on the pipeline's device and their class indices. Returns which are accepted, bool (B,)."""
MAX_LISTED_CLASSES = 20


@dataclass
class LabelledOutput(GenerationOutput):
    """Labelled images, and how they were chosen."""

    candidates: list[int] = field(default_factory=list)
    """The number of candidates that were drawn for each image."""
    accepted: list[int] = field(default_factory=list)
    """How many of them were accepted. Equal to `candidates` without `accept`."""
    scores: list[float] | None = None
    """The rank of each image in bits; higher is better. None if candidates are not ranked."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How candidates are drawn and chosen. The fields are the arguments of `LabelledImageMethods.labelled_batches`."""

    oversample: int
    rank_by: str
    accept: Accept | None
    max_attempts: int


class Best:
    """The best candidate so far of each image of a batch."""

    def __init__(self, count: int):
        self.found_B, self.scores_B = torch.zeros(count, dtype=torch.bool), torch.full((count,), -torch.inf)
        self.seeds, self.candidates, self.accepted = [0] * count, [0] * count, [0] * count
        self.ids_BT: torch.Tensor | None = None

    def update(self, images: Sequence[int], ids_nT: torch.Tensor, seeds: Sequence[int], scores_n: torch.Tensor, accepted_n: torch.Tensor) -> None:
        """Compare a candidate for each of some images of the batch with the best ones so far. Of equal ones, the first is kept."""
        if self.ids_BT is None:
            self.ids_BT = ids_nT.new_zeros(len(self.seeds), ids_nT.shape[1])
        for row, image in enumerate(images):
            self.candidates[image] += 1
            self.accepted[image] += bool(accepted_n[row])
            if accepted_n[row] and (not self.found_B[image] or scores_n[row] > self.scores_B[image]):
                self.found_B[image], self.scores_B[image], self.seeds[image] = True, scores_n[row], seeds[row]
                self.ids_BT[image] = ids_nT[row]


class LabelledImageMethods(ABC):
    """The methods of ImageGenerationPipeline that draw labelled images for a data set."""

    tokenizer: Tokenizer
    chain: PriorChain
    inputs: ConditionInputs
    sampling: SamplingConfig

    @property
    @abstractmethod
    def vocabulary(self) -> ChainVocabulary:
        """What the priors are given and draw."""

    @abstractmethod
    def _check_request(self, class_labels: Sequence[str | int] | str | int | None, num_images_per_label: int, seed: int | None,
                       settings: dict[str, Any], given: Given | None = None) -> Request:
        """Check the arguments of a call."""

    @abstractmethod
    def sample_ids(self, class_indices: Sequence[int] | None, sampling: SamplingConfig, seeds: Sequence[int],
                   callback: Callable[[int, int], bool | None] | None = None, compile: bool = False, given: Any = None,
                   known_BT: torch.Tensor | None = None, keep_unseen: bool = False) -> Ids:
        """Sample ids of all grids."""

    def labelled_batches(self, num_images: int, class_labels: Sequence[str | int] | str | int | None = None, seed: int | None = None, *,
                         oversample: int = 1, rank_by: str = "posterior", accept: Accept | None = None, max_attempts: int = MAX_ATTEMPTS,
                         output_type: str = "pil", callback: Callable[[int, int], bool | None] | None = None, batch_size: int = 64,
                         compile: bool = False, skip: Callable[[range], bool] | None = None, **settings: Any) -> Iterator[LabelledOutput]:
        """Yield labelled images for a data set, one batch at a time. Classes come in turn, so their numbers differ by at most one.

        Image i depends on the seed, i, the number of classes and the selection, not on the other images.

        Args:
            num_images: images of all classes together. If it is not divisible by the number of classes, the first ones have one more.
            class_labels: the classes, names or indices. None for all.
            oversample: each image is the best of this many candidates.
            rank_by: "posterior" prefers candidates that the prior finds more likely with their class than without one: log p(tokens | class) - log
                p(tokens), which is the posterior of the class up to a constant. "likelihood" is log p(tokens | class). It prefers simple images.
            accept: called with candidates and their class indices. Returns which are accepted. If none of the `oversample` candidates of an image
                is, as many are drawn again. Of several accepted ones, the best is kept.
            max_attempts: how often the candidates of an image are drawn at most.
            callback: called as callback(finished images, images) after each pass. If it returns False, the iterator raises
                stage2_prior.generation.sampling.SamplingStopped.
            output_type, batch_size, compile, skip, settings: those of `batches`. Images of type pil keep alpha.

        The iterator raises InputError if no candidate of an image was accepted. The message has the number of accepted candidates of each class.

        Raises:
            InputError: fewer images than classes, a class that is listed twice, rank_by "posterior" for a prior that was trained without label drop,
                or what a call of the pipeline raises.
        """
        for name, value in (("oversample", oversample), ("max_attempts", max_attempts), ("batch_size", batch_size)):
            check_range(name, as_integer(name, value), at_least=1)
        check_name("rank_by", rank_by, RANKINGS)
        check_name("output_type", output_type, OUTPUT_TYPES)
        names, labels = self.vocabulary.class_names, as_labels(class_labels)
        if names is None or self.vocabulary.learned_class_names is None:
            raise InputError("this pipeline was trained without classes, so its images have no labels. Call the pipeline itself.")
        classes = list(range(len(names))) if labels is None else class_indices(names, labels)
        balanced = balanced_labels(names, classes, as_integer("num_images", num_images))
        check_training_size("labelled_batches", settings)
        request = self._check_request(balanced, 1, seed, settings)
        if oversample > 1:
            check_can_rank(self.vocabulary, rank_by)
        selection = Selection(oversample=oversample, rank_by=rank_by, accept=accept, max_attempts=max_attempts)
        batches = [positions for positions in ranges(len(balanced), batch_size) if skip is None or not skip(positions)]

        def draw() -> Iterator[LabelledOutput]:  # a generator of its own, so that the checks above do not wait for the first batch
            done, total, counts = 0, sum(map(len, batches)), Counter[tuple[int, bool]]()
            decoding = FittingBatches(self.tokenizer.device)

            def report(_: int, __: int) -> bool | None:
                assert callback is not None  # otherwise this function is not passed on
                return callback(done, total)

            def draw_part(positions: range) -> Best:
                return self._draw_candidates(request.part(positions), selection, report if callback is not None else None, compile, decoding)

            for positions, best in FittingBatches(self.tokenizer.device, "batch_size").run(batches, draw_part):
                classes = balanced[positions.start:positions.stop]
                for index, drawn, accepted in zip(classes, best.candidates, best.accepted, strict=True):
                    counts[index, False] += drawn
                    counts[index, True] += accepted
                if not best.found_B.all():
                    raise InputError(describe_rejection(names, counts, int((~best.found_B).sum()), len(positions), max_attempts))
                assert best.ids_BT is not None  # set by the first candidate
                ids = self.tokenizer.split_tokens(best.ids_BT)
                images = concatenate(to_output_type(images_BCHW, output_type, keep_alpha=True)
                                     for images_BCHW in decode_in_batches(self.tokenizer, ids, fitting=decoding))
                done += len(positions)
                yield LabelledOutput(images, concatenate_ids([ids]), best.seeds, classes, places=positions, candidates=best.candidates,
                                     accepted=best.accepted, scores=best.scores_B.tolist() if oversample > 1 else None)

        return draw()

    def _draw_candidates(self, request: Request, selection: Selection, callback: Callable[[int, int], bool | None] | None, compile: bool,
                         decoding: FittingBatches) -> Best:
        """The best accepted candidate of each image. Images without one have been drawn `max_attempts` times."""
        assert request.classes is not None  # checked by the caller
        best = Best(len(request.seeds))
        for attempt in range(selection.max_attempts):
            pending = (~best.found_B).nonzero().flatten().tolist()
            if not pending:
                break
            classes, own_seeds = [request.classes[image] for image in pending], [request.seeds[image] for image in pending]
            first = attempt * selection.oversample
            for seeds in tries_seeds(own_seeds, first + selection.oversample)[first:]:
                ids = self.sample_ids(classes, request.sampling, seeds, callback, compile)
                accepted_n = torch.ones(len(pending), dtype=torch.bool)
                if selection.accept is not None:
                    decoded = decode_in_batches(self.tokenizer, ids, fitting=decoding)
                    images_nCHW = torch.cat([images_BCHW.clamp(-1, 1) for images_BCHW in decoded])
                    accepted_n = as_mask(selection.accept(images_nCHW, classes), len(pending))
                ids_nT = self.tokenizer.join_tokens(ids)
                scores_n = self.rank_candidates(ids_nT, classes, selection.rank_by) if selection.oversample > 1 else torch.zeros(len(pending))
                best.update(pending, ids_nT, seeds, scores_n, accepted_n)
        return best

    def rank_candidates(self, ids_BT: torch.Tensor, classes: Sequence[int], rank_by: str = "posterior") -> torch.Tensor:
        """The rank (B,) of images with these tokens and classes in bits, float32 on the CPU; higher is better. See `labelled_batches`."""
        ranks_B = -bits_of_tokens(self.tokenizer, self.chain, ids_BT, classes, {}).sum(dim=1)
        return ranks_B if rank_by == "likelihood" else ranks_B + bits_of_tokens(self.tokenizer, self.chain, ids_BT, None, {}).sum(dim=1)


def check_can_rank(vocabulary: ChainVocabulary, rank_by: str) -> None:
    """Raise InputError if the prior cannot compute the likelihood without a class, which rank_by "posterior" needs."""
    if rank_by == "posterior" and vocabulary.why_not_sampled(False, []):
        raise InputError("rank_by is 'posterior', which needs the likelihood without a class, but the prior was trained without label drop. Set "
                         "rank_by to 'likelihood', or train with prior_training.label_drop.")


def as_mask(accepted: Any, count: int) -> torch.Tensor:
    """What `accept` returned as a bool tensor (B,) on the CPU. Raises InputError for anything else."""
    mask_B = torch.as_tensor(accepted).cpu()
    if mask_B.dtype != torch.bool or mask_B.shape != (count,):
        raise InputError(f"accept returned {mask_B.dtype} of the shape {tuple(mask_B.shape)} for {counted(count, 'image')}; it must return bool "
                         f"({count},).")
    return mask_B


def describe_rejection(names: Sequence[str], counts: Counter[tuple[int, bool]], failed: int, images: int, max_attempts: int) -> str:
    """The message for images without an accepted candidate, with the accepted and drawn candidates of each class, the lowest share first."""
    classes = sorted({index for index, _ in counts}, key=lambda index: counts[index, True] / counts[index, False])
    listed = [f"{printable(names[index])} {counts[index, True]:,} of {counts[index, False]:,}" for index in classes[:MAX_LISTED_CLASSES]]
    more = f" ... ({counted(len(classes), 'class')})" if len(classes) > MAX_LISTED_CLASSES else ""
    return (f"{failed} of {counted(images, 'image')} had no accepted candidate after {counted(max_attempts, 'attempt')}. Accepted in this call: "
            f"{', '.join(listed)}{more}. Raise max_attempts, leave out the classes that are never accepted, or use another classifier.")
