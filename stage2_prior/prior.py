"""The token prior: a transformers causal language model that continues a class token, and further conditions, with the T tokens of an image."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from stage2_prior.digests import check_digests, remove_stale_files, write_digests
from stage2_prior.generation.sampling import sample_tokens
from stage2_prior.given_ids import GivenIds, start_ids
from stage2_prior.model.causal_lm import exportable_causal_lm, generation_config, load_causal_lm, make_causal_lm, quiet_transformers
from stage2_prior.model.grid_transformer_config import CLASS_PLACE
from stage2_prior.vocabulary import VOCABULARY_NAME, Vocabulary
from token_shards.manifest import Grid
from vqmosaic.errors import InputError
from vqmosaic.files.durable_files import publish, temporary_sibling
from vqmosaic.files.full_disks import explain_full_disk
from vqmosaic.files.permissions import explain_permission_errors
from vqmosaic.recipes.field_types import as_integer
from vqmosaic.recipes.recipe_sections import PriorConfig, SamplingConfig
from vqmosaic.runs.devices import as_device, as_dtype


class TokenPrior(nn.Module):
    """p(ids | class, conditions) = product over t of p(id_t | class, conditions, ids before t).

    `.model` is a transformers model, `.vocabulary` defines its ids. Most priors have no conditions besides the class.
    In comments: B batch, G tokens of conditions, T drawn tokens, K codes (of the largest grid if there are several), V ids of the vocabulary.
    """

    _no_split_modules: set[str] | list[str] | None
    """Names of the module classes that the library accelerate shards one by one. Set only for FSDP."""

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary):
        super().__init__()
        if model.config.vocab_size != vocabulary.size:
            raise InputError(f"The model has {model.config.vocab_size} ids and the vocabulary {vocabulary.size}; they must be equal.")
        positions, needed = getattr(model.config, "max_position_embeddings", None), vocabulary.num_given_tokens + vocabulary.num_tokens
        if positions is not None and positions < needed:
            raise InputError(f"The model has {positions} positions; the class and {needed - 1} tokens need {needed}.")
        self.model = model
        self.model.generation_config = generation_config(vocabulary)
        self.vocabulary = vocabulary

    @classmethod
    def from_config(cls, prior: PriorConfig, vocabulary: Vocabulary, seed: int, any_order: bool = False) -> "TokenPrior":
        """A new float32 prior in training mode, with an initial loss near ln K. Equal seeds give equal weights.

        With `any_order`, it can learn to predict tokens in any order. Only grid_transformer supports this.
        """
        return cls(make_causal_lm(prior, vocabulary, as_integer("seed", seed), any_order), vocabulary)

    @classmethod
    def from_preset(cls, preset: str, *, codebook_size: int, num_classes: int, num_tokens: int, architecture: str = "grid_transformer",
                    seed: int = 0, any_order: bool = False) -> "TokenPrior":
        """A new prior of a preset size (vqmosaic.recipes.prior_sizes.PRESETS) for one square grid of codes, without dropout and without a tokenizer.

        `num_classes` 0 gives a prior without classes. `any_order` is that of `from_config`. Raises InputError for an unknown preset, and if
        num_tokens is not a square number.
        """
        codebook_size, num_classes = as_integer("codebook_size", codebook_size), as_integer("num_classes", num_classes)
        num_tokens = as_integer("num_tokens", num_tokens)
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise InputError(f"num_tokens is {num_tokens}; from_preset makes square grids: {side * side} or {(side + 1) ** 2}. For other grids, "
                             "make a Vocabulary and use from_config.")
        vocabulary = Vocabulary(grids=[Grid(name="image", codebook_size=codebook_size, height=side, width=side)],
                                class_names=[str(index) for index in range(num_classes)] or None, token_fingerprint="none", label_drop=0.1)
        return cls.from_config(PriorConfig(architecture=architecture, preset=preset, dropout=0.0), vocabulary, seed, any_order)

    @classmethod
    @explain_permission_errors()
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None,
                        dtype: torch.dtype | str | None = None) -> "TokenPrior":
        """Load the prior of a folder in evaluation mode, in float32 or in another `dtype` (a torch.dtype or its name).

        Raises InputError for an incomplete folder, for files that changed since they were saved (according to digests.json; a folder without it
        loads with a warning), and for weights that are missing, unexpected or of the wrong shape, which it lists.
        Dropout that causal_lm.add_dropout added with hooks is not saved, because sampling does not use it.
        """
        device, dtype = None if device is None else as_device(device), as_dtype(dtype)
        vocabulary = Vocabulary.load(folder)
        check_digests(Path(folder))
        prior = cls(load_causal_lm(Path(folder), dtype), vocabulary).eval()
        return prior if device is None else prior.to(device)

    @explain_permission_errors()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, generation_config.json, model.safetensors (float32), digests.json and vocabulary.json.

        vocabulary.json is written last and marks the folder as complete. Wrappers of torch.compile and DistributedDataParallel are removed.
        Raises InputError, before anything is written, if the weights do not match the configuration (adapters, quantized or offloaded parts):
        such a folder could not be loaded again.
        """
        folder, model = Path(folder), exportable_causal_lm(self.model, self.vocabulary)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; give the path of a folder for the prior.")
        folder.mkdir(parents=True, exist_ok=True)
        partial = temporary_sibling(folder / "checkpoint")
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in model.parameters())
        try:
            with explain_full_disk(folder, size), quiet_transformers():
                model.save_pretrained(partial, max_shard_size="1000GB")
            self.vocabulary.save(partial)
            write_digests(partial)
            (folder / VOCABULARY_NAME).unlink(missing_ok=True)  # without this file, the folder counts as incomplete
            remove_stale_files(folder, {path.name for path in partial.iterdir()})
            for path in sorted(partial.iterdir(), key=lambda path: path.name == VOCABULARY_NAME):
                publish(path, folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def output_matrices(self) -> list[nn.Parameter]:
        """The matrix of the output head, if there is one. Muon leaves it to AdamW."""
        head = self.model.get_output_embeddings()
        return [] if head is None else [head.weight]

    def matrix_stacks(self) -> list[nn.Parameter]:
        """Parameters (E, R, C) that stack the matrices of E experts. Muon orthogonalizes each matrix separately.

        transformers has no common base class for experts, but the names of their classes contain "Experts".
        """
        return [parameter for module in self.model.modules() if "Experts" in type(module).__name__
                for parameter in module.parameters(recurse=False) if parameter.ndim == 3]

    @property
    def num_parameters(self) -> int:
        """Number of parameters. Shared weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def any_order(self) -> bool:
        """Whether the prior has learned to predict tokens in any order."""
        return getattr(self.model, "predicts_in_any_order", False)

    def forward(self, ids_BT: torch.Tensor, class_indices_B: torch.Tensor | None = None, given: GivenIds | None = None,
                orders_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, K) for the id at each drawn position, given the class, the conditions and the ids before it.

        Class -1, or None, is the null class. `given` maps the names of conditions to their ids (B, n), or joins those of all conditions (B, G). -1 is
        their null id, and conditions that are left out hold it everywhere. Inputs and logits use each grid's own ids, from 0. With several drawn
        grids, K is that of the largest; smaller ones are padded with -inf. Raises InputError for unknown conditions and wrong shapes.

        `orders_BT` gives the positions of each image in the order in which they are predicted, so "before" means earlier in that order. None is
        raster order. Logits are in raster order in any case.
        """
        given_BP = start_ids(self.vocabulary, class_indices_B, given, ids_BT)                        # B, 1 + G
        tokens_BT = self.vocabulary.to_vocabulary(ids_BT)
        if orders_BT is None:
            inputs_BS = torch.cat([given_BP, tokens_BT[:, :-1]], dim=1)                              # B, G + T: the last id is not an input
            logits_BTV = self.model(input_ids=inputs_BS, use_cache=False).logits                     # B, G + T, V, or only the codes
            logits_BTV = logits_BTV[:, self.vocabulary.num_condition_tokens:]                        # logits of the conditions are not used
        else:
            logits_BTV = self.logits_in_order(given_BP, tokens_BT, orders_BT)
        parts, position = [], 0
        for grid, (start, stop) in zip(self.vocabulary.grids, self.vocabulary.code_ranges, strict=True):
            parts.append(logits_BTV[:, position:position + grid.num_tokens, start:stop])             # B, tokens and codes of this grid
            position += grid.num_tokens
        if len(parts) == 1:
            return parts[0]                                                                          # B, T, K
        max_codes = self.vocabulary.most_codes
        return torch.cat([F.pad(part, (0, max_codes - part.shape[-1]), value=-torch.inf) for part in parts], dim=1)  # B, T, K

    def loss(self, ids_BT: torch.Tensor, class_indices_B: torch.Tensor | None = None, given: GivenIds | None = None,
             orders_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Mean negative log likelihood per drawn token in nats, a float32 scalar. Near ln K at initialization. Arguments are those of `forward`.

        If the model is wrapped (DDP, FSDP), call the wrapper for the logits and compute the cross-entropy yourself.
        """
        logits_BTK = self(ids_BT, class_indices_B, given, orders_BT)                                 # B, T, K
        return F.cross_entropy(logits_BTK.float().flatten(0, 1), ids_BT.flatten())

    def logits_in_order(self, given_BP: torch.Tensor, tokens_BT: torch.Tensor, orders_BT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) in raster order for tokens that are predicted in another order, after the given ids (the class and G conditions)."""
        num_given = given_BP.shape[1]
        inputs_BS = torch.cat([given_BP, tokens_BT.gather(1, orders_BT)[:, :-1]], dim=1)             # B, G + T
        given_places_BG = torch.arange(num_given - 1, device=orders_BT.device).expand(len(orders_BT), -1)
        targets_BS = torch.cat([given_places_BG, orders_BT + (num_given - 1)], dim=1)                # each id predicts the next one
        places_BS = F.pad(targets_BS[:, :-1], (1, 0), value=CLASS_PLACE)
        logits_BSV = self.model(input_ids=inputs_BS, use_cache=False, places=places_BS, targets=targets_BS).logits
        in_raster_BT1 = orders_BT.argsort(dim=1)[..., None] + (num_given - 1)
        return logits_BSV.gather(1, in_raster_BT1.expand(-1, -1, logits_BSV.shape[-1]))

    def sample(self, class_indices_B: Sequence[int] | torch.Tensor | None, sampling: SamplingConfig, seeds: Sequence[int],
               callback: Callable[[int, int], bool | None] | None = None, compile: bool = False,
               given: Mapping[str, torch.Tensor] | None = None, segment_guidance: Mapping[str, float] | None = None,
               known_BT: torch.Tensor | None = None, keep_unseen: bool = False, evidence_BTK: torch.Tensor | None = None) -> torch.Tensor:
        """Sample ids (B, T) of the drawn grids, as int64 on the prior's device. Image b has the class class_indices_B[b] and the seed seeds[b].

        Class -1 means no class, and None in place of the classes means no class for any image. `callback(done, T)` is called after each pass. If it
        returns False, sampling.SamplingStopped is raised. `compile` records the forward pass of a token as a CUDA graph, if the device and the
        model support it; passes of several tokens do not use the graph. `given` maps the names of conditions to their ids (B, n), and
        `segment_guidance` the names of given segments to guidance scales in place of sampling.guidance and sampling.guidance_scale. Raises
        InputError for an unknown class or condition, different lengths, arguments of the wrong type, and for guidance if the null ids were never
        trained or no image has a class.

        `known_BT` gives ids that are kept, with -1 for tokens to draw. Priors trained in raster order accept known ids only before all others. With
        `keep_unseen`, they keep all known ids, but draw each token without seeing the known ones after it.

        `evidence_BTK` is added to the logits of each token, after guidance: the log likelihood of what was observed of it, for each code.
        """
        return sample_tokens(self.model, self.vocabulary, class_indices_B, sampling, seeds, callback, compile, given, segment_guidance, known_BT,
                             keep_unseen, evidence_BTK)
