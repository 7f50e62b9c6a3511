"""Samples with one or several priors, one after another: each is given the grids that earlier ones have drawn."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from stage2_prior.chain_vocabulary import ChainVocabulary
from stage2_prior.generation.logit_differences import largest_logit_difference
from stage2_prior.generation.passes import UNKNOWN
from stage2_prior.generation.sampling import check_known, check_order, evaluation_mode
from stage2_prior.prior import TokenPrior
from stage2_prior.vocabulary import Vocabulary
from vqmosaic.errors import InputError
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.seeding import derive_seed


class PriorChain:
    """Priors in the order of sampling. `.vocabulary` describes what they are given and draw together."""

    def __init__(self, priors: Sequence[TokenPrior], names: Sequence[str] = ()):
        self.priors = list(priors)
        self.vocabulary = ChainVocabulary([prior.vocabulary for prior in priors], names)

    @property
    def vocabularies(self) -> Sequence[Vocabulary]:
        """The vocabulary of each prior."""
        return self.vocabulary.vocabularies

    @property
    def any_order(self) -> bool:
        """Whether all priors predict tokens in any order."""
        return all(prior.any_order for prior in self.priors)

    def check_order(self, sampling: SamplingConfig, known: Mapping[str, torch.Tensor] | None = None, images: int = 1,
                    keep_unseen: bool = False) -> None:
        """Raise InputError if a prior has not learned the order or the number of passes of the settings, or cannot keep the known tokens.

        `known` has ids (B, n) of drawn grids by name, as in `sample`, for as many images, and `keep_unseen` is that of `TokenPrior.sample`.
        """
        if sampling.steps is not None and sampling.steps > self.vocabulary.most_steps:
            raise InputError(f"sampling.steps is {sampling.steps}; allowed: 1 to {self.vocabulary.most_steps}, the number of tokens of an image"
                             f"{' that one prior draws' if len(self.priors) > 1 else ''}, or null for one token in each pass.")
        for number, prior in enumerate(self.priors):
            known_BT = check_known(prior.vocabulary, join_known(prior, known, images), images, next(prior.parameters()).device)
            check_order(prior.model, prior.vocabulary, self.vocabulary.settings_of(number, sampling), known_BT, keep_unseen)

    def sample(self, class_indices: Sequence[int] | None, sampling: SamplingConfig, seeds: Sequence[int],
               callback: Callable[[int, int], bool | None] | None = None, compile: bool = False,
               given: Mapping[str, torch.Tensor] | None = None, known: Mapping[str, torch.Tensor] | None = None,
               keep_unseen: bool = False, evidence: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Sample ids (B, n) of each drawn grid, by name. Image b depends on its class, given and known ids, and seed.

        `given` has the ids (B, n) of conditions, and `known` ids (B, n) of drawn grids that are kept, with -1 for tokens to draw. `evidence` has what
        is added to the logits (B, n, K) of drawn grids. The other arguments are those of `TokenPrior.sample`. The callback gets the numbers of tokens
        over all priors. One prior gives the same ids as without a chain.
        """
        self.check_order(sampling, known, len(seeds), keep_unseen)
        drawn: dict[str, torch.Tensor] = {}
        done_before, total = 0, self.vocabulary.num_tokens
        for number, prior in enumerate(self.priors):
            vocabulary = prior.vocabulary

            def report(done: int, _: int, before: int = done_before) -> bool | None:
                assert callback is not None  # otherwise this function is not passed on
                return callback(before + done, total)

            # random numbers of their own: those of an earlier prior have already chosen its ids, which this prior is given
            own_seeds = seeds if number == 0 else [derive_seed("prior", number, seed) for seed in seeds]
            own_given, settings = given_ids_of(prior, drawn, given), self.vocabulary.settings_of(number, sampling)
            if len(self.priors) > 1 and class_indices is None and not own_given:
                settings = settings.unguided()  # only the other priors are given something
            ids_BT = prior.sample(class_indices, settings, own_seeds, report if callback is not None else None, compile, given=own_given,
                                  known_BT=join_known(prior, known, len(own_seeds)), keep_unseen=keep_unseen,
                                  evidence_BTK=join_evidence(prior, evidence))
            drawn |= split_grids(prior, ids_BT)
            done_before += vocabulary.num_tokens
        return drawn

    def token_nll(self, ids: Mapping[str, torch.Tensor], class_indices: Sequence[int] | None, given: Mapping[str, torch.Tensor] | None = None,
                  orders: Mapping[str, torch.Tensor] | None = None, minus_entropy: bool = False) -> dict[str, torch.Tensor]:
        """The negative log likelihood (B, n) of each token in nats, float32, by name of the grid: given the tokens before it in raster order.

        `ids` has the ids (B, n) of all drawn grids. `given` and `class_indices` are those of `sample`. Each prior is given the grids that earlier
        ones draw. `orders` has the places (n,) of each grid in another order, for priors that predict in any order. With `minus_entropy`, the
        entropy of the prediction is subtracted: the result is 0 on average for tokens that are drawn from the prior.
        """
        nll: dict[str, torch.Tensor] = {}
        for prior in self.priors:
            device = next(prior.parameters()).device
            ids_BT = torch.cat([ids[grid.name].flatten(1) for grid in prior.vocabulary.grids], dim=1).to(device)
            classes_B = None if class_indices is None else torch.tensor(class_indices, device=device)
            orders_BT = None if orders is None else join_orders(prior, orders).to(device).expand(len(ids_BT), -1)
            with torch.inference_mode(), evaluation_mode(prior.model):
                logits_BTK = prior(ids_BT, classes_B, given_ids_of(prior, ids, given), orders_BT).float()
                nll_BT = F.cross_entropy(logits_BTK.flatten(0, 1), ids_BT.flatten(), reduction="none").view(ids_BT.shape)
                if minus_entropy:
                    nll_BT = nll_BT - torch.special.entr(logits_BTK.softmax(dim=-1)).sum(dim=-1)
            nll |= split_grids(prior, nll_BT)
        return nll

    def logit_difference(self, references: Sequence[TokenPrior], ids: Mapping[str, torch.Tensor], class_indices: Sequence[int],
                         given: Mapping[str, torch.Tensor] | None = None) -> float:
        """The largest difference between the logits of these priors in sampling and those of other priors in a forward pass, for given ids."""
        differences = []
        for prior, reference in zip(self.priors, references, strict=True):
            ids_BT = torch.cat([ids[grid.name].flatten(1) for grid in prior.vocabulary.grids], dim=1)
            differences.append(largest_logit_difference(prior, reference, ids_BT, class_indices, given_ids_of(prior, ids, given)))
        return max(differences)


