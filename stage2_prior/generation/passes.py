"""Passes of a prior: each predicts the next tokens of every image, and takes the ids that were drawn for them.

    passes = RasterPasses(...)                            # or OrderedPasses, for priors that predict in any order
    while passes.remaining:
        logits_NmK, places_Bm = passes.predict()
        passes.accept(ids_Bm, logits_BmK)                 # drawn from these logits

`passes.ids_BT` holds the ids of the grids; -1 is a token that is not drawn yet.

In comments: B images, N rows (for guidance two per image: N = 2 B), T tokens, m tokens predicted in a pass, K codes. A place is the number of a token
in raster order.
"""

import torch

from stage2_prior.generation.decoding import GraphDecoder, ReferenceDecoder, StaticDecoder
from stage2_prior.model.grid_transformer_config import CLASS_PLACE
from stage2_prior.vocabulary import Vocabulary

UNKNOWN = -1
"""The id of a token that is not known."""
CONFIDENCE_NOISE = 1.0
"""Scale of the random numbers that are added to the log probabilities by which order `confidence` selects tokens."""

PADDING = -1e30
"""The logit of codes that a grid does not have. It is finite, so that guidance can subtract it."""

Decoder = ReferenceDecoder | StaticDecoder | GraphDecoder


def codes_at(vocabulary: Vocabulary, logits_NmV: torch.Tensor, places_Bm: torch.Tensor | int) -> torch.Tensor:
    """The logits (N, m, K) of the codes that are possible at these places. A place that is an int is the same for all images.

    K is the codebook size of the grid, or of the largest grid if the places may be in several. Then the others are padded.
    """
    ranges = vocabulary.position_ranges()
    if isinstance(places_Bm, int) or len(vocabulary.grids) == 1:
        start, stop = ranges[places_Bm if isinstance(places_Bm, int) else 0]
        return logits_NmV[..., start:stop].float()
    range_T2 = torch.tensor(ranges, device=logits_NmV.device)
    starts_Nm1, stops_Nm1 = range_T2[places_Bm].repeat(len(logits_NmV) // len(places_Bm), 1, 1).split(1, dim=-1)
    codes_NmK = starts_Nm1 + torch.arange(vocabulary.most_codes, device=logits_NmV.device)
    is_code_NmK = codes_NmK < stops_Nm1
    return logits_NmV.float().gather(-1, codes_NmK * is_code_NmK).masked_fill(~is_code_NmK, PADDING)


class RasterPasses:
    """One token per pass, in raster order. For every architecture. A token is predicted from the tokens before it, known or drawn."""

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, start_NP: torch.Tensor, known_BT: torch.Tensor):
        """`start_NP` are the ids before the drawn ones: the class and the conditions. All images have known ids at the same places."""
        self.decoder, self.vocabulary, self.ids_BT, self.start_NP = decoder, vocabulary, known_BT.clone(), start_NP
        self.next_ids_N = start_NP[:, -1]
        self.is_known_T = (known_BT[0] != UNKNOWN).tolist()
        self.place, self.remaining = 0, self.is_known_T.count(False)
        self.first_position = start_NP.shape[1] - 1
        """The position of the id that predicts the first drawn token."""

    def predict(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, 1, K) at the next place, and this place (B, 1) of each image."""
        logits_NV = self.step()
        while self.is_known_T[self.place]:
            self.advance()
            logits_NV = self.step()
        return codes_at(self.vocabulary, logits_NV[:, None], self.place), self.ids_BT.new_full((len(self.ids_BT), 1), self.place)

    def step(self) -> torch.Tensor:
        """Logits (N, V) at the current place."""
        return self.decoder.start(self.start_NP) if self.place == 0 else self.decoder.step(self.next_ids_N, self.first_position + self.place)

    def accept(self, ids_Bm: torch.Tensor, logits_BmK: torch.Tensor) -> None:
        """Take the drawn ids (B, 1)."""
        self.ids_BT[:, self.place] = ids_Bm[:, 0]
        self.remaining -= 1
        self.advance()

    def advance(self) -> None:
        """Make the token at the current place the next input."""
        ids_B = self.vocabulary.to_vocabulary_at(self.place, self.ids_BT[:, self.place])
        self.next_ids_N = ids_B.repeat(self.decoder.rows // len(ids_B))
        self.place += 1

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows, if the decoder can."""
        self.decoder.keep_first(rows)
        self.start_NP, self.next_ids_N = self.start_NP[:self.decoder.rows], self.next_ids_N[:self.decoder.rows]


