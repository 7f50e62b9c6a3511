"""The `vqmosaic` command. Imports torch only when a stage starts, so help and input errors appear at once."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.augment.augment_command import augment
from pipelines.command_parser import Parser, add_device_options, add_sampling_options, given_sampling
from pipelines.editing.edit_commands import edit, score
from pipelines.enhancing.enhance_command import enhance
from pipelines.image_commands import generate, reconstruct, translate, upscale
from vqmosaic import __version__
from vqmosaic.errors import InputError, check_name, check_range
from vqmosaic.files.given_paths import given_path
from vqmosaic.recipes.recipe import recipe_of_condition
from vqmosaic.recipes.recipe_files import load_recipe, recipe_help, shipped_names
from vqmosaic.recipes.recipe_sections import SamplingConfig
from vqmosaic.runs.launch import exit_code_of, exit_process, find_accelerate_config, processes_to_start, run_stage
from vqmosaic.runs.process_settings import set_up_process
from vqmosaic.runs.run_folder import REDO_STAGES, main_stage

STAGE_COMMANDS = {"train-tokenizer": "tokenizer", "preprocess": "tokens", "train-prior": "prior"}


def recipe_command_parser(command: str) -> Parser:
    """A parser for the options of a recipe command other than the recipe fields."""
    parser = Parser(command, f"{COMMANDS[command][1]} RECIPE is a shipped name ({', '.join(shipped_names())}), a YAML file or a run folder.",
                    add_help=False, usage=f"vqmosaic {command} RECIPE [options] [--section.field value ...]")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes; default: 1, or the number in the configuration")
    parser.add_argument("--accelerate_config", metavar="FILE", help="Accelerate configuration to launch with: a file or a shipped name")
    parser.add_argument("--redo", metavar="STAGE", help=f"delete and rerun this stage ({', '.join(REDO_STAGES)}) and all later ones")
    if command == "train-tokenizer":
        parser.add_argument("--condition", metavar="NAME", help="train the tokenizer of this condition (data.conditions), not that of the images")
    if command == "train-prior":
        parser.add_argument("--overfit", type=int, metavar="N", help="only check that the prior can memorize N images; takes about a minute")
    return parser


def parse_recipe_command(command: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a recipe command. Returns the options, with the loaded recipe as `options.recipe`, and the recipe overrides."""
    from pipelines.stages.count_images import count_images

    parser = recipe_command_parser(command)
    wants_help = not arguments or "-h" in arguments or "--help" in arguments
    if wants_help:
        named = arguments[0] if arguments and not arguments[0].startswith("-") else None
        print(f"{parser.format_help()}\n"
              f"The values below are {f'those of {named}' if named else 'the defaults. To see those of a recipe, put its name before --help'}.\n\n"
              f"{recipe_help(named)}")
        raise SystemExit(0 if arguments else 2)
    if arguments[0].startswith("-"):
        raise InputError(f"the first argument of {command} must be a recipe, not {arguments[0]!r}. "
                         f"Try: vqmosaic {command} image_folder {' '.join(arguments)}")
    options, overrides = parser.parse_known_args(arguments[1:])
    if options.processes is not None:
        check_range("--processes", options.processes, at_least=1)
    if options.redo is not None:
        check_name("--redo", options.redo, REDO_STAGES)
    options.recipe = load_recipe(arguments[0], overrides, parser.option_names, count_images, main_stage(options.redo))
    if getattr(options, "condition", None) is not None:
        options.recipe = recipe_of_condition(options.recipe, options.condition)
        if options.redo is not None:
            check_name("--redo (with --condition)", options.redo, ("tokenizer",))
    if options.accelerate_config is not None:
        options.accelerate_config = str(find_accelerate_config(options.accelerate_config))
    options.processes = processes_to_start(options.processes, options.accelerate_config)
    return options, overrides


def run_one_stage(command: str, arguments: list[str]) -> int:
    """train-tokenizer, preprocess, train-prior: run one stage. `train-prior RECIPE --overfit N` only runs the overfit test."""
    from pipelines.stages.chain import MODULES

    options, _ = parse_recipe_command(command, arguments)
    stage = STAGE_COMMANDS[command]
    if getattr(options, "overfit", None) is not None:
        from pipelines.stages.overfit_prior import overfit_prior

        return overfit_prior(options, options.overfit)
    return run_stage(MODULES[stage], [str(prepare_stage(command, stage, options))], options.processes, options.accelerate_config)


