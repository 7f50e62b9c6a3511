# %% [markdown]
# # From images to samples
#
# This script runs the whole chain on scikit-learn's handwritten digits and looks at each result: the tokenizer's reconstructions, the tokens, and
# generated images. It takes about two minutes on two CPU cores. Open it as a notebook (VS Code, or Jupyter with jupytext, read the `# %%` marks), or
# run `python docs/images_to_samples.py`.

# %%
import os
from pathlib import Path

from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.stages.chain import run_chain
from stage1_tokenizer import ImageTokenizer
from stage1_tokenizer.data.open_data import open_splits
from stage1_tokenizer.image_files.images import to_pil
from token_shards import TokenShardReader
from vqmosaic.recipes.recipe_files import load_recipe

# %% [markdown]
# ## The recipe
#
# A recipe holds every setting of a run. Overrides have the form of command-line options. The environment variable OVERRIDES adds more, one in each
# line.

# %%
run_dir = Path("runs/notebook")
recipe = load_recipe("digits", [f"--run_dir={run_dir}", *os.environ.get("OVERRIDES", "").splitlines()])
print(recipe.tokenizer)

# %% [markdown]
# ## The images

# %%
splits = open_splits(recipe.data)
print(splits.validation_origin)
splits.train.read(0).resize((96, 96), Image.Resampling.NEAREST)

# %% [markdown]
# ## Training
#
# `run_chain` trains the tokenizer, writes the tokens, trains the prior and bundles both. Finished stages are skipped, so you can run this cell again.

# %%
run_chain(recipe)

# %% [markdown]
# ## Stage 1: reconstructions
#
# Validation images (upper row of each pair) and what the tokenizer keeps of them.

# %%
Image.open(run_dir / "reconstructions.png")

# %% [markdown]
# ## Tokens
#
# The tokenizer turns an image into a grid of integers, and the grid back into an image.

# %%
tokenizer = ImageTokenizer.from_pretrained(run_dir / "tokenizer")
image_CHW = tokenizer.transform(splits.validation.read(0))   # float32 in [-1, 1]
ids_Bhw = tokenizer.encode(image_CHW[None])
print(ids_Bhw)
to_pil(tokenizer.decode(ids_Bhw))[0].resize((96, 96), Image.Resampling.NEAREST)

# %% [markdown]
# The shards hold the tokens of all images. The prior trains on them.

# %%
reader = TokenShardReader(run_dir / "tokens" / "train")
batch = reader.samples([0, 1, 2])
print(f"{len(reader)} images; the first three have labels {batch.labels_B} and ids\n{batch.ids_BT}")

# %% [markdown]
# ## Stage 2: samples

# %%
pipe = ImageGenerationPipeline.from_pretrained(run_dir)
out = pipe(class_labels=["3", "7"], num_images_per_label=4, seed=7)
print(out.token_ids[0])
out.images[0].resize((96, 96), Image.Resampling.NEAREST)

# %%
Image.open(run_dir / "samples.png")