class OrderedPasses:
    """Several tokens per pass, in any order, another one for each image. For a GridTransformer with query blocks.

    The model sees the class and the conditions, the known tokens in raster order, and the drawn tokens in the order of drawing.
    """

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, start_NP: torch.Tensor, known_BT: torch.Tensor, orders_BT: torch.Tensor,
                 counts: list[int], confidence_noise_BT: torch.Tensor | None = None):
        """`start_NP` are the class and the ids of the conditions. `orders_BT` are all places, the known ones first. `counts` are the numbers of
        tokens to draw in each pass.

        With `confidence_noise_BT`, a random number for each token, a pass predicts all unknown tokens and keeps those with the highest log
        probability plus noise, instead of the next ones in the order. If there are several grids, a pass keeps tokens of a grid only after all
        tokens of the grids before it.
        """
        self.decoder, self.vocabulary, self.counts, self.start_NP = decoder, vocabulary, list(counts), start_NP
        self.ids_BT, self.orders_BT, self.noise_BT = known_BT.clone(), orders_BT, confidence_noise_BT
        self.filled = known_BT.shape[1] - sum(counts)
        numbers = [number for number, grid in enumerate(vocabulary.grids) for _ in range(grid.num_tokens)]
        self.grid_T = torch.tensor(numbers, device=known_BT.device)
        """The number of the grid of each place."""
        self.cached = 0
        """Number of ids in the cache."""

    @property
    def remaining(self) -> int:
        """Number of passes to come."""
        return len(self.counts)

    def predict(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, m, K) and the places (B, m) of the tokens to draw."""
        rows, num_given = self.decoder.rows // len(self.ids_BT), self.start_NP.shape[1] - 1
        stop = None if self.noise_BT is not None else self.filled + self.counts[0]
        targets_Bm, filled_Bf = self.orders_BT[:, self.filled:stop], self.orders_BT[:, :self.filled]
        tokens_Bf = self.vocabulary.to_vocabulary(self.ids_BT).gather(1, filled_Bf)
        ids_NS = torch.cat([self.start_NP, tokens_Bf.repeat(rows, 1)], dim=1)
        # places in the sequence of the model, where the drawn tokens follow the conditions
        start_places_BP = torch.arange(CLASS_PLACE, num_given, device=filled_Bf.device).expand(len(filled_Bf), -1)
        places_NS = torch.cat([start_places_BP, filled_Bf + num_given], dim=1).repeat(rows, 1)
        targets_Nm = (targets_Bm + num_given).repeat(rows, 1)
        logits_NmV = self.decoder.predict(ids_NS[:, self.cached:], places_NS[:, self.cached:], targets_Nm, self.cached)
        self.cached = ids_NS.shape[1]
        return codes_at(self.vocabulary, logits_NmV, targets_Bm), targets_Bm

    def accept(self, ids_Bm: torch.Tensor, logits_BmK: torch.Tensor) -> None:
        """Take the drawn ids (B, m), or in order `confidence` those of them that the prior is most certain of."""
        count, places_Bm = self.counts.pop(0), self.orders_BT[:, self.filled:self.filled + ids_Bm.shape[1]]
        if self.noise_BT is not None:
            log_probabilities_Bm = logits_BmK.log_softmax(dim=-1).gather(-1, ids_Bm[..., None])[..., 0]
            ranking_Bm = (log_probabilities_Bm + self.noise_BT.gather(1, places_Bm)).argsort(dim=1, descending=True, stable=True)
            ranking_Bm = ranking_Bm.gather(1, self.grid_T[places_Bm.gather(1, ranking_Bm)].argsort(dim=1, stable=True))
            places_Bm, ids_Bm = places_Bm.gather(1, ranking_Bm), ids_Bm.gather(1, ranking_Bm)
            self.orders_BT = torch.cat([self.orders_BT[:, :self.filled], places_Bm], dim=1)
        self.ids_BT.scatter_(1, places_Bm[:, :count], ids_Bm[:, :count])
        self.filled += count

    def keep_first(self, rows: int) -> None:
        """Keep only the first rows, if the decoder can."""
        self.decoder.keep_first(rows)
        self.start_NP = self.start_NP[:self.decoder.rows]