def prepare_stage(command: str, stage: str, options: argparse.Namespace) -> Path:
    """Check everything that one stage needs, delete earlier results if --redo is given, and return the path of the written recipe."""
    from pipelines.stages.chain import delete_stages_from, record_recipe
    from pipelines.stages.stage_checks import check_before_start, check_pairs_and_captions

    if options.redo is not None and REDO_STAGES.index(options.redo) < REDO_STAGES.index(stage):
        raise InputError(f"--redo {options.redo} would delete the input of {command}. Give --redo {stage}, or rerun all stages with "
                         f"`vqmosaic run RECIPE --redo {options.redo}`.")
    action = check_before_start(options.recipe, stage, options.processes, redo=main_stage(options.redo))
    if stage == "tokens" and action == "start":
        check_pairs_and_captions(options.recipe)
    delete_stages_from(options.recipe, options.redo)
    return record_recipe(options.recipe)


def run(command: str, arguments: list[str]) -> int:
    """run: run all stages of a recipe."""
    from pipelines.stages.chain import run_chain

    options, _ = parse_recipe_command(command, arguments)
    return run_chain(options.recipe, options.processes, options.accelerate_config, options.redo)


def bundle(command: str, arguments: list[str]) -> int:
    """bundle: join the tokenizer and the prior of a run, or two folders."""
    if arguments and not arguments[0].startswith("-"):
        from pipelines.stages.chain import bundle_run

        options, _ = parse_recipe_command(command, arguments)
        prepare_stage(command, "pipeline", options)
        bundle_run(options.recipe)
        return 0
    from pipelines.bundle import make_bundle, naming_options
    from pipelines.pipeline_parts import find_conditions

    parser = Parser(command, "Join a tokenizer and one or several priors. `vqmosaic bundle RECIPE` takes those of a run; the options below take any.")
    parser.add_argument("--tokenizer", required=True, type=given_path, help="a tokenizer folder")
    parser.add_argument("--prior", required=True, action="append", type=given_path,
                        help="a prior folder. Repeat it for several priors in the order of sampling: each may be given what earlier ones draw")
    parser.add_argument("--condition", action="append", default=[], metavar="NAME=FOLDER",
                        help="the tokenizer of a condition; default: conditions/NAME/tokenizer beside a prior")
    parser.add_argument("--out", required=True, type=given_path, help="the pipeline folder to write")
    add_sampling_options(parser, "recommended in the bundle; default: off")
    options = parser.parse_args(arguments)
    conditions = find_conditions(options.condition, options.prior)
    with naming_options():
        folder = make_bundle(options.tokenizer, options.prior, options.out, SamplingConfig(**given_sampling(options)), conditions)
    print(f"bundled {folder}")
    return 0


def sweep(command: str, arguments: list[str]) -> int:
    """sweep: choose sampling settings by Frechet distance."""
    from pipelines.sweep.sweep_plan import add_sweep_options, plan_sweep

    parser = Parser(command, "Choose the sampling settings whose images are closest to real ones, and recommend them in the bundle.")
    add_sweep_options(parser)
    add_device_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    if overrides and "." not in overrides[0].partition("=")[0]:  # not a recipe field
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    request = plan_sweep(options, overrides)

    from pipelines.sweep.sweep import run_sweep

    return run_sweep(request)


def check_data(command: str, arguments: list[str]) -> int:
    """check-data: read every image of a recipe once."""
    from stage1_tokenizer.data.data_location import check_data_path

    options, _ = parse_recipe_command(command, arguments)
    check_data_path(options.recipe.data)

    from stage1_tokenizer.data.check_data import check_data as check

    return 1 if check(options.recipe.data) else 0


def audit(command: str, arguments: list[str]) -> int:
    """audit: check token shards for completeness."""
    parser = Parser(command, "Check token shards: every byte is as written, and each source is stored exactly once or listed as skipped.")
    parser.add_argument("tokens", type=given_path, help="a tokens folder, one of its splits, or a run folder")
    parser.add_argument("--recipe", help="also compare with the data set of this recipe; default: the recipe of the run that contains the folder")
    parser.add_argument("--repair", action="store_true", help="first encode broken shards again, to the same bytes as before, and "
                        "store images that were unreadable before and are readable now")
    options, overrides = parser.parse_known_args(arguments)
    if overrides and options.recipe is None:
        raise InputError(f"{overrides[0]!r} was not expected; recipe overrides need --recipe.")

    from pipelines.tokens.audit_command import audit_run

    return audit_run(options.tokens, load_recipe(options.recipe, overrides) if options.recipe is not None else None, options.repair)


def import_foreign_tokens(command: str, arguments: list[str]) -> int:
    """import-tokens: convert tokens of other programs to token shards."""
    from pipelines.tokens.import_tokens import add_options, import_tokens

    parser = Parser(command, "Convert ids to token shards: 1d-tokenizer's JSON lines, LlamaGen's folders of npy files, or an npy array.")
    add_options(parser)
    return import_tokens(parser.parse_args(arguments))