def given_ids_of(prior: TokenPrior, drawn: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The ids of a prior's conditions: those that earlier priors have drawn, and the given ones."""
    known = {**(given or {}), **drawn}
    return {condition.name: known[condition.name] for condition in prior.vocabulary.conditions if condition.name in known}


def split_grids(prior: TokenPrior, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The ids (B, n) of each grid that a prior draws, from those of all of them (B, T)."""
    grids = prior.vocabulary.grids
    return {grid.name: part for grid, part in zip(grids, ids_BT.split([grid.num_tokens for grid in grids], dim=1), strict=True)}


def join_known(prior: TokenPrior, known: Mapping[str, torch.Tensor] | None, images: int) -> torch.Tensor | None:
    """The known ids (B, T) of the grids that a prior draws, -1 for tokens to draw. None if no grid has any."""
    grids = prior.vocabulary.grids
    if known is None or not any(grid.name in known for grid in grids):
        return None
    device = next(known[grid.name].device for grid in grids if grid.name in known)
    return torch.cat([known[grid.name].flatten(1) if grid.name in known else torch.full((images, grid.num_tokens), UNKNOWN, device=device)
                      for grid in grids], dim=1)


def join_evidence(prior: TokenPrior, evidence: Mapping[str, torch.Tensor] | None) -> torch.Tensor | None:
    """The evidence (B, T, K) of the grids that a prior draws, padded to the codes of the largest one. None if no grid has any."""
    grids = prior.vocabulary.grids
    if evidence is None or not any(grid.name in evidence for grid in grids):
        return None
    like = next(iter(evidence.values()))
    parts = [evidence[grid.name] if grid.name in evidence else like.new_zeros(len(like), grid.num_tokens, grid.codebook_size) for grid in grids]
    return torch.cat([F.pad(part_BnK, (0, prior.vocabulary.most_codes - part_BnK.shape[-1])) for part_BnK in parts], dim=1)


def join_orders(prior: TokenPrior, orders: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The places (T,) of all grids that a prior draws, one grid after another, from the orders (n,) of the places of each."""
    parts, first = [], 0
    for grid in prior.vocabulary.grids:
        parts.append(orders[grid.name] + first)
        first += grid.num_tokens
    return torch.cat(parts)
