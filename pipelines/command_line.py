"""The vqmosaic command. Loads no torch until a stage starts, so that help and wrong input answer at once."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vqmosaic import __version__
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.launch import guarded, run_stage
from vqmosaic.recipe_files import load_recipe, recipe_help, save_recipe, shipped_names
from vqmosaic.run_folder import STAGES, RunFolder

STAGE_COMMANDS = {"train-tokenizer": "tokenizer", "preprocess": "tokens", "train-prior": "prior"}


def parse_recipe_command(command: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command that takes a recipe, and the recipe's overrides."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: vqmosaic {command} RECIPE [--processes N] [--accelerate_config FILE] [--redo STAGE] [--section.field value ...]\n\n"
              f"{COMMANDS[command][1]}\n\nRECIPE is a shipped name ({', '.join(shipped_names())}), a YAML file or a run folder.\n\n{recipe_help()}")
        raise SystemExit(0 if arguments else 2)
    if arguments[0].startswith("-"):
        raise InputError(f"the first argument of {command} is the recipe, but {arguments[0]!r} was given; "
                         f"try: vqmosaic {command} {shipped_names()[0]} {' '.join(arguments)}")
    parser = argparse.ArgumentParser(prog=f"vqmosaic {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--redo", choices=STAGES)
    options, overrides = parser.parse_known_args(arguments[1:])
    if "-h" in overrides or "--help" in overrides:
        return parse_recipe_command(command, ["--help"])
    options.recipe = load_recipe(arguments[0], overrides)
    check_range("--processes", options.processes, at_least=1)
    return options, overrides


def run_one_stage(command: str, arguments: list[str]) -> int:
    """train-tokenizer, preprocess, train-prior: one stage alone."""
    from pipelines.chain import MODULES, redo_from
    from pipelines.stage_checks import check_before_start

    options, _ = parse_recipe_command(command, arguments)
    stage, recipe = STAGE_COMMANDS[command], options.recipe
    redo_from(recipe, options.redo)
    check_before_start(recipe, stage, options.processes)
    run = RunFolder(Path(recipe.run_dir))
    save_recipe(recipe, run.recipe)
    return run_stage(MODULES[stage], [str(run.recipe)], options.processes, options.accelerate_config)


def run(command: str, arguments: list[str]) -> int:
    """run: the whole chain."""
    from pipelines.chain import run_chain

    options, _ = parse_recipe_command(command, arguments)
    return run_chain(options.recipe, options.processes, options.accelerate_config, options.redo)


def bundle(command: str, arguments: list[str]) -> int:
    """bundle: a run's own parts, or parts given by path."""
    if arguments and not arguments[0].startswith("-"):
        from pipelines.chain import bundle_run, redo_from
        from pipelines.stage_checks import check_before_start

        options, _ = parse_recipe_command(command, arguments)
        redo_from(options.recipe, options.redo)
        check_before_start(options.recipe, "pipeline")
        bundle_run(options.recipe)
        return 0
    from pipelines.bundle import make_bundle
    from vqmosaic.recipe_sections import SamplingConfig

    parser = argparse.ArgumentParser(prog="vqmosaic bundle", allow_abbrev=False, description=(
        "Join a tokenizer and a prior: `vqmosaic bundle RECIPE` takes a run's own, the options below take any."))
    parser.add_argument("--tokenizer", required=True, type=Path, help="a tokenizer folder")
    parser.add_argument("--prior", required=True, type=Path, help="a prior folder")
    parser.add_argument("--out", required=True, type=Path, help="the pipeline folder to write")
    add_sampling_options(parser, "recommended in the bundle; default: off")
    options = parser.parse_args(arguments)
    print(f"bundled {make_bundle(options.tokenizer, options.prior, options.out, SamplingConfig(**given_sampling(options)))}")
    return 0


def add_sampling_options(parser: argparse.ArgumentParser, default_words: str) -> None:
    """Give a parser the sampling settings."""
    parser.add_argument("--guidance_scale", type=float, help=f"classifier-free guidance, 1 is off ({default_words})")
    parser.add_argument("--temperature", type=float, help=f"divides the logits ({default_words})")
    parser.add_argument("--top_k", type=int, help=f"only the k likeliest tokens, 0 is off ({default_words})")
    parser.add_argument("--top_p", type=float, help=f"only the likeliest tokens up to this probability, 1 is off ({default_words})")