def export_to_json_lines(command: str, arguments: list[str]) -> int:
    """export-tokens: write token shards as JSON lines."""
    from pipelines.tokens.export_tokens import export_tokens

    parser = Parser(command, "Write token shards as JSON lines with class_id and tokens, which import-tokens and 1d-tokenizer read.")
    parser.add_argument("folder", type=given_path, help="the shards of one split, such as runs/digits/tokens/train")
    parser.add_argument("--out", required=True, type=given_path, help="the file to write")
    parser.add_argument("--one_view_a_line", action="store_true", help="one line per stored view, as 1d-tokenizer reads; default: one line per image")
    parser.add_argument("--grid", metavar="NAME", help="the grid to export, if the shards have several")
    options = parser.parse_args(arguments)
    return export_tokens(options.folder, options.out, options.one_view_a_line, options.grid)


def demo(command: str, arguments: list[str]) -> int:
    """demo: serve the web demo."""
    parser = Parser(command, "Serve a web page for a pipeline, on this machine only.")
    parser.add_argument("pipeline", type=given_path, help="a run folder or a pipeline folder")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860")
    add_device_options(parser)
    options = parser.parse_args(arguments)

    from pipelines.bundle import find_pipeline, usable_device
    from pipelines.doctor import is_installed

    folder = find_pipeline(options.pipeline)
    if not is_installed("gradio"):
        raise InputError("the demo needs gradio, which is not installed. Run: pip install 'vqmosaic[demo]'.")
    usable_device(options.device, "--device")

    from pipelines.demo.page import serve

    serve(folder, port=options.port, device=options.device, dtype=options.dtype)
    return 0


def doctor(command: str, arguments: list[str]) -> int:
    """doctor: print the installed packages and the device."""
    Parser(command, "Print the installed packages, the features they enable, the device and the number format.").parse_args(arguments)

    from pipelines.doctor import environment_report

    print(environment_report())
    return 0


COMMANDS: dict[str, tuple[Callable[[str, list[str]], int], str]] = {
    "run": (run, "Run all stages of a recipe. Skips finished stages and resumes interrupted ones."),
    "train-tokenizer": (run_one_stage, "Stage 1: train the image tokenizer."),
    "preprocess": (run_one_stage, "Encode the images to token shards."),
    "train-prior": (run_one_stage, "Stage 2: train the prior over tokens."),
    "bundle": (bundle, "Join a tokenizer and a prior into a pipeline folder."),
    "generate": (generate, "Generate images from a run or a pipeline."),
    "sweep": (sweep, "Choose sampling settings by Frechet distance, and recommend them in the bundle."),
    "upscale": (upscale, "Make large images from small ones, with a prior that is given images at low resolution."),
    "translate": (translate, "Make images from others, such as edges, with a prior that is given those."),
    "edit": (edit, "Draw a part of an image again: under a mask, around it, or at random places."),
    "enhance": (enhance, "Remove noise and damage from images."),
    "score": (score, "Measure how unusual images and their parts are."),
    "augment": (augment, "Write a labelled synthetic data set."),
    "reconstruct": (reconstruct, "Encode images to tokens and decode them again."),
    "check-data": (check_data, "Read every image of a recipe once and list unreadable ones."),
    "audit": (audit, "Check token shards for completeness."),
    "import-tokens": (import_foreign_tokens, "Convert the tokens of other programs to token shards."),
    "export-tokens": (export_to_json_lines, "Write token shards as JSON lines."),
    "demo": (demo, "Serve the web demo."),
    "doctor": (doctor, "Print the installed packages, the features they enable, the device and the number format."),
}


def usage() -> str:
    """The overview of all commands."""
    listing = "\n".join(f"    {name:<{max(map(len, COMMANDS))}}  {sentence}" for name, (_, sentence) in COMMANDS.items())
    return (f"vqmosaic {__version__}: two-stage image generation with a token prior.\n\nusage: vqmosaic COMMAND ...\n\n{listing}\n\n"
            f"Recipes: {', '.join(shipped_names())}, or a YAML file. `vqmosaic COMMAND --help` shows the options. Try `vqmosaic run digits` first.")


def dispatch(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    check_name("the command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]][0](arguments[0], arguments[1:])


def main() -> None:
    """Entry point of the console script. Exit codes: 0 success, 1 findings or failure, 2 bad input, 130 and 143 after signals."""
    set_up_process()
    codes: list[int] = []  # the exit code of the command, if it returns
    code = exit_code_of(lambda: codes.append(dispatch(sys.argv[1:])))
    exit_process(code or codes[0])


if __name__ == "__main__":
    main()