def given_sampling(options: argparse.Namespace) -> dict[str, float]:
    """The sampling settings that were given."""
    values = {name: getattr(options, name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    return {name: value for name, value in values.items() if value is not None}


def generate(command: str, arguments: list[str]) -> int:
    """generate: images from a run or a pipeline, one PNG each plus a grid."""
    parser = argparse.ArgumentParser(prog="vqmosaic generate", allow_abbrev=False, description="Generate images, one PNG each plus a grid.")
    parser.add_argument("pipeline", help="a run folder or a pipeline folder")
    parser.add_argument("--classes", help="class names or indices with commas between, such as cat,3; default: every class")
    parser.add_argument("--num", type=int, default=4, help="images for each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the PNGs")
    add_device_options(parser)
    add_sampling_options(parser, "default: as the bundle recommends")
    options = parser.parse_args(arguments)

    from pipelines.bundle import class_indices, find_pipeline, labels_from_words, read_bundle
    from vqmosaic.recipe_sections import SamplingConfig

    folder = find_pipeline(options.pipeline)
    content = read_bundle(folder)
    check_range("--num", options.num, at_least=1)
    SamplingConfig(**{**content["sampling"], **given_sampling(options)})
    names = content["class_names"]
    labels = None
    if options.classes is not None:
        labels = class_indices(names, labels_from_words(names, [word.strip() for word in options.classes.split(",")]))
    elif names is not None:
        labels = list(range(len(names)))

    from pipelines.write_images import write_generated

    return write_generated(folder, labels, options.num, options.seed, options.out, options.device, options.dtype, given_sampling(options))


def reconstruct(command: str, arguments: list[str]) -> int:
    """reconstruct: images through the tokens and back."""
    parser = argparse.ArgumentParser(prog="vqmosaic reconstruct", allow_abbrev=False, description="Send images through the tokens and back.")
    parser.add_argument("pipeline", help="a run folder or a pipeline folder")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("reconstructions"), help="folder for the PNGs")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_pipeline

    folder = find_pipeline(options.pipeline)
    for image in options.images:
        if not image.is_file():
            raise InputError(f"image {str(image)!r} does not exist.")

    from pipelines.write_images import write_reconstructions

    return write_reconstructions(folder, options.images, options.out, options.device, options.dtype)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the choice of device and number format."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ...; default: the best there is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of prior and decoder")


def check_data(command: str, arguments: list[str]) -> int:
    """check-data: read every image once."""
    from stage1_tokenizer.data_location import check_data_path

    options, _ = parse_recipe_command(command, arguments)
    check_data_path(options.recipe.data)

    from stage1_tokenizer.check_data import check_data as check

    return 1 if check(options.recipe.data) else 0


def audit(command: str, arguments: list[str]) -> int:
    """audit: prove token shards whole."""
    parser = argparse.ArgumentParser(prog="vqmosaic audit", allow_abbrev=False, description=(
        "Prove token shards whole: every byte as written, each source exactly once or named as skipped."))
    parser.add_argument("tokens", type=Path, help="a tokens folder, one of its splits, or a run folder")
    parser.add_argument("--recipe", help="also compare with the data set of this recipe; default: that of the run the folder lies in")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.recipe is None:
        raise InputError(f"{overrides[0]!r} was not expected; recipe overrides need --recipe.")

    from pipelines.audit import audit_run

    return audit_run(options.tokens, load_recipe(options.recipe, overrides) if options.recipe else None)


def demo(command: str, arguments: list[str]) -> int:
    """demo: the web page."""
    parser = argparse.ArgumentParser(prog="vqmosaic demo", allow_abbrev=False, description="Open a web page in front of a pipeline, on this machine only.")
    parser.add_argument("pipeline", help="a run folder or a pipeline folder")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_pipeline
    from pipelines.doctor import is_installed

    folder = find_pipeline(options.pipeline)
    if not is_installed("gradio"):
        raise InputError("the demo needs gradio, which is not installed: pip install 'vqmosaic[demo]'.")

    from pipelines.demo import serve

    serve(folder, port=options.port, device=options.device, dtype=options.dtype)
    return 0


def doctor(command: str, arguments: list[str]) -> int:
    """doctor: what is installed and what that enables."""
    argparse.ArgumentParser(prog="vqmosaic doctor", description="What is installed, what that enables, which device and number format.").parse_args(arguments)

    from pipelines.doctor import examine

    print(examine())
    return 0


COMMANDS: dict[str, tuple[Callable[[str, list[str]], int], str]] = {
    "run": (run, "The whole chain of a recipe; finished stages are skipped, interrupted ones go on."),
    "train-tokenizer": (run_one_stage, "Stage 1: train the image tokenizer."),
    "preprocess": (run_one_stage, "Encode the images to token shards."),
    "train-prior": (run_one_stage, "Stage 2: train the prior over tokens."),
    "bundle": (bundle, "Join a tokenizer and a prior to a pipeline folder."),
    "generate": (generate, "Generate images from a run or a pipeline."),
    "reconstruct": (reconstruct, "Send images through the tokens and back."),
    "check-data": (check_data, "Read every image of a recipe once; list what is unreadable."),
    "audit": (audit, "Prove token shards whole."),
    "demo": (demo, "Open the web demo."),
    "doctor": (doctor, "What is installed, what that enables, which device and number format."),
}


def usage() -> str:
    """The overview of all commands."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"    {name:<{width}}  {sentence}" for name, (_, sentence) in COMMANDS.items())
    return (f"vqmosaic {__version__}: two-stage image generation with a token prior.\n\nusage: vqmosaic COMMAND ...\n\n{listing}\n\n"
            f"Recipes: {', '.join(shipped_names())}, or a YAML file. `vqmosaic COMMAND --help` says more; `vqmosaic run digits` is a good start.")


def dispatch(arguments: list[str]) -> int:
    """Exit code of one call."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    check_name("the command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]][0](arguments[0], arguments[1:])


def main() -> None:
    """Entry point of the console script: 0, 1 for findings and failures, 2 for bad input, 130 and 143 after signals."""
    codes: list[int] = []
    code = guarded(lambda: codes.append(dispatch(sys.argv[1:])))
    sys.exit(code or codes[0])


if __name__ == "__main__":
    main()
